"""Dispatch plans: which token row goes to which slot (token permutation), made on the host or inside the graph.

A *slot* is one expert computation of a step: a list of row numbers and the weights of one expert. Nothing is padded:
slots have as many rows as their expert was given, an expert without rows computes nothing. Evaluation cuts rows into
blocks of `EXACT_ROWS`, because a product over another number of rows rounds differently: with blocks, a token's result
does not depend on what else is in the batch, nor on how many experts the model stores, which makes an extracted
sub-model the same function bit for bit.

Legend: T tokens, K choices per token (top-k), R = T K rows (one per choice), N slots, E experts, S tokens of a dispatch
group.
"""

from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from parallel.comm.exchange import GatheredExchange
from parallel.operator_layout import Layout
from parallel.ops.compiled_kernels import CompiledPlan

EXACT_ROWS = 64
DROPPED = -1


@dataclass(frozen=True)
class DispatchPlan:
    """Token permutation of one step on the host: which choices each slot computes, and where their results stand.

    `experts` [N]: the expert of each slot; `rows`: N int32 vectors of choice numbers (token * K + choice), then one
    for the dropped; `position` [T, K]: where a token's results stand among all slots' rows laid end to end, the
    dropped ones last.
    """

    experts: np.ndarray
    rows: tuple[np.ndarray, ...]
    position: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Rows per slot, int64 [N] (block padding included)."""
        return np.array([r.size for r in self.rows[:-1]], dtype=np.int64)

    @property
    def order(self) -> np.ndarray:
        """All choices slot by slot, the dropped ones last, int32 [R] (without block padding)."""
        return np.concatenate(self.rows)

    @property
    def offsets(self) -> np.ndarray:
        """Where each slot begins and ends in `order`, int32 [N + 1]."""
        return np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int32)


def drop_overflow(expert_ids_TK: np.ndarray, group_rows: int, capacity_E: np.ndarray) -> np.ndarray:
    """Apply expert capacity: `expert_ids_TK` with DROPPED where an expert of a dispatch group is full.

    A dispatch group is `group_rows` consecutive tokens; `capacity_E` is what an expert takes of one group. Rows are
    taken first choice before second, then in token order.
    """
    kept_TK = expert_ids_TK.copy()
    for start in range(0, expert_ids_TK.shape[0], group_rows):
        taken_E = np.zeros(capacity_E.size, dtype=np.int64)
        for choice in range(expert_ids_TK.shape[1]):
            ids_S = expert_ids_TK[start : start + group_rows, choice]
            order_S = np.argsort(ids_S, kind="stable")
            ranked_S = ids_S[order_S]
            first_S = np.searchsorted(ranked_S, ranked_S, side="left")
            rank_S = np.empty(ids_S.size, dtype=np.int64)
            rank_S[order_S] = np.arange(ids_S.size) - first_S
            valid_S = ids_S >= 0
            full_S = valid_S & (taken_E[ids_S] + rank_S >= capacity_E[ids_S])
            kept_TK[start : start + group_rows, choice][full_S] = DROPPED
            np.add.at(taken_E, ids_S[valid_S], 1)
    return kept_TK


def plan_by_expert(expert_ids_TK: np.ndarray, experts_N: np.ndarray) -> DispatchPlan:
    """Dropless plan: one slot for each of `experts_N` with exactly its rows; `expert_ids_TK` may hold DROPPED."""
    tokens, num_choices = expert_ids_TK.shape
    flat_R = expert_ids_TK.reshape(-1)
    order_R = np.argsort(flat_R, kind="stable").astype(np.int64)
    ranked_R = flat_R[order_R]
    starts_N = np.searchsorted(ranked_R, experts_N, side="left")
    ends_N = np.searchsorted(ranked_R, experts_N, side="right")
    rows = [order_R[a:b] for a, b in zip(starts_N, ends_N, strict=True)]
    dropped = order_R[: np.searchsorted(ranked_R, 0, side="left")]
    return _build_plan(experts_N, [*rows, dropped], tokens, num_choices)


def plan_present(expert_ids_TK: np.ndarray, slots: int) -> DispatchPlan:
    """Dropless plan of the experts that have rows, one slot each, the rest of `slots` empty: for compiled experts,
    which cut rows into blocks themselves.

    Raises ValueError if more experts have rows than there are slots.
    """
    present = np.unique(expert_ids_TK[expert_ids_TK >= 0])
    if present.size > slots:
        raise ValueError(f"{present.size} experts with rows do not fit {slots} slots")
    plan = plan_by_expert(expert_ids_TK, present)
    spare = slots - present.size
    empty = np.zeros(0, dtype=np.int32)
    experts_N = np.concatenate([present, np.full(spare, present[0] if present.size else 0)])
    return DispatchPlan(experts_N, (*plan.rows[:-1], *([empty] * spare), plan.rows[-1]), plan.position)


def plan_in_blocks(expert_ids_TK: np.ndarray, slots: int, block: int = EXACT_ROWS) -> DispatchPlan:
    """Dropless plan in row blocks: every expert's rows in slots of exactly `block` rows, the last filled with row 0.

    `slots` is how many the graph has; blocks beyond the needed ones are empty. Raises ValueError if there are too few.
    For evaluation only: combine's gradient would count the rows that fill a block up.
    """
    tokens, num_choices = expert_ids_TK.shape
    flat_R = expert_ids_TK.reshape(-1)
    rows: list[np.ndarray] = []
    owners: list[int] = []
    for expert in np.unique(flat_R[flat_R >= 0]):
        choices = np.flatnonzero(flat_R == expert)
        for start in range(0, choices.size, block):
            rows.append(choices[start : start + block])
            owners.append(int(expert))
    if len(rows) > slots:
        raise ValueError(f"{len(rows)} row blocks do not fit {slots} slots")
    empty = np.zeros(0, dtype=np.int64)
    rows += [empty] * (slots - len(rows))
    owners += [owners[0] if owners else 0] * (slots - len(owners))
    return _build_plan(np.array(owners), [*rows, np.flatnonzero(flat_R < 0)], tokens, num_choices, block)


def _build_plan(
    experts_N: np.ndarray, rows: list[np.ndarray], tokens: int, num_choices: int, block: int = 1
) -> DispatchPlan:
    """The plan of slots with these choice numbers (the dropped last), each padded to whole blocks."""
    position_R = np.empty(tokens * num_choices, dtype=np.int32)
    padded_rows: list[np.ndarray] = []
    start = 0
    for choices in rows:
        is_dropped = len(padded_rows) == len(rows) - 1
        padded = choices.size if is_dropped else -(-choices.size // block) * block
        position_R[choices] = start + np.arange(choices.size, dtype=np.int32)
        padded_choices = np.zeros(padded, dtype=np.int32)
        padded_choices[: choices.size] = choices
        padded_rows.append(padded_choices)
        start += padded
    return DispatchPlan(np.asarray(experts_N), tuple(padded_rows), position_R.reshape(tokens, num_choices))


class PlanInGraph(nn.Cell):
    """Dispatch plan in the graph: expert ids int32 [T, K] -> rows of E slots and of the dropped, position [T, K].

    It is what a learned gate's choices need. An id of E means dropped. Row vectors have dynamic length, so nothing is
    padded here either.
    """

    def __init__(self, experts: int, layout: Layout) -> None:
        super().__init__()
        self.experts = experts
        self.find = layout(ops.NonZero(), (1,))
        self.concat = layout(ops.Concat(0))
        self.sort = layout(ops.Sort(), (1,))
        self.equal = layout(ops.Equal(), (1,), ())
        self.cast = layout(ops.Cast(), (1,))

    def construct(self, expert_ids_TK: Tensor) -> tuple[Tensor, ...]:
        tokens, num_choices = expert_ids_TK.shape
        flat_R = expert_ids_TK.reshape(-1)
        rows = ()
        for expert in range(self.experts + 1):
            choices = self.find(self.equal(flat_R, expert)).reshape(-1)
            rows = rows + (self.cast(choices, ms.int32),)
        # The inverse of a permutation is its sort order; float32 sorts exactly up to 2^24 rows.
        _, position_R = self.sort(self.cast(self.concat(rows), ms.float32))
        return rows + (position_R.reshape(tokens, num_choices),)


class ExchangedPlanInGraph(nn.Cell):
    """Dispatch plan in the graph under expert parallelism: plans the choices of all processes for local experts."""

    def __init__(self, exchange: GatheredExchange, plan: nn.Cell) -> None:
        super().__init__()
        self.exchange, self.plan = exchange, plan

    def construct(self, expert_ids_TK: Tensor) -> tuple[Tensor, ...]:
        return self.plan(self.exchange.choices(expert_ids_TK))


def build_plan_cell(experts: int, layout: Layout, exchange: GatheredExchange | None = None) -> nn.Cell:
    """Build the cell that plans a learned gate's dispatch in the form that this layout's experts take.

    `experts` is their number in the layer; `exchange` knows how many of them are local.
    """
    num_local_experts = experts if exchange is None else exchange.num_local_experts
    kernels = layout.kernels
    plan = CompiledPlan(kernels, num_local_experts) if kernels else PlanInGraph(num_local_experts, layout)
    return plan if exchange is None else ExchangedPlanInGraph(exchange, plan)
