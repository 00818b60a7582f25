"""Which pipeline stage computes which part of the model: tables first, equal runs of layers, the head last."""

from __future__ import annotations

from pangu_sigma.tensor_names import POSITIONS, WORDS, block_index, parse_name
from parallel.mesh import Mesh


def stage_of(name: str, layers: int, mesh: Mesh) -> int:
    """The stage of the tensor or layer of this name in a model of so many `layers`, the query layer included.

    A tied word table is the first stage's; the last one is sent it once a step, and sends its gradient back.
    """
    parsed = parse_name(name)
    index = block_index(parsed.layer)
    if index is not None:
        return mesh.stage_of(index, layers)
    return 0 if parsed.part in (WORDS, POSITIONS) else mesh.pipeline - 1
