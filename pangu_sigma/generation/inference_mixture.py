"""Adaptive mixture at inference: the top layer and the head of `pangu_sigma.model.layers.mixture_head` for few rows.

Legend: T rows, D hidden width, V vocabulary, E experts of the top layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mindspore as ms
from mindspore import Tensor, nn, ops

from pangu_sigma.config.model_section import ModelConfig
from pangu_sigma.generation.inference_layers import (
    GatedExperts,
    InferenceCell,
    InferenceLayer,
    OutputHead,
    WithSharedExpert,
)
from pangu_sigma.model.layers.mixture_head import MixedLogits
from parallel.operator_layout import Layout
from rre.every_expert_layer import RepeatRows, RowsByExpert
from rre.routers.learned_gate import Gate


class EveryExpert(GatedExperts):
    """All experts of a layer: x_TD -> (every expert's output [E * T, D], expert by expert, log p [T, E])."""

    def __init__(self, gate: Gate, experts: int, model: ModelConfig, layout: Layout, compute: ms.dtype) -> None:
        super().__init__(gate, experts, model, layout, compute)
        self.rows_by_expert = RowsByExpert(layout)

    def construct(self, x: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        y, log_p_TE = self.by_choice(x, inputs)
        return self.rows_by_expert(y, x.shape[0]), log_p_TE


class EveryExpertWithShared(InferenceCell):
    """`EveryExpert` plus the shared expert that every row takes: its output is added to every expert's."""

    def __init__(self, routed: nn.Cell, shared: nn.Cell, layout: Layout) -> None:
        super().__init__()
        self.routed, self.shared = routed, shared
        self.repeat_rows = RepeatRows()
        self.add = layout(ops.Add(), (1, 1), (1, 1))

    def construct(self, x: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        y, log_p_TE = self.routed(x, inputs)
        return self.add(y, self.repeat_rows(self.shared(x, ()), y.shape)), log_p_TE


class InferenceMixtureLayer(InferenceLayer):
    """Transformer layer whose experts stay unmixed: h_TD -> ((h + y_i of every expert [E * T, D], log p [T, E]), new
    keys and values)."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.repeat_rows = RepeatRows()

    def construct(
        self, h: Tensor, query_rows, cos_sin: tuple, context: tuple[Tensor, ...], inputs: tuple[Tensor, ...]
    ):  # fmt: skip
        h, kept = self.attend(h, query_rows, cos_sin, context)
        y, log_p_TE = self.feed_forward(self.norm2(h), inputs)
        return (self.add(self.repeat_rows(h, y.shape), y), log_p_TE), kept


class InferenceMixtureHead(OutputHead):
    """Output head of a mixture: (h of every expert [E * T, D], log p [T, E]) -> log probabilities [T, V]."""

    def __init__(self, norm: nn.Cell | None, tables: int, layout: Layout) -> None:
        super().__init__(norm, tables, layout)
        self.mix = MixedLogits(layout)

    def construct(self, h: tuple[Tensor, Tensor], last, tables: tuple[Tensor, ...]) -> Tensor:
        rows, log_p_TE = h
        tokens, experts = log_p_TE.shape
        logits = ()
        for i in range(experts):
            expert_TD = self.select(rows[i * tokens : (i + 1) * tokens], last)
            logits = logits + (self.logits(expert_TD, tables),)
        return self.mix(logits, log_p_TE if last is None else self.take(log_p_TE, last, 0))


class TopLayerCells(NamedTuple):
    """Classes of the inference cells that depend on a model's top layer: the experts under a learned gate, these beside
    a shared expert, the layer around experts, and the head."""

    gated_experts: type[GatedExperts]
    with_shared_expert: Callable[..., InferenceCell]
    layer: type[InferenceLayer]
    head: type[OutputHead]


def top_layer_cells(model: ModelConfig) -> TopLayerCells:
    """The cells of a competitive mixture, or of every other model."""
    if model.is_competitive_mixture:
        return TopLayerCells(EveryExpert, EveryExpertWithShared, InferenceMixtureLayer, InferenceMixtureHead)
    return TopLayerCells(GatedExperts, WithSharedExpert, InferenceLayer, OutputHead)
