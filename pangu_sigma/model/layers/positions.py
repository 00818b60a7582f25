"""Position embeddings as cells (`config.parts.position_specs`): learned or rotary.

Legend: T rows, D hidden width, P positions of a table.
"""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from pangu_sigma.config.model_section import ModelConfig
from pangu_sigma.model.layers.embedding import embedding_table
from parallel.operator_layout import Layout
from parallel.ops.primitives import embedding_lookup
from parallel.ops.rotary import RotaryCosSin


class LearnedPositions(nn.Cell):
    """Learned position embedding: words_TD, position ids [T] -> words + table row of each position (table [P, D])."""

    def __init__(self, model: ModelConfig, layout: Layout) -> None:
        super().__init__()
        self.position = embedding_table(model.positions, model, "position")
        self.lookup = embedding_lookup(layout)
        self.add = layout(ops.Add(), layout.residual_spec, layout.residual_spec)

    def construct(self, words: Tensor, ids: Tensor) -> Tensor:
        return self.add(words, self.lookup(self.position, ids))

    def cos_sin(self, ids: Tensor) -> tuple[Tensor, ...]:
        """What attention rotates queries and keys by: nothing."""
        return ()


class RotaryPositions(nn.Cell):
    """Rotary position embedding (RoPE): words_TD -> words as they are; positions enter in attention, by `cos_sin`. No
    parameters."""

    def __init__(self, model: ModelConfig, layout: Layout) -> None:
        super().__init__()
        self.angles = RotaryCosSin(layout, model.positions, model.heads, model.hidden // model.heads, model.rope_theta)

    def construct(self, words: Tensor, ids: Tensor) -> Tensor:
        return words

    def cos_sin(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines of every row's angles, for position ids [T] (see `parallel.ops.rotary`)."""
        return ops.stop_gradient(self.angles(ids))
