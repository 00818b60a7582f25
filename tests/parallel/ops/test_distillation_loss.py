"""Cross-entropy and divergence of one set of logits: values and gradients as PyTorch has them in float64."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from parallel.operator_layout import Layout
from parallel.ops.distillation_loss import TiedCrossEntropyAgainst

torch = pytest.importorskip("torch", reason="PyTorch is the reference")

ROWS, HIDDEN, VOCAB = 7, 5, 11


class WeightedLosses(nn.Cell):
    """Both outputs, each entry with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = TiedCrossEntropyAgainst(Layout())

    def construct(self, a: Tensor, b: Tensor, h: Tensor, table: Tensor, labels: Tensor, previous: Tensor):
        losses, divergence, _, _ = self.cell(h, table, labels, previous)
        return (losses * a).sum() + (divergence * b).sum(), losses, divergence


@pytest.fixture(scope="module")
def compiled():
    return ops.value_and_grad(WeightedLosses(), (2, 3), has_aux=True)


def drawn(spread: float):
    draw = np.random.default_rng(3)
    real = [draw.random(ROWS), draw.random(ROWS), draw.standard_normal((ROWS, HIDDEN)) * spread,
            draw.standard_normal((VOCAB, HIDDEN))]  # fmt: skip
    a, b, h, table = (x.astype(np.float32) for x in real)
    a[2] = b[4] = 0.0
    labels = draw.integers(0, VOCAB, ROWS).astype(np.int32)
    return a, b, h, table, labels, (draw.standard_normal((ROWS, VOCAB)) * spread).astype(np.float32)


@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
def test_values_and_gradients_are_pytorchs(compiled, spread):
    given = drawn(spread)
    (total, losses, divergence), (dh, dtable) = compiled(*map(Tensor, given))
    a, b, h, table, labels, previous = (torch.tensor(x, dtype=torch.float64 if x.dtype == np.float32 else torch.long)
                                        for x in given)  # fmt: skip
    h.requires_grad_(), table.requires_grad_()
    log_p = torch.log_softmax(h @ table.T, -1)
    expected = torch.nn.functional.nll_loss(log_p, labels, reduction="none")
    log_q = torch.log_softmax(previous, -1)
    kl = torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    objective = (expected * a).sum() + (kl * b).sum()
    objective.backward()
    np.testing.assert_allclose(losses.asnumpy(), expected.detach(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(divergence.asnumpy(), kl.detach(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(float(total.asnumpy()), float(objective), rtol=1e-5)
    for gradient, reference in ((dh, h.grad), (dtable, table.grad)):
        np.testing.assert_allclose(gradient.asnumpy(), reference, rtol=1e-4, atol=1e-5)


def test_a_model_does_not_diverge_from_itself(compiled):
    a, b, h, table, labels, _ = drawn(1.0)
    (_, _, divergence), (dh, dtable) = compiled(*map(Tensor, (0 * a, b, h, table, labels, h @ table.T)))
    assert abs(divergence.asnumpy()).max() < 1e-6
    assert max(abs(dh.asnumpy()).max(), abs(dtable.asnumpy()).max()) < 1e-6


def test_a_number_that_is_none_stays_visible(compiled):
    a, b, h, table, labels, previous = drawn(1.0)
    h[0, 0] = np.nan
    (total, _, _), _ = compiled(*map(Tensor, (a, b, h, table, labels, previous)))
    assert not np.isfinite(float(total.asnumpy()))
    assert ms.float32 == total.dtype
