"""Names of a model's layers by arithmetic: of a model of any size, however many layers that makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from pangu_sigma.tensor_names import QUERY_LAYER, block_index, block_name


@dataclass(frozen=True)
class LayerNames(Sequence[str]):
    """Names of layers from bottom to top: the `blocks` of these indices, and the query layer if it is one of them.

    A sequence that holds no name: its length, its items and what it contains follow from the range.
    """

    blocks: range
    query_layer: bool = False

    def __len__(self) -> int:
        return len(self.blocks) + self.query_layer

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if self.query_layer and index in (-1, len(self.blocks)):
            return QUERY_LAYER
        return block_name(self.blocks[index + (self.query_layer and index < 0)])

    def __iter__(self) -> Iterator[str]:
        yield from map(block_name, self.blocks)
        if self.query_layer:
            yield QUERY_LAYER

    def __contains__(self, name: object) -> bool:
        return self.query_layer if name == QUERY_LAYER else isinstance(name, str) and block_index(name) in self.blocks

    def __eq__(self, other: object) -> bool:
        if isinstance(other, LayerNames):
            return (self.blocks, self.query_layer) == (other.blocks, other.query_layer)
        return isinstance(other, tuple) and len(self) == len(other) and tuple(self) == other

    def __hash__(self) -> int:
        return hash((self.blocks, self.query_layer))

    def blocks_among(self, indices: range) -> int:
        """How many of the blocks have an index in `indices`, a range of neighbours."""
        return self._before(indices.stop) - self._before(indices.start) if indices else 0

    def _before(self, index: int) -> int:
        return min(len(self.blocks), max(0, -(-(index - self.blocks.start) // self.blocks.step)))
