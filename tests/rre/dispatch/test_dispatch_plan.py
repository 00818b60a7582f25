"""Dispatch plans on the host and in the graph against naive loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor

from parallel.operator_layout import Layout
from rre.dispatch.dispatch_plan import (
    DROPPED,
    DispatchPlan,
    PlanInGraph,
    drop_overflow,
    plan_by_expert,
    plan_in_blocks,
)

LAYOUT = Layout()
EXPERTS = 5


@st.composite
def assignments(draw, most_choices: int = 3):
    tokens, k = draw(st.integers(1, 40)), draw(st.integers(1, most_choices))
    ids = draw(st.lists(st.integers(DROPPED, EXPERTS - 1), min_size=tokens * k, max_size=tokens * k))
    return np.array(ids, np.int64).reshape(tokens, k)


def check_positions(plan: DispatchPlan, ids: np.ndarray) -> None:
    """Every choice stands where its position says: in a slot of its expert, or among the dropped at the end."""
    laid_out = np.concatenate(plan.rows)
    owner = np.concatenate([np.full(r.size, e) for r, e in zip(plan.rows, [*plan.experts, DROPPED], strict=True)])
    position = plan.position.reshape(-1)
    assert len(set(position.tolist())) == position.size
    np.testing.assert_array_equal(laid_out[position], np.arange(ids.size))
    np.testing.assert_array_equal(owner[position], ids.reshape(-1))


@settings(max_examples=80, deadline=None)
@given(ids=assignments())
def test_a_plan_by_expert_holds_every_choice_once_in_token_order(ids):
    plan = plan_by_expert(ids, np.arange(EXPERTS))
    for expert, rows in enumerate(plan.rows[:-1]):
        np.testing.assert_array_equal(rows, np.flatnonzero(ids.reshape(-1) == expert))
    np.testing.assert_array_equal(plan.rows[-1], np.flatnonzero(ids.reshape(-1) == DROPPED))
    np.testing.assert_array_equal(plan.counts, [(ids == e).sum() for e in range(EXPERTS)])
    assert plan.position.shape == ids.shape and {r.dtype for r in plan.rows} == {np.dtype(np.int32)}
    check_positions(plan, ids)


@settings(max_examples=80, deadline=None)
@given(ids=assignments(), block=st.integers(1, 9), spare=st.integers(0, 3))
def test_a_plan_in_blocks_has_slots_of_exactly_one_block_or_nothing(ids, block, spare):
    needed = sum(-(-int((ids == e).sum()) // block) for e in range(EXPERTS))
    plan = plan_in_blocks(ids, needed + spare, block)
    assert plan.counts.tolist() == [block] * needed + [0] * spare
    check_positions(plan, ids)
    if needed:
        with pytest.raises(ValueError, match="do not fit"):
            plan_in_blocks(ids, needed - 1, block)


def naive_overflow(ids: np.ndarray, group_rows: int, capacity: np.ndarray) -> np.ndarray:
    kept = ids.copy()
    for start in range(0, len(ids), group_rows):
        room = capacity.copy()
        for choice in range(ids.shape[1]):
            for token in range(start, min(start + group_rows, len(ids))):
                expert = ids[token, choice]
                if expert < 0:
                    continue
                if room[expert] > 0:
                    room[expert] -= 1
                else:
                    kept[token, choice] = DROPPED
    return kept


@settings(max_examples=120, deadline=None)
@given(ids=assignments(), group_rows=st.integers(1, 41), data=st.data())
def test_overflow_is_dropped_as_a_loop_over_the_tokens_would(ids, group_rows, data):
    capacity = np.array(data.draw(st.lists(st.integers(0, 9), min_size=EXPERTS, max_size=EXPERTS)))
    np.testing.assert_array_equal(
        drop_overflow(ids, group_rows, capacity), naive_overflow(ids, group_rows, capacity)
    )


@pytest.fixture(scope="module")
def in_graph() -> PlanInGraph:
    return PlanInGraph(EXPERTS, LAYOUT)


@pytest.mark.parametrize("kind", ["mixed", "one expert", "all dropped"])
def test_the_plan_made_in_the_graph_is_the_plan_made_on_the_host(in_graph, kind):
    ids = np.random.default_rng(3).integers(0, EXPERTS + 1, (24, 2)).astype(np.int32)
    if kind != "mixed":
        ids[:] = 2 if kind == "one expert" else EXPERTS
    *rows, position = in_graph(Tensor(ids))
    expected = plan_by_expert(np.where(ids == EXPERTS, DROPPED, ids), np.arange(EXPERTS))
    assert len(rows) == EXPERTS + 1
    for choices, expected_choices in zip(rows, expected.rows, strict=True):
        np.testing.assert_array_equal(choices.asnumpy().reshape(-1), expected_choices)
    np.testing.assert_array_equal(position.asnumpy(), expected.position)
