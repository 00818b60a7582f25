"""With row blocks a token's expert output is the same to the bit, whatever else is in the batch or stored."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from parallel.operator_layout import Layout
from rre.dispatch.dispatch_plan import EXACT_ROWS, plan_in_blocks
from rre.dispatch.expert_dispatch import TokenCombine, TokenDispatch
from rre.experts import Experts
from rre.feed_forward_spec import FeedForwardSpec

HIDDEN, FFN, SLOTS, EXPERTS = 48, 100, 9, 7
FORM = FeedForwardSpec("fast_gelu")


class Sparse(nn.Cell):
    """Dispatch, experts and combine of a graph with a fixed number of slots."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        layout = Layout()
        self.dispatch, self.combine = TokenDispatch(layout), TokenCombine(layout)
        self.experts = Experts(layout, FORM, ms.float32)
        float32, int32 = ms.float32, ms.int32
        weights = [
            Tensor(shape=list(s), dtype=float32) for _ in range(SLOTS) for s in FORM.shapes(HIDDEN, FFN).values()
        ]
        rows = [Tensor(shape=[None], dtype=int32) for _ in range(SLOTS + 1)]
        self.set_inputs(
            Tensor(shape=[tokens, HIDDEN], dtype=float32), Tensor(shape=[tokens, 1], dtype=int32), *rows, *weights
        )

    def construct(self, x, position, *flat):
        rows, weights = flat[: SLOTS + 1], flat[SLOTS + 1 :]
        return self.combine(self.experts(self.dispatch(x, rows, position), weights), rows, position, x)


TOKENS = 150


@pytest.fixture(scope="module")
def sparse() -> Sparse:
    return Sparse(TOKENS)


@pytest.fixture(scope="module")
def weights() -> list[list[np.ndarray]]:
    draw = np.random.default_rng(1)
    shapes = FORM.shapes(HIDDEN, FFN).values()
    return [[draw.standard_normal(s).astype(np.float32) * 0.2 for s in shapes] for _ in range(EXPERTS)]


def run(sparse: Sparse, x: np.ndarray, ids: np.ndarray, weights) -> np.ndarray:
    plan = plan_in_blocks(ids.reshape(-1, 1), SLOTS)
    flat = [*(Tensor(r) for r in plan.rows), *(Tensor(w) for e in plan.experts for w in weights[e])]
    return sparse(Tensor(x), Tensor(plan.position), *flat).asnumpy()


def test_a_tokens_result_does_not_depend_on_the_rest_of_the_batch(sparse, weights):
    draw = np.random.default_rng(2)
    token = draw.standard_normal(HIDDEN).astype(np.float32)
    results = []
    for trial in range(12):
        x = draw.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
        # From alone in its expert's block to one among all.
        ids = draw.integers(0, 6, TOKENS) if trial % 3 else np.full(TOKENS, 4)
        ids[ids == 4] = 4 if trial % 2 else 3
        position = int(draw.integers(TOKENS))
        x[position], ids[position] = token, 4
        results.append(run(sparse, x, ids, weights)[position])
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    up, up_bias, down, down_bias = (w.astype(np.float64) for w in weights[4])
    inner = token @ up + up_bias
    np.testing.assert_allclose(
        results[0], inner / (1 + np.exp(-1.702 * inner)) @ down + down_bias, rtol=1e-4, atol=1e-5
    )


def test_nor_on_how_many_experts_are_stored_or_where(sparse, weights):
    draw = np.random.default_rng(3)
    x = draw.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
    own = draw.integers(0, 2, TOKENS)
    few = run(sparse, x, own, weights[5:7])
    many = run(sparse, x, own + 5, weights)
    np.testing.assert_array_equal(few, many)


def test_all_tokens_may_go_to_one_expert_and_none_is_dropped(sparse, weights):
    x = np.random.default_rng(4).standard_normal((TOKENS, HIDDEN)).astype(np.float32)
    plan = plan_in_blocks(np.full((TOKENS, 1), 2), SLOTS)
    assert plan.counts.sum() == -(-TOKENS // EXACT_ROWS) * EXACT_ROWS and plan.rows[-1].size == 0
    result = run(sparse, x, np.full(TOKENS, 2), weights)
    up, up_bias, down, down_bias = (w.astype(np.float64) for w in weights[2])
    inner = x @ up + up_bias
    np.testing.assert_allclose(result, inner / (1 + np.exp(-1.702 * inner)) @ down + down_bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inner, outer", [(16, 64), (64, 16), (100, 77), (512, 2048), (2048, 512)])
def test_a_row_of_a_block_is_the_same_at_every_place_of_the_block(inner, outer):
    """What the two promises above rest on, at sizes of real models too."""
    from mindspore import ops

    draw = np.random.default_rng(5)
    x = draw.standard_normal((EXACT_ROWS, inner)).astype(np.float32)
    w = Tensor(draw.standard_normal((inner, outer)).astype(np.float32))
    product = ops.MatMul()
    order = draw.permutation(EXACT_ROWS)
    straight = product(Tensor(x), w).asnumpy()
    np.testing.assert_array_equal(product(Tensor(np.ascontiguousarray(x[order])), w).asnumpy(), straight[order])
    others = draw.standard_normal(x.shape).astype(np.float32)
    others[63] = x[0]
    np.testing.assert_array_equal(product(Tensor(others), w).asnumpy()[63], straight[0])
