"""Which pipeline stage computes which part of the model: tables first, equal runs of layers, the head last."""

from __future__ import annotations

from pangu_sigma.config.model_section import ModelConfig
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


def layers_of_stage(model: ModelConfig, mesh: Mesh, stage: int) -> range:
    """Indices of the layers of a stage, the query layer's index is the last; stages have equal runs of them."""
    run = model.layers // mesh.pipeline
    return range(stage * run, (stage + 1) * run)


def unlike_stages(model: ModelConfig, mesh: Mesh) -> list[int]:
    """Ascending stages, few in any pipeline, of which each other one has the layers of a lower one among them.

    Stages differ by the tables in the first, by the head and query layer in the last, where the sparse layers begin,
    and by turns where every second layer is sparse.
    """
    first_sparse = model.sparse_prefixes.blocks.start * mesh.pipeline // model.layers
    stages = {*range(3), *range(first_sparse, first_sparse + 3), mesh.pipeline - 1}
    return sorted(stage for stage in stages if 0 <= stage < mesh.pipeline)
