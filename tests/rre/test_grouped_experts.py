"""One grouped product is the ragged computation of the same experts, in values and gradients."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from parallel.operator_layout import Layout
from parallel.ops.grouped_matmul import uses_grouped_product
from rre.dispatch.dispatch_plan import plan_by_expert
from rre.experts import RaggedExperts
from rre.feed_forward_spec import FeedForwardSpec
from rre.grouped_experts import GroupedExperts

T, D, F, N = 24, 8, 16, 4
FORMS = [
    FeedForwardSpec("fast_gelu"),
    FeedForwardSpec("silu", gated=True, biases=False),
    FeedForwardSpec("gelu", biases=False),
]


class GroupedExpertsLoss(nn.Cell):
    """x, slopes, plan and weights -> sum of slopes * y, y; as a caller that keeps dropped rows at 0 sees them."""

    def __init__(self, networks: nn.Cell, plan: int) -> None:
        super().__init__()
        self.networks, self.plan = networks, plan

    def construct(self, x, slopes, *inputs):
        y = self.networks(x, inputs[: self.plan], inputs[self.plan :])
        return (y * slopes).sum(), y


@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(f.tensors))
def test_a_grouped_product_is_the_ragged_one(form):
    rng = np.random.default_rng(3)
    # The third expert is idle; a few rows are dropped.
    ids = rng.choice([0, 1, 3], T).reshape(-1, 1)
    ids[[2, 11]] = -1
    plan = plan_by_expert(ids, np.arange(N))
    x, slopes = (rng.standard_normal((T, D)).astype(np.float32) for _ in range(2))
    weights = [rng.standard_normal(s).astype(np.float32) for _ in range(N) for s in form.shapes(D, F).values()]
    results = []
    for cell, parts in (
        (GroupedExperts(Layout(grouped=True), form, ms.float32), (plan.order, plan.offsets)),
        (RaggedExperts(Layout(), form, ms.float32), (*plan.rows, plan.position)),
    ):
        positions = (0, *range(2 + len(parts), 2 + len(parts) + len(weights)))
        graph = ops.value_and_grad(GroupedExpertsLoss(cell, len(parts)), positions, None, has_aux=True)
        (_, y), gradients = graph(*(Tensor(a) for a in (x, slopes, *parts, *weights)))
        results.append((y.asnumpy(), [g.asnumpy() for g in gradients]))
    (y, ours), (expected, theirs) = results
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert not y[[2, 11]].any()
    idle = range(1 + 2 * len(form.tensors), 1 + 3 * len(form.tensors))
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        # What the ragged form says of an idle expert is nobody's to read.
        np.testing.assert_allclose(a, np.zeros_like(a) if index in idle else b, atol=1e-4, err_msg=str(index))


def test_only_ascends_two_byte_types_have_the_operator():
    assert uses_grouped_product("Ascend", ms.float16) and uses_grouped_product("Ascend", ms.bfloat16)
    assert not uses_grouped_product("Ascend", ms.float32) and not uses_grouped_product("CPU", ms.float16)
