"""A checkpoint's tensors as a mapping that reads, and checks, a tensor when it is asked for."""

from collections.abc import Collection, Iterator, Mapping

import numpy as np

from pangu_sigma.checkpoint.checkpoint_reader import Checkpoint
from pangu_sigma.checkpoint.float_types import as_float32


class StoredTensors(Mapping[str, np.ndarray]):
    """Tensors of `checkpoint` by name, each read anew at every access: whoever goes through them holds one at a time.

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
