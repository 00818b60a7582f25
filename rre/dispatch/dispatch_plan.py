"""Dispatch plans: which token row goes to which slot (token permutation), made on the host or inside the graph.

A *slot* is one expert computation of a step: a list of row numbers and the weights of one expert. Nothing is padded:
slots have as many rows as their expert was given, an expert without rows computes nothing. Evaluation cuts rows into
blocks of `EXACT_ROWS`, because a product over another number of rows rounds differently: with blocks, a token's result
does not depend on what else is in the batch, nor on how many experts the model stores, which makes an extracted
sub-model the same function bit for bit.

Legend: T tokens, K choices per token (top-k), N slots, E experts.
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
    """Where every (token, choice) goes: made on the host for table routers, inside the graph for learned gates.

    `experts` [N]: the expert of each slot; `rows`: N int32 vectors of choice numbers (token * k + choice), then one
    for the dropped; `position` [T, k]: where a token's results stand among all slots' rows laid end to end, the
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
        """All choices slot by slot, the dropped ones last, int32 [T*k] (without block padding)."""
        return np.concatenate(self.rows)

    @property
    def offsets(self) -> np.ndarray:
        """Where each slot begins and ends in `order`, int32 [N + 1]."""
        return np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int32)


def drop_overflow(expert_ids: np.ndarray, group_rows: int, capacity: np.ndarray) -> np.ndarray:
    """Return `expert_ids` [T, k] with DROPPED where an expert of a dispatch group is full.

    A dispatch group is `group_rows` consecutive tokens; `capacity` [E] is what an expert takes of one group. Rows are
    taken first choice before second, then in token order.
    """
    kept = expert_ids.copy()
    for start in range(0, expert_ids.shape[0], group_rows):
        taken = np.zeros(capacity.size, dtype=np.int64)
        for choice in range(expert_ids.shape[1]):
            ids = expert_ids[start : start + group_rows, choice]
            order = np.argsort(ids, kind="stable")
            ranked = ids[order]
            first = np.searchsorted(ranked, ranked, side="left")
            rank = np.empty(ids.size, dtype=np.int64)
            rank[order] = np.arange(ids.size) - first
            valid = ids >= 0
            full = valid & (taken[ids] + rank >= capacity[ids])
            kept[start : start + group_rows, choice][full] = DROPPED
            np.add.at(taken, ids[valid], 1)
    return kept


def plan_by_expert(expert_ids: np.ndarray, experts: np.ndarray) -> DispatchPlan:
    """One slot for each of `experts` [N] with exactly its rows; `expert_ids` [T, k] may hold DROPPED."""
    tokens, k = expert_ids.shape
    flat = expert_ids.reshape(-1)
    order = np.argsort(flat, kind="stable").astype(np.int64)
    ranked = flat[order]
    starts = np.searchsorted(ranked, experts, side="left")
    ends = np.searchsorted(ranked, experts, side="right")
    rows = [order[a:b] for a, b in zip(starts, ends, strict=True)]
    dropped = order[: np.searchsorted(ranked, 0, side="left")]
    return _finish(experts, [*rows, dropped], tokens, k)


def plan_present(expert_ids: np.ndarray, slots: int) -> DispatchPlan:
    """One slot for each expert that has a row, the rest of `slots` empty: for networks that block rows themselves.

    Raises ValueError if more experts have rows than there are slots.
    """
    present = np.unique(expert_ids[expert_ids >= 0])
    if present.size > slots:
        raise ValueError(f"{present.size} experts with rows do not fit {slots} slots")
    plan = plan_by_expert(expert_ids, present)
    spare = slots - present.size
    empty = np.zeros(0, dtype=np.int32)
    experts = np.concatenate([present, np.full(spare, present[0] if present.size else 0)])
    return DispatchPlan(experts, (*plan.rows[:-1], *([empty] * spare), plan.rows[-1]), plan.position)


def plan_in_blocks(expert_ids: np.ndarray, slots: int, block: int = EXACT_ROWS) -> DispatchPlan:
    """Cut every expert's rows into blocks of exactly `block` rows (the last one filled up with row 0).

    `slots` is how many the graph has; blocks beyond the needed ones are empty. Raises ValueError if there are too few.
    For evaluation only: combine's gradient would count the rows that fill a block up.
    """
    tokens, k = expert_ids.shape
    flat = expert_ids.reshape(-1)
    rows: list[np.ndarray] = []
    owners: list[int] = []
    for expert in np.unique(flat[flat >= 0]):
        mine = np.flatnonzero(flat == expert)
        for start in range(0, mine.size, block):
            rows.append(mine[start : start + block])
            owners.append(int(expert))
    if len(rows) > slots:
        raise ValueError(f"{len(rows)} row blocks do not fit {slots} slots")
    empty = np.zeros(0, dtype=np.int64)
    rows += [empty] * (slots - len(rows))
    owners += [owners[0] if owners else 0] * (slots - len(owners))
    return _finish(np.array(owners), [*rows, np.flatnonzero(flat < 0)], tokens, k, block)


def _finish(experts: np.ndarray, rows: list[np.ndarray], tokens: int, k: int, block: int = 1) -> DispatchPlan:
    position = np.empty(tokens * k, dtype=np.int32)
    padded_rows: list[np.ndarray] = []
    start = 0
    for mine in rows:
        padded = -(-mine.size // block) * block if len(padded_rows) < len(rows) - 1 else mine.size
        position[mine] = start + np.arange(mine.size, dtype=np.int32)
        numbers = np.zeros(padded, dtype=np.int32)
        numbers[: mine.size] = mine
        padded_rows.append(numbers)
        start += padded
    return DispatchPlan(np.asarray(experts), tuple(padded_rows), position.reshape(tokens, k))


class PlanInGraph(nn.Cell):
    """The plan of a learned gate: expert ids int32 [T, k] -> rows of N slots and of the dropped, position [T, k].

    An id of E means dropped. Row vectors have dynamic length, so nothing is padded here either.
    """

    def __init__(self, experts: int, layout: Layout) -> None:
        super().__init__()
        self.experts = experts
        self.find = layout(ops.NonZero(), (1,))
        self.concat = layout(ops.Concat(0))
        self.sort = layout(ops.Sort(), (1,))
        self.equal = layout(ops.Equal(), (1,), ())
        self.cast = layout(ops.Cast(), (1,))

    def construct(self, expert_ids: Tensor) -> tuple[Tensor, ...]:
        tokens, k = expert_ids.shape
        flat = expert_ids.reshape(-1)
        rows = ()
        for expert in range(self.experts + 1):
            found = self.find(self.equal(flat, expert)).reshape(-1)
            rows = rows + (self.cast(found, ms.int32),)
        # The inverse of a permutation is its sort order; float32 sorts exactly up to 2^24 rows.
        _, position = self.sort(self.cast(self.concat(rows), ms.float32))
        return rows + (position.reshape(tokens, k),)


class CompiledPlanInGraph(nn.Cell):
    """The same for compiled networks: expert ids int32 [T, k] -> (order [T*k], offsets [E + 1]), of static shapes."""

    def __init__(self, experts: int, kernels: str) -> None:
        super().__init__()
        self.plan = CompiledPlan(kernels, experts)

    def construct(self, expert_ids: Tensor) -> tuple[Tensor, ...]:
        return self.plan(expert_ids.reshape(-1))


class ExchangedPlanInGraph(nn.Cell):
    """The same where processes hold experts of their own: it plans the choices that come here."""

    def __init__(self, exchange: GatheredExchange, plan: nn.Cell) -> None:
        super().__init__()
        self.exchange, self.plan = exchange, plan

    def construct(self, expert_ids: Tensor) -> tuple[Tensor, ...]:
        return self.plan(self.exchange.choices(expert_ids))


def build_plan_cell(experts: int, layout: Layout, exchange: GatheredExchange | None = None) -> nn.Cell:
    """The cell that plans a learned gate's dispatch in the form that this layout's networks take.

    `experts` of the layer, of which `exchange` says how many are held here.
    """
    held = experts if exchange is None else exchange.num_local_experts
    plan = CompiledPlanInGraph(held, layout.kernels) if layout.kernels else PlanInGraph(held, layout)
    return plan if exchange is None else ExchangedPlanInGraph(exchange, plan)
