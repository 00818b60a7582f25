"""Token dispatch and combine with their gradients against a naive loop."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from parallel.operator_layout import Layout
from rre.dispatch.dispatch_plan import DROPPED, plan_by_expert
from rre.dispatch.expert_dispatch import TokenCombine, TokenDispatch

LAYOUT = Layout()
EXPERTS = 5


class DispatchThenCombine(nn.Cell):
    """sum over choices of (scale of the slot * dispatched row) weighted: linear in x, with known slopes."""

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.dispatch, self.combine = TokenDispatch(LAYOUT), TokenCombine(LAYOUT)
        self.slots = slots

    def construct(self, x, weights, scales, position, *rows):
        sent = self.dispatch(x, rows, position)
        results = ()
        for slot in range(self.slots):
            results = results + (sent[slot] * scales[slot],)
        y = self.combine(results, rows, position, x)
        return (y * weights).sum(), y, sent


class DispatchGradients(nn.Cell):
    def __init__(self, slots: int, tokens: int, k: int, width: int) -> None:
        super().__init__()
        self.step = ops.value_and_grad(DispatchThenCombine(slots), (0, 2), has_aux=True)
        integer, real = ms.int32, ms.float32
        self.set_inputs(
            Tensor(shape=[tokens, width], dtype=real), Tensor(shape=[tokens * k, width], dtype=real),
            Tensor(shape=[slots], dtype=real), Tensor(shape=[tokens, k], dtype=integer),
            *[Tensor(shape=[None], dtype=integer) for _ in range(slots + 1)],
        )  # fmt: skip

    def construct(self, *inputs):
        return self.step(*inputs)


TOKENS, WIDTH = 12, 4


@pytest.fixture(scope="module", params=[1, 2])
def there_and_back(request):
    return request.param, DispatchGradients(EXPERTS, TOKENS, request.param, WIDTH)


@pytest.mark.parametrize("kind", ["mixed", "none dropped", "one expert", "all dropped"])
def test_dispatch_and_combine_with_their_gradients(there_and_back, kind):
    k, cell = there_and_back
    draw = np.random.default_rng(4)
    ids = draw.integers(DROPPED if kind == "mixed" else 0, EXPERTS, (TOKENS, k))
    if kind == "one expert":
        ids[:] = 3
    elif kind == "all dropped":
        ids[:] = DROPPED
    plan = plan_by_expert(ids, np.arange(EXPERTS))
    x = draw.standard_normal((TOKENS, WIDTH)).astype(np.float32)
    weights = draw.standard_normal((TOKENS * k, WIDTH)).astype(np.float32)
    scales = np.arange(2, 2 + EXPERTS).astype(np.float32)
    (_, y, sent), (dx, dscales) = cell(
        *(Tensor(a) for a in (x, weights, scales)), Tensor(plan.position), *(Tensor(r) for r in plan.rows)
    )
    # The naive loop.
    expected = np.zeros((TOKENS * k, WIDTH))
    expected_dx, expected_dscales = np.zeros((TOKENS, WIDTH)), np.zeros(EXPERTS)
    for token in range(TOKENS):
        for choice in range(k):
            expert, row = ids[token, choice], token * k + choice
            if expert != DROPPED:
                expected[row] = scales[expert] * x[token]
                expected_dx[token] += scales[expert] * weights[row]
                expected_dscales[expert] += (weights[row] * x[token]).sum()
    np.testing.assert_allclose(y.asnumpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(dx.asnumpy(), expected_dx, rtol=1e-5, atol=1e-5)
    # Sums over the rows of a slot without rows are undefined, and nobody may look at them.
    some = plan.counts > 0
    np.testing.assert_allclose(dscales.asnumpy()[some], expected_dscales[some], rtol=1e-5, atol=1e-5)
    for expert, rows in enumerate(sent):
        np.testing.assert_array_equal(rows.asnumpy(), x[np.flatnonzero((ids == expert).reshape(-1)) // k])
