"""A folder of safetensors files as Hugging Face writes it, one file or numbered shards with an index, read by name.

Memory holds one tensor. The headers are checked against the files before anything is read: a truncated, missing or
doubled file is an error that names it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from pangu_sigma.checkpoint.float_types import FLOAT_TYPES
from pangu_sigma.checkpoint.safetensors_header import StoredTensor, open_safetensors
from pangu_sigma.errors import UserError
from pangu_sigma.json_reader import LARGE, UnreadableText, read_object
from pangu_sigma.wording import listed

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class SafetensorsFolder:
    """The tensors of a folder by name."""

    path: Path
    tensors: dict[str, StoredTensor]

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the type that it is stored in. Raises UserError if it cannot be read."""
        return self.tensors[name].read(name)


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
        return SafetensorsFolder(path, _weights(path / SINGLE))
    file_of = _index(path / INDEX)
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(file_of.values())):
        header = _weights(path / file)
        of_file = {name for name, shard in file_of.items() if shard == file}
        if header.keys() != of_file:
            different = listed(header.keys() ^ of_file, 1)
            raise UserError(f"{path / file} does not hold what {INDEX} says ({different}): fetch the folder again")
        tensors |= header
    return SafetensorsFolder(path, tensors)


def _index(path: Path) -> dict[str, str]:
    """Tensor -> file; only plain names inside the folder."""
    try:
        file_of = read_object(path, LARGE).get("weight_map")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): fetch the folder again") from error
    except UnreadableText as error:
        raise UserError(f"{error.at(path)}: fetch the folder again") from error
    if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
        raise UserError(f"{path} has no weight_map from tensors to files: fetch the folder again")
    for file in file_of.values():
        if PurePath(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{path} names the file {file[:200]}, which is no .safetensors file in it: fetch it again")
    return file_of


def _weights(path: Path) -> dict[str, StoredTensor]:
    tensors = open_safetensors(path)
    for name, stored in tensors.items():
        if stored.dtype not in FLOAT_TYPES:
            raise UserError(f"{path} holds {name} as {stored.dtype}: weights are {', '.join(FLOAT_TYPES)}")
    return tensors
