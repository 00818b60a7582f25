"""The sparse layer with two experts per token and combine weights, which no shipped router asks for yet."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from parallel.operator_layout import Layout
from parallel.ops.compiled_kernels import library
from rre.dispatch.dispatch_plan import DROPPED, plan_by_expert
from rre.feed_forward_spec import FeedForwardSpec
from rre.sparse_layer import SparseFeedForward

TOKENS, K, HIDDEN, FFN, EXPERTS = 10, 2, 6, 8, 3


class GivenPlan(nn.Cell):
    """A router's part in the graph: plan and combine weights all come from outside."""

    def construct(self, x, routing):
        return routing[:-1], routing[-1], Tensor(0.0, ms.float32), Tensor([0.0], ms.float32)


class WeightedLayer(nn.Cell):
    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layer = SparseFeedForward(GivenPlan(), layout, FeedForwardSpec("gelu"), ms.float32)

    def construct(self, x, combine, slopes, *flat):
        plan, weights = flat[: -4 * EXPERTS], flat[-4 * EXPERTS :]
        y, _, _ = self.layer(x, plan + (combine,), weights)
        return (y * slopes).sum(), y


def naive(x, combine, ids, weights):
    y = np.zeros((TOKENS, HIDDEN))
    for token in range(TOKENS):
        for choice in range(K):
            if ids[token, choice] == DROPPED:
                continue
            up, up_bias, down, down_bias = weights[ids[token, choice]]
            u = x[token] @ up + up_bias
            inner = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
            y[token] += combine[token, choice] * (inner @ down + down_bias)
    return y


@pytest.mark.parametrize("kernels", ["composed", "compiled"])
def test_two_weighted_experts_per_token_with_dropped_choices_and_their_gradients(kernels):
    layout = Layout(kernels=library() if kernels == "compiled" else None)
    if kernels == "compiled" and layout.kernels is None:
        pytest.skip("no compiled kernels in this installation")
    draw = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape).astype(np.float32)

    ids = draw.integers(DROPPED, EXPERTS, (TOKENS, K))
    ids[4] = DROPPED
    x, combine, slopes = normal(TOKENS, HIDDEN), normal(TOKENS, K), normal(TOKENS, HIDDEN)
    weights = [[normal(HIDDEN, FFN), normal(FFN), normal(FFN, HIDDEN), normal(HIDDEN)] for _ in range(EXPERTS)]
    plan = plan_by_expert(ids, np.arange(EXPERTS))
    step = ops.value_and_grad(WeightedLayer(layout), (0, 1), has_aux=True)
    parts = (plan.order, plan.offsets) if layout.kernels else (*plan.rows, plan.position)
    flat = [Tensor(a) for a in (*parts, *(w for expert in weights for w in expert))]
    (_, y), (dx, dcombine) = step(*(Tensor(a) for a in (x, combine, slopes)), *flat)
    exact = [[w.astype(np.float64) for w in expert] for expert in weights]
    np.testing.assert_allclose(y.asnumpy(), naive(x, combine, ids, exact), rtol=1e-5, atol=1e-5)
    assert (y.asnumpy()[4] == 0).all()
    for which, gradient in enumerate((dx.asnumpy(), dcombine.asnumpy())):
        for entry in np.ndindex(gradient.shape):
            ends = []
            for move in (1e-5, -1e-5):
                inputs = [x.astype(np.float64), combine.astype(np.float64)]
                inputs[which][entry] += move
                ends.append((naive(*inputs, ids, exact) * slopes).sum())
            np.testing.assert_allclose(gradient[entry], (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-4)
