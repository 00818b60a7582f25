"""Which pipeline stage computes which part of the model: tables first, equal runs of layers, the head last."""

from __future__ import annotations

import re

from parallel.mesh import Mesh

_LAYER = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_FIRST = ("embedding.word", "embedding.position")


def stage_of(name: str, layers: int, mesh: Mesh) -> int:
    """The stage of the tensor of this name in a model of so many `layers`, the query layer included.

    A tied word table is the first stage's; the last one is sent it once a step, and sends its gradient back.
    """
    layer = _LAYER.search(name)
    if layer is not None:
        return mesh.stage_of(int(layer[1]), layers)
    return 0 if name.endswith(_FIRST) else mesh.pipeline - 1
