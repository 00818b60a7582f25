"""Checkpoint reader: the manifest, files and tensors of a checkpoint folder, hashes checked as bytes are read."""

import hashlib
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pangu_sigma.checkpoint import folder_layout
from pangu_sigma.checkpoint.float_types import as_float32
from pangu_sigma.checkpoint.manifest import (
    Manifest,
    TensorEntry,
    TensorSlice,
    hash_of,
    manifest_bytes,
    parse_manifest,
)
from pangu_sigma.checkpoint.safetensors_header import read_header
from pangu_sigma.checkpoint.tensor_file import (
    TensorSpec,
    byte_chunks,
    damaged,
    digest_of_file,
    numpy_type,
    open_plain,
    raw_bytes,
    read_tensor,
    stream_tensor,
)
from pangu_sigma.checkpoint.trainer_state import check_state
from pangu_sigma.errors import CheckpointError
from pangu_sigma.json_reader import STATE, UnreadableText, parse_object
from pangu_sigma.tensor_names import PROBE, parse_name, probe_name


class Checkpoint:
    """An opened checkpoint: a folder whose manifest is complete and whose files are present with the right sizes.

    Contents are hashed when they are read, so that opening is fast and a domain can be read without touching another's
    file. `messages` says what was passed over in finding this one. Nothing is kept in memory.

    step: optimizer steps done when it was saved. domains: names in the order in which the model numbers them.
    fingerprints: of the tokenizer and of each domain's corpus.
    """

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, step={self.step}, domains={self.domains})"

    def __init__(self, path: Path, manifest: Manifest, messages: Iterable[str] = ()) -> None:
        self.path = path
        self.manifest = manifest
        self.step, self.domains, self.fingerprints = manifest.step, manifest.domains, manifest.fingerprints
        self.messages = tuple(messages)
        self._headers: dict[str, dict[str, tuple[TensorSpec, int]]] = {}

    @cached_property
    def sha256(self) -> str:
        """The hash of the manifest, which holds every file's hash: the identity of all that the folder holds."""
        return hash_of(manifest_bytes(self.manifest))

    @cached_property
    def coverage(self) -> dict[str, dict[str, int]]:
        """Sparse layer → domain → number of experts."""
        layers: dict[str, dict[str, int]] = {}
        for cell in self.manifest.coverage:
            layers.setdefault(cell.layer, {})[cell.domain] = cell.experts
        return layers

    @cached_property
    def tensors_by_file(self) -> dict[str, dict[str, TensorEntry]]:
        """File -> the tensors that lie in it, or a slice of them does: name -> entry in the manifest."""
        files: dict[str, dict[str, TensorEntry]] = {}
        for name, entry in self.manifest.tensors.items():
            for piece in entry.slices:
                files.setdefault(piece.file, {})[name] = entry
        return files

    @cached_property
    def config_text(self) -> str:
        """The effective configuration as YAML text."""
        try:
            return self.read_file(folder_layout.CONFIG).decode()
        except UnicodeDecodeError as error:
            raise damaged(self.path / folder_layout.CONFIG, "it is not UTF-8 text") from error

    @cached_property
    def state(self) -> dict[str, Any]:
        """The trainer's state, as JSON gives it back (tuples as lists, keys as strings)."""
        path = self.path / folder_layout.STATE
        try:
            state = parse_object(self.read_file(folder_layout.STATE), STATE)
        except UnreadableText as error:
            raise damaged(path, str(error)) from error
        check_state(state, path)
        return state

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files, name → content."""
        folder = f"{folder_layout.TOKENIZER}/"
        paths = [path for path in self.manifest.files if path.startswith(folder)]
        return {path.removeprefix(folder): self.read_file(path) for path in paths}

    def probe(self, domains: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """Held-out sequences of `domains` (None: all), domain → int32 [sequences, S + 1]; without any: absent."""
        names = {domain: probe_name(domain) for domain in self._known(domains)}
        return {domain: self._read(name) for domain, name in names.items() if name in self.manifest.tensors}

    def names(
        self,
        *,
        domains: Collection[str] | None = None,
        shared: bool = True,
        parameters: bool = True,
        optimizer: bool = True,
    ) -> list[str]:
        """Sorted tensor names of the given domains (None: all), with or without shared tensors and either kind.

        Raises CheckpointError for a domain that the checkpoint does not have.
        """
        included = self._known(domains)
        return sorted(
            name
            for name in self.manifest.tensors
            if (parsed := parse_name(name)).module != PROBE
            and (shared if parsed.domain is None else parsed.domain in included)
            and (optimizer if parsed.is_optimizer else parameters)
        )

    def files(self, names: Iterable[str]) -> list[str]:
        """The sorted paths (inside the folder) of the files that hold the tensors `names`."""
        return sorted({piece.file for name in names for piece in self._entry(name).slices})

    def load(self, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Reads the tensors `names` (None: all but the probe) into new arrays, two at a time in two threads of its own.

        Raises CheckpointError naming the file when a tensor's bytes are not those that were saved.
        """
        chosen = self.names() if names is None else list(names)
        with ThreadPoolExecutor(2) as threads:
            return dict(zip(chosen, threads.map(self._read, chosen), strict=True))

    def load_rows(self, name: str, rows: range) -> np.ndarray:
        """These rows of a tensor's first axis as a new array; the others are hashed as they pass by."""
        entry = self._entry(name)
        spec = TensorSpec(name, entry.dtype, (len(rows), *entry.shape[1:]))
        array = np.empty(spec.shape, numpy_type(entry.dtype))
        into, row_size, offset = raw_bytes(array), spec.nbytes // max(1, len(rows)), 0
        for chunk in self.byte_chunks(name):
            for index, row in enumerate(rows):
                row_start = row * row_size
                start, stop = max(offset, row_start), min(offset + len(chunk), row_start + row_size)
                if start < stop:
                    shift = index * row_size - row_start
                    into[start + shift : stop + shift] = chunk[start - offset : stop - offset]
            offset += len(chunk)
        return array

    def byte_chunks(self, name: str) -> Iterator[memoryview]:
        """A tensor's bytes in C order, in chunks of whole elements; a chunk is overwritten when the next is asked for.

        Memory holds a chunk (a whole tensor where several processes wrote it). Raises CheckpointError naming the file,
        after the last chunk, when the bytes are not those that were saved.
        """
        entry = self._entry(name)
        if len(entry.slices) > 1:
            yield from byte_chunks(self._read(name))
            return
        piece = entry.slices[0]
        spec, begin = self._locate(name, entry, piece)
        yield from stream_tensor(self.path / piece.file, spec, begin, piece.sha256)

    def read_file(self, path: str) -> bytes:
        """The content of one small file of the folder, checked against its hash."""
        entry = self.manifest.files.get(path)
        if entry is None:
            raise CheckpointError(f"{self.path} holds no {path}: use another checkpoint")
        with open_plain(self.path / path) as stream:
            content = stream.read()
        entry.check(self.path / path, (len(content), hashlib.sha256(content).hexdigest()))
        return content

    def verify(self, files: Iterable[str] | None = None) -> None:
        """Reads the given files (None: every file) and compares size and hash.

        Raises CheckpointError with the first damaged file's name.
        """
        chosen = list(self.manifest.files if files is None else files)
        with ThreadPoolExecutor(2) as threads:
            results = threads.map(lambda path: digest_of_file(self.path / path), chosen)
            for path, digest in zip(chosen, results, strict=True):
                self.manifest.files[path].check(self.path / path, digest)

    def check_fingerprints(self, *, tokenizer: str, corpora: dict[str, str]) -> None:
        """Raises CheckpointError by name when the tokenizer, or the corpus of a domain that it knows, has changed."""
        # Corpora first: a changed one also changes the tokenizer that is trained on it.
        for domain, fingerprint in self.fingerprints.corpora.items():
            if domain in corpora and corpora[domain] != fingerprint:
                raise CheckpointError(
                    f"the corpus of domain {domain} has changed since {self.path} was saved: "
                    "restore its files, or start a new run in another run.dir"
                )
        if tokenizer != self.fingerprints.tokenizer:
            raise CheckpointError(
                f"the tokenizer is not the one {self.path} was trained with: "
                "restore it, or start a new run in another run.dir"
            )

    def _known(self, domains: Collection[str] | None) -> tuple[str, ...]:
        for domain in domains or ():
            if domain not in self.domains:
                raise CheckpointError(
                    f"{self.path} has no domain {domain!r}: choose from {', '.join(self.domains) or 'none'}"
                )
        return tuple(domain for domain in self.domains if domains is None or domain in domains)

    def _entry(self, name: str) -> TensorEntry:
        entry = self.manifest.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path} holds no tensor {name!r}: use a checkpoint of the same model")
        return entry

    def _read(self, name: str) -> np.ndarray:
        entry = self._entry(name)
        if len(entry.slices) == 1:
            return self._read_slice(name, entry, entry.slices[0])
        array = np.empty(entry.shape, numpy_type(entry.dtype))
        for piece in entry.slices:
            box = tuple(slice(begin, begin + size) for begin, size in zip(piece.offset, piece.shape, strict=True))
            array[box] = self._read_slice(name, entry, piece)
        return array

    def _read_slice(self, name: str, entry: TensorEntry, piece: TensorSlice) -> np.ndarray:
        spec, begin = self._locate(name, entry, piece)
        return read_tensor(self.path / piece.file, spec, begin, piece.sha256)

    def _locate(self, name: str, entry: TensorEntry, piece: TensorSlice) -> tuple[TensorSpec, int]:
        """A slice as its file's header describes it, and where its bytes begin in the file."""
        path = self.path / piece.file
        if piece.file not in self._headers:
            file = self.manifest.files[piece.file]
            self._headers[piece.file] = read_header(path, file.header_bytes, file.header_sha256)
        spec, begin = self._headers[piece.file].get(name, (None, 0))
        if spec != TensorSpec(name, entry.dtype, piece.shape):
            raise damaged(path, f"tensor {name!r} in it is not as the manifest says")
        return spec, begin


class StoredTensors(Mapping[str, np.ndarray]):
    """Tensors of a checkpoint as a mapping: each is read, and its hash checked, at every access, so a loop holds one.

    `names` restricts them; by default all. `floats`: float16 and bfloat16 tensors come as float32. An access raises
    CheckpointError for a damaged file.
    """

    def __init__(self, checkpoint: Checkpoint, names: Collection[str] | None = None, floats: bool = False) -> None:
        self._checkpoint = checkpoint
        self._floats = floats
        self._names = tuple(checkpoint.names() if names is None else names)
        self._known = frozenset(self._names)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._known:
            raise KeyError(name)
        return self._converted(name, self._checkpoint.load([name])[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._checkpoint.manifest.tensors[name].shape

    def rows(self, name: str, rows: range) -> np.ndarray:
        """These rows of a tensor's first axis; memory holds them alone, the whole tensor is hashed."""
        return self._converted(name, self._checkpoint.load_rows(name, rows))

    def _converted(self, name: str, array: np.ndarray) -> np.ndarray:
        return as_float32(name, array) if self._floats else array

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_checkpoint(path: Path | str, messages: Iterable[str] = ()) -> Checkpoint:
    """Opens a checkpoint folder (or any model folder with a manifest) after checking that it is whole.

    The manifest is validated and every file it names must be a regular file of the stated size inside the folder; file
    contents are not read yet. Raises CheckpointError naming the file or folder otherwise.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: name a run or a checkpoint folder")
    if not os.path.lexists(path / folder_layout.MANIFEST):
        raise CheckpointError(
            f"{path} has no {folder_layout.MANIFEST}, so it is not a finished checkpoint: use another checkpoint"
        )
    _check_file(path, folder_layout.MANIFEST, None)
    with open_plain(path / folder_layout.MANIFEST) as stream:
        manifest = parse_manifest(stream.read(), path / folder_layout.MANIFEST)
    for name, entry in manifest.files.items():
        _check_file(path, name, entry.bytes)
    return Checkpoint(path, manifest, messages)


def _check_file(folder: Path, name: str, size: int | None) -> None:
    path = folder
    parts = name.split("/")
    for part in parts:
        path = path / part
        try:
            status = path.lstat()
        except OSError as error:
            raise CheckpointError(
                f"{folder / name} of the checkpoint is missing ({error.strerror}): restore it or use another checkpoint"
            ) from error
        is_expected_kind = stat.S_ISREG if path == folder / name else stat.S_ISDIR
        if not is_expected_kind(status.st_mode):
            raise damaged(folder / name, f"{path.name} is a link or something else than a plain file or folder")
    if size is not None and status.st_size != size:
        raise damaged(folder / name, f"it has {status.st_size} bytes instead of {size}")
