"""A folder of safetensors files as Hugging Face writes it, one file or numbered shards with an index, read by name.

Memory holds one tensor. The headers are checked against the files before anything is read: a truncated, missing or
doubled file is an error that names it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from pangu_sigma.checkpoint.float_types import FLOAT_TYPES
from pangu_sigma.checkpoint.tensor_file import described_tensors, numpy_type
from pangu_sigma.errors import UserError
from pangu_sigma.regular_file import regular

_MAX_HEADER = 100 << 20  # the safetensors library's own limit
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies; `dtype` is our name of its type."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int


@dataclass(frozen=True)
class SafetensorsFolder:
    """The tensors of a folder by name."""

    path: Path
    tensors: dict[str, StoredTensor]

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the type that it is stored in. Raises UserError if it cannot be read."""
        stored = self.tensors[name]
        array = np.empty(stored.shape, numpy_type(stored.dtype))
        try:
            with open(stored.file, "rb") as stream:
                stream.seek(stored.begin)
                expected = array.reshape(-1).view(np.uint8)
                if stream.readinto(expected) != expected.size:
                    raise UserError(f"{stored.file} ends inside tensor {name}: fetch the file again")
        except OSError as error:
            raise UserError(f"{stored.file} cannot be read ({error.strerror}): restore it") from error
        return array


def open_folder(path: Path) -> SafetensorsFolder:
    """Open `model.safetensors` of the folder, or the shards that `model.safetensors.index.json` lists.

    Raises UserError that names the file: none there, one missing, damaged or with a type of number that weights do not
    have, a shard that lacks what the index says or holds more than it.
    """
    if not (path / INDEX).is_file():
        if not (path / SINGLE).is_file():
            raise UserError(
                f"{path} has neither {SINGLE} nor {INDEX}: give the folder that save_pretrained wrote "
                "(with safe_serialization; .bin files are not read)"
            )
        return SafetensorsFolder(path, _header(path / SINGLE))
    file_of = _index(path / INDEX)
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(file_of.values())):
        header = _header(path / file)
        listed = {name for name, shard in file_of.items() if shard == file}
        if header.keys() != listed:
            different = sorted(header.keys() ^ listed)
            raise UserError(f"{path / file} does not hold what {INDEX} says ({different[0]}): fetch the folder again")
        tensors |= header
    return SafetensorsFolder(path, tensors)


def _index(path: Path) -> dict[str, str]:
    """Tensor -> file; only plain names inside the folder."""
    try:
        file_of = json.loads(regular(path).read_text(encoding="utf-8"))["weight_map"]
        assert isinstance(file_of, dict) and all(isinstance(file, str) for file in file_of.values())
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{path} is damaged: fetch the folder again") from error
    for file in file_of.values():
        if PurePath(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{path} names the file {file}, which is no .safetensors file in it: fetch it again")
    return file_of


def _header(path: Path) -> dict[str, StoredTensor]:
    damaged = UserError(f"{path} is no whole safetensors file: fetch it again")
    try:
        size = path.stat().st_size
        with open(regular(path), "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise damaged
            described = described_tensors(stream.read(length))
        tensors = {}
        for spec, begin, end in described:
            if spec.dtype not in FLOAT_TYPES:
                raise UserError(f"{path} holds {spec.name} as {spec.dtype}: weights are {', '.join(FLOAT_TYPES)}")
            if min(spec.shape, default=1) < 0 or begin < 0 or end - begin != spec.nbytes or 8 + length + end > size:
                raise damaged
            tensors[spec.name] = StoredTensor(path, spec.dtype, spec.shape, 8 + length + begin)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): fetch the folder again") from error
    except (ValueError, TypeError) as error:
        raise damaged from error
    return tensors
