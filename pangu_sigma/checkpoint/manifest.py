"""Checkpoint manifest (`manifest.json`): every file and tensor with its hash, and the rules that make them complete.

The file begins with its own sha256, taken with that field zeroed, so that a changed byte of it is noticed too.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from pangu_sigma.checkpoint import folder_layout
from pangu_sigma.checkpoint.tensor_file import TensorSpec, count_bytes, damaged
from pangu_sigma.errors import CheckpointError
from pangu_sigma.json_reader import LARGE, UnreadableText, parse_object
from pangu_sigma.tensor_names import DOMAIN_EMBEDDING, is_expert, parse_name, tensor_name

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]

_OPENING = b'{\n "sha256": "'
_UNSIGNED = "0" * 64


class _ManifestModel(BaseModel):
    """Base of the manifest's records: frozen, strict, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TensorSlice(_ManifestModel):
    """A slice of a tensor: the box [offset, offset + shape) of the full tensor, in one file, with its bytes' sha256."""

    file: str
    offset: tuple[Count, ...]
    shape: tuple[Count, ...]
    sha256: Sha256


class TensorEntry(_ManifestModel):
    """A tensor's element type, full shape, and the slices that make it up (one, unless several processes wrote it)."""

    dtype: str
    shape: tuple[Count, ...]
    slices: tuple[TensorSlice, ...] = Field(min_length=1)


class FileEntry(_ManifestModel):
    """A file's size and sha256; tensor files also tell where their header ends and its sha256."""

    bytes: Count
    sha256: Sha256
    header_bytes: Count | None = None
    header_sha256: Sha256 | None = None

    def check(self, path: Path, digest: tuple[int, str]) -> None:
        """Raise CheckpointError that names `path` unless (bytes, sha256) of what was read there are this file's."""
        if digest != (self.bytes, self.sha256):
            raise damaged(path, "its content is not what was written")


class CoverageCell(_ManifestModel):
    """One expert group: sparse layer (`blocks.6`), domain, number of experts, its tensors' names after the layer."""

    layer: str
    domain: str
    experts: Annotated[int, Field(ge=1)]
    tensors: tuple[str, ...] = Field(min_length=1)


class Fingerprints(_ManifestModel):
    """What the run was trained with: the tokenizer's fingerprint and each domain's corpus fingerprint."""

    tokenizer: str
    corpora: dict[str, str]


class Manifest(_ManifestModel):
    """Everything a checkpoint holds; validated: slices fill tensors, tensors fill files, groups fill layers."""

    format_version: Literal[1]
    step: Count
    domains: tuple[str, ...]
    fingerprints: Fingerprints
    coverage: tuple[CoverageCell, ...]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]

    @model_validator(mode="after")
    def _check_complete(self) -> "Manifest":
        folder_layout.check_domains(self.domains)
        for path in self.files:
            if not folder_layout.is_safe_path(path) or path == folder_layout.MANIFEST:
                raise ValueError(f"the file path {path!r} may leave the checkpoint's folder")
        for required in (folder_layout.CONFIG, folder_layout.STATE):
            if required not in self.files:
                raise ValueError(f"{required} is not listed")
        for name, entry in self.tensors.items():
            self._check_tensor(name, entry)
        self._check_file_sizes()
        check_coverage(self.coverage, self.domains, {name: entry.shape for name, entry in self.tensors.items()})
        return self

    def _check_tensor(self, name: str, entry: TensorEntry) -> None:
        domain = parse_name(name).domain
        if domain is not None and domain not in self.domains:
            raise ValueError(f"tensor {name!r} belongs to no domain of the checkpoint")
        for piece in entry.slices:
            if piece.file not in self.files or folder_layout.group_of_file(piece.file) != folder_layout.group_of(name):
                raise ValueError(f"tensor {name!r} lies in {piece.file!r}, which is not a file of its group")
            if not len(piece.offset) == len(piece.shape) == len(entry.shape) or any(
                begin + size > full for begin, size, full in zip(piece.offset, piece.shape, entry.shape, strict=True)
            ):
                raise ValueError(f"a slice of tensor {name!r} in {piece.file} lies outside the tensor")
        if len({piece.file for piece in entry.slices}) != len(entry.slices):
            raise ValueError(f"tensor {name!r} has two slices in one file")
        filled = sum(math.prod(piece.shape) for piece in entry.slices)
        overlap = any(_overlap(one, other) for one, other in itertools.combinations(entry.slices, 2))
        if filled != math.prod(entry.shape) or overlap:
            raise ValueError(f"the slices of tensor {name!r} do not fill it exactly once")

    def _check_file_sizes(self) -> None:
        sizes = {path: file.header_bytes or 0 for path, file in self.files.items()}
        for entry in self.tensors.values():
            for piece in entry.slices:
                sizes[piece.file] += count_bytes(entry.dtype, piece.shape)
        for path, file in self.files.items():
            holds_tensors = folder_layout.group_of_file(path) is not None
            if holds_tensors != (file.header_bytes is not None) or holds_tensors != (file.header_sha256 is not None):
                raise ValueError(f"{path} must have a header exactly if it is a tensor file")
            if holds_tensors and sizes[path] != file.bytes:
                raise ValueError(f"{path} has {file.bytes} bytes, but its tensors and header need {sizes[path]}")


def _overlap(one: TensorSlice, other: TensorSlice) -> bool:
    return all(
        max(a, b) < min(a + n, b + m)
        for a, n, b, m in zip(one.offset, one.shape, other.offset, other.shape, strict=True)
    )


def coverage_cells(
    coverage: Mapping[str, Mapping[str, int]], domains: Sequence[str], specs: Iterable[TensorSpec]
) -> tuple[CoverageCell, ...]:
    """The expert groups of a model: `coverage` maps sparse layer → domain → number of experts.

    Raises ValueError for a group without tensors, and for a tensor of a domain's layer that `coverage` does not name.
    """
    shapes = {spec.name: spec.shape for spec in specs}
    names_by_cell: dict[tuple[str, str], list[str]] = {
        (layer, domain): [] for layer, groups in coverage.items() for domain in groups
    }
    for name in sorted(shapes):
        parsed = parse_name(name)
        layer, domain = parsed.layer, parsed.domain
        if domain is None or parsed.is_optimizer or parsed.module == DOMAIN_EMBEDDING:
            continue
        if (layer, domain) not in names_by_cell:
            raise ValueError(f"tensor {name!r}: the coverage does not name layer {layer!r} for domain {domain}")
        names_by_cell[layer, domain].append(parsed.part)
    for (layer, domain), tensors in names_by_cell.items():
        if not tensors:
            raise ValueError(f"domain {domain} has no tensors in sparse layer {layer}")
    cells = tuple(
        CoverageCell(layer=layer, domain=domain, experts=coverage[layer][domain], tensors=tuple(tensors))
        for (layer, domain), tensors in names_by_cell.items()
    )
    check_coverage(cells, domains, shapes)
    return cells


def check_coverage(
    cells: Collection[CoverageCell], domains: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises ValueError unless every sparse layer has every domain, with the same kinds of tensors, all present."""
    kinds: dict[str, frozenset[str]] = {}
    seen = set()
    for cell in cells:
        where = f"domain {cell.domain} in sparse layer {cell.layer}"
        if cell.domain not in domains or (cell.layer, cell.domain) in seen:
            raise ValueError(f"{where} is covered twice or is no domain of the checkpoint")
        seen.add((cell.layer, cell.domain))
        if kinds.setdefault(cell.layer, frozenset(cell.tensors)) != frozenset(cell.tensors):
            raise ValueError(f"{where} has other kinds of tensors than its neighbours")
        if not any(is_expert(tensor) for tensor in cell.tensors):
            raise ValueError(f"{where} has no experts")
        for tensor in cell.tensors:
            name = tensor_name(cell.layer, tensor, domain=cell.domain)
            if name not in shapes:
                raise ValueError(f"{where} lacks tensor {name!r}")
            if is_expert(tensor) and shapes[name][:1] != (cell.experts,):
                shape = list(shapes[name])
                raise ValueError(f"tensor {name!r} has shape {shape}, but {where} has {cell.experts} experts")
    missing = [(layer, domain) for layer in kinds for domain in domains if (layer, domain) not in seen]
    if missing:
        raise ValueError(f"sparse layer {missing[0][0]} has no expert group of domain {missing[0][1]}")


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as the file's text: one field a line at the top, its own hash first."""
    fields = {"sha256": _UNSIGNED, **manifest.model_dump(mode="json", exclude_none=True)}
    return sign(json.dumps(fields, indent=1, ensure_ascii=False).encode() + b"\n")


def hash_of(text: bytes) -> str:
    """The hash in the first field of a manifest's text."""
    return text[len(_OPENING) : len(_OPENING) + 64].decode()


def sign(text: bytes) -> bytes:
    """Puts the hash of a manifest's text into its first field (whose present value does not count)."""
    start, end = len(_OPENING), len(_OPENING) + 64
    blank = text[:start] + _UNSIGNED.encode() + text[end:]
    return text[:start] + hashlib.sha256(blank).hexdigest().encode() + text[end:]


def parse_manifest(text: bytes, path: Path) -> Manifest:
    """Reads a manifest; raises CheckpointError, naming `path`, when it was altered, is too new, or is not whole."""
    if not text.startswith(_OPENING) or sign(text) != text:
        raise CheckpointError(f"{path} was altered or is cut off: restore the file or use another checkpoint")
    try:
        # Read by its own reader first: pydantic's takes the last of two equal keys.
        version = parse_object(text, LARGE).get("format_version")
        if isinstance(version, int) and version > folder_layout.FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {version}, this program reads up to {folder_layout.FORMAT_VERSION}: "
                "use the newer program that wrote it"
            )
        return Manifest.model_validate_json(b"{" + text[len(_OPENING) + 64 :].removeprefix(b'",'))
    except CheckpointError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise CheckpointError(
            f"{path} does not describe a whole checkpoint: {where + ': ' if where else ''}{message}; "
            "restore the folder or use another checkpoint"
        ) from error
    except UnreadableText as error:
        raise CheckpointError(f"{error.at(path)}: restore the file or use another checkpoint") from error
