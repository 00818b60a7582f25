"""Capacity dispatch with static shapes equals the ragged one: values and gradients, for every mesh's row order."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from parallel.mesh import Mesh
from parallel.operator_layout import Layout
from rre.dispatch.capacity_dispatch import CapacityExperts, CapacitySpec, plan_by_capacity
from rre.dispatch.dispatch_plan import drop_overflow, plan_by_expert
from rre.experts import RaggedExperts
from rre.feed_forward_spec import FeedForwardSpec

T, D, F, N = 48, 8, 16, 8
MESHES = [
    (Mesh(), 1),
    (Mesh(data=2, expert=2, tensor=2), 2),
    (Mesh(data=3, expert=4, placement="domain", placement_groups=2), 1),
]


class ExpertsLoss(nn.Cell):
    """x, the stacked weights, plan, slopes -> sum of slopes * y; `slots` weights are taken apart where it is not 1."""

    def __init__(self, networks: nn.Cell, slots: int) -> None:
        super().__init__()
        self.networks = networks
        self.slots = slots

    def result(self, x, up, up_bias, down, down_bias, plan):
        if self.slots == 1:
            return self.networks(x, plan, (up, up_bias, down, down_bias))
        weights = ()
        for e in range(self.slots):
            weights = weights + (up[e], up_bias[e], down[e], down_bias[e])
        return self.networks(x, plan, weights)

    def construct(self, x, up, up_bias, down, down_bias, plan, slopes):
        y = self.result(x, up, up_bias, down, down_bias, plan)
        return (y * slopes).sum(), y


@pytest.mark.parametrize(("mesh", "k"), MESHES, ids=str)
def test_static_rows_give_the_ragged_result_and_gradients(mesh, k):
    rng = np.random.default_rng(5)
    shard, of_group = T // mesh.rows, N // mesh.placement_groups
    group_of_token = np.arange(T) // (T // mesh.placement_groups)
    ids = group_of_token[:, None] * of_group + np.stack([rng.permutation(of_group)[:k] for _ in range(T)])
    capacity = max(1, shard // of_group)
    ids = drop_overflow(ids, shard, np.full(N, capacity))
    assert (ids < 0).any()
    x = rng.standard_normal((T, D)).astype(np.float32)
    stacked = [rng.standard_normal(s).astype(np.float32) for s in ((N, D, F), (N, F), (N, F, D), (N, D))]
    slopes = rng.standard_normal((T * k, D)).astype(np.float32)

    plan = plan_by_capacity(ids, CapacitySpec(mesh, N, capacity, T, k))
    static = ExpertsLoss(CapacityExperts(Layout(), FeedForwardSpec("fast_gelu"), ms.float32, mesh), 1)
    static_plan = tuple(Tensor(a) for a in plan.inputs)
    rows = plan_by_expert(ids, np.arange(N))
    ragged = ExpertsLoss(RaggedExperts(Layout(), FeedForwardSpec("fast_gelu"), ms.float32), N)
    ragged_plan = tuple(Tensor(a) for a in (*rows.rows, rows.position))

    inputs = [Tensor(a) for a in (x, *stacked)]
    positions = tuple(range(5))
    both = []
    for scored, its_plan in ((static, static_plan), (ragged, ragged_plan)):
        graph = ops.value_and_grad(scored, positions, None, has_aux=True)
        (_, y), gradients = graph(*inputs, its_plan, Tensor(slopes))
        both.append((y, gradients))
    (y_static, gradients), (expected, expected_gradients) = both
    np.testing.assert_allclose(y_static.asnumpy(), expected.asnumpy(), atol=1e-5)
    used = np.isin(np.arange(N), ids)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        rows = slice(None) if ours.shape == x.shape else used
        np.testing.assert_allclose(ours.asnumpy()[rows], theirs.asnumpy()[rows], atol=1e-4)


def test_rows_outside_the_group_or_beyond_capacity_are_refused():
    mesh = Mesh(expert=2, placement="domain", placement_groups=2)
    ids = np.repeat([0, 2], 4).reshape(-1, 1)
    assert plan_by_capacity(ids, CapacitySpec(mesh, 4, 4, 8)).kept.all()
    with pytest.raises(ValueError, match="row shard 1 has tokens for experts outside its placement group"):
        plan_by_capacity(np.zeros((8, 1), int), CapacitySpec(mesh, 4, 8, 8))
    with pytest.raises(ValueError, match="row shard 0 has 4 rows for a slot that takes 3"):
        plan_by_capacity(ids, CapacitySpec(mesh, 4, 3, 8))


def test_experts_lie_round_their_groups_parts_so_that_a_domain_keeps_all_busy():
    mesh = Mesh(expert=4, placement="domain", placement_groups=2)
    capacity_spec = CapacitySpec(mesh, slots=8, rows=1, tokens=4)
    # Positions 0, 2, 4 and 6 of the first eight experts are the first part's; two of them have rows here.
    assert capacity_spec.slots_of(np.array([0, 1, 6, 7, 8, 13]), total=16).tolist() == [0, 2, 1, 3, 4, 6]
    with pytest.raises(ValueError, match="expert part 0 has 3 experts with rows and 2 slots"):
        capacity_spec.slots_of(np.array([0, 2, 4]), total=16)
    chunked = CapacitySpec(mesh, 8, 1, 4, chunks=2)
    assert chunked.by_chunk().tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert chunked.by_chunk(2).tolist() == [[4], [5]]
    # Every part holds the experts that its slots can stand for, whatever text comes.
    assert [list(mesh.interleaved_experts_of(rank, 16)) for rank in range(4)] == [
        [0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]
    ]  # fmt: skip
    assert capacity_spec.idle_experts(16).tolist() == [0, 0, 1, 1, 8, 8, 9, 9]
