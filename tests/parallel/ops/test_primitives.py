"""Every primitive against NumPy float64: its value, and its own gradient against finite differences."""

import math
from collections.abc import Callable, Sequence

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from parallel.operator_layout import Layout
from parallel.ops.primitives import (
    EmbeddingLookup,
    LayerNorm,
    Linear,
    Product,
    RmsNorm,
    TiedCrossEntropy,
    activation,
)  # fmt: skip
from parallel.ops.primitives import layer_norm as layer_norm_of

LAYOUT = Layout()
NATIVE = Layout("Ascend")  # its fused operators exist on CPU too, only slower


class WeightedOutput(nn.Cell):
    """sum(out * weights) of a primitive's result, so that every entry of its gradient is asked for."""

    def __init__(self, cell: nn.Cell, takes_first: bool) -> None:
        super().__init__()
        self.cell = cell
        self.takes_first = takes_first

    def construct(self, weights: Tensor, *inputs: Tensor):
        out = self.cell(*inputs)
        if self.takes_first:
            out = out[0]
        return (out * weights).sum(), out


def value_and_gradients(
    cell: nn.Cell, inputs: Sequence[np.ndarray], weights: np.ndarray, differentiated: tuple[int, ...]
):
    takes_first = not isinstance(cell, Linear | Product | EmbeddingLookup)
    step = ops.value_and_grad(WeightedOutput(cell, takes_first), tuple(i + 1 for i in differentiated), has_aux=True)
    (_, out), gradients = step(Tensor(weights), *(Tensor(a) for a in inputs))
    # Of a single input MindSpore hands the gradient over as it is.
    return out.asnumpy(), [g.asnumpy() for g in (gradients if isinstance(gradients, tuple) else (gradients,))]


def finite_differences(
    reference: Callable[..., np.ndarray], inputs: Sequence[np.ndarray], weights: np.ndarray, which: int
) -> np.ndarray:
    exact = [a.astype(np.float64) if a.dtype == np.float32 else a for a in inputs]
    gradient = np.zeros(inputs[which].shape)
    for entry in np.ndindex(gradient.shape):
        values = []
        for move in (1e-5, -1e-5):
            changed = exact[which].copy()
            changed[entry] += move
            moved = [*exact[:which], changed, *exact[which + 1 :]]
            values.append(float((reference(*moved) * weights.astype(np.float64)).sum()))
        gradient[entry] = (values[0] - values[1]) / 2e-5
    return gradient


def check(cell: nn.Cell, reference, inputs, differentiated, tolerance: float = 2e-6) -> None:
    expected = reference(*(a.astype(np.float64) if a.dtype == np.float32 else a for a in inputs))
    weights = np.random.default_rng(1).standard_normal(expected.shape).astype(np.float32)
    out, gradients = value_and_gradients(cell, inputs, weights, differentiated)
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    for which, gradient in zip(differentiated, gradients, strict=True):
        wished = finite_differences(reference, inputs, weights, which)
        np.testing.assert_allclose(gradient, wished, rtol=tolerance, atol=tolerance * np.abs(wished).max())


def normal(*shape: int, std: float = 1.0, seed: int = 0) -> np.ndarray:
    return (std * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def linear(x, w, b):
    return x @ w + b


def fast_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x, gamma, beta):
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * gamma + beta


def cross_entropy(h, table, labels):
    logits = h @ table.T
    top = logits.max(1, keepdims=True)
    return (np.log(np.exp(logits - top).sum(1)) + top[:, 0]) - logits[np.arange(len(labels)), labels]


def test_linear():
    check(Linear(LAYOUT), linear, [normal(7, 5), normal(5, 6, seed=1), normal(6, seed=2)], (0, 1, 2))


def test_linear_in_float16_stays_within_its_rounding_and_returns_float32():
    inputs = [normal(7, 5), normal(5, 6, seed=1), normal(6, seed=2)]
    check(Linear(LAYOUT, ms.float16), linear, inputs, (0, 1, 2), tolerance=2e-3)
    weights = normal(7, 6, seed=3)
    out, gradients = value_and_gradients(Linear(LAYOUT, ms.float16), inputs, weights, (0, 1, 2))
    assert {a.dtype for a in (out, *gradients)} == {np.dtype(np.float32)}
    # The bias takes part in float32: neither its addition nor its gradient is rounded to 16 bits.
    np.testing.assert_allclose(gradients[2], weights.sum(0), rtol=1e-6)


def test_linear_over_a_number_of_rows_that_is_known_only_when_it_runs():
    class Gradient(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.step = ops.value_and_grad(WeightedOutput(Linear(LAYOUT), False), (1, 2, 3), has_aux=True)

        def construct(self, weights, x, w, b):
            return self.step(weights, x, w, b)

    cell = Gradient()
    real = ms.float32
    cell.set_inputs(
        Tensor(shape=[None, 6], dtype=real), Tensor(shape=[None, 5], dtype=real), Tensor(shape=[5, 6], dtype=real),
        Tensor(shape=[6], dtype=real),
    )  # fmt: skip
    w, b = normal(5, 6, seed=1), normal(6, seed=2)
    for rows in (9, 1, 4):
        x, weights = normal(rows, 5, seed=rows), normal(rows, 6, seed=rows + 1)
        (_, out), (dx, dw, db) = cell(*(Tensor(a) for a in (weights, x, w, b)))
        np.testing.assert_allclose(out.asnumpy(), x @ w + b, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dx.asnumpy(), weights @ w.T, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dw.asnumpy(), x.T @ weights, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(db.asnumpy(), weights.sum(0), rtol=1e-5, atol=1e-5)
    # Without rows the gradients of weight and bias are undefined: products over nothing.
    (_, out), (dx, _, _) = cell(*(Tensor(a) for a in (weights[:0], x[:0], w, b)))
    assert out.shape == (0, 6) and dx.shape == (0, 5)


# Several tail lengths, because CPU kernels work in vectors; around 5 the CPU's own Tanh is off by 1e-4.
POINTS = np.concatenate([np.linspace(-12, 12, 97), [0.0, 1e-4, -5.0, 5.0]]).astype(np.float32)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("cell, reference", [("fast_gelu", fast_gelu), ("gelu", gelu), ("silu", silu)])
@pytest.mark.parametrize("points", [POINTS.reshape(1, -1), POINTS[40:54].reshape(2, 7)])
def test_activations(cell, reference, points):
    check(activation(cell, LAYOUT), reference, [points], (0,))


def test_layer_norm():
    inputs = [normal(6, 16, std=3) + 2, normal(16, seed=1) + 1, normal(16, seed=2)]
    check(LayerNorm(LAYOUT, 1e-5), layer_norm, inputs, (0, 1, 2), tolerance=5e-6)


def test_a_product():
    inputs = [normal(7, 5), normal(5, 6, seed=1)]
    check(Product(LAYOUT), lambda x, w: x @ w, inputs, (0, 1))
    check(Product(LAYOUT, ms.float16), lambda x, w: x @ w, inputs, (0, 1), tolerance=2e-3)


def rms_norm(x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gamma


def test_rms_norm():
    inputs = [normal(6, 16, std=3) + 2, normal(16, seed=1) + 1]
    check(RmsNorm(LAYOUT, 1e-5), rms_norm, inputs, (0, 1), tolerance=5e-6)


@pytest.mark.parametrize("name, reference", [("fast_gelu", fast_gelu), ("gelu", gelu), ("silu", silu)])
def test_the_native_form_of_an_activation_is_the_same_function(name, reference):
    # The CPU's own tanh form is off by 1e-4, which is one reason for composing it.
    tolerance = 2e-4 if name == "gelu" else 1e-5
    check(activation(name, NATIVE), reference, [POINTS[40:54].reshape(2, 7)], (0,), tolerance)


def test_the_native_layer_norm_is_the_same_function():
    inputs = [normal(6, 16, std=3) + 2, normal(16, seed=1) + 1, normal(16, seed=2)]
    check(layer_norm_of(NATIVE, 1e-5), layer_norm, inputs, (0, 1, 2), tolerance=2e-5)


def test_layer_norm_of_a_large_common_part_keeps_its_digits():
    x = normal(4, 64) + 300
    out, _ = value_and_gradients(
        LayerNorm(LAYOUT, 1e-5), [x, np.ones(64, np.float32), np.zeros(64, np.float32)], normal(4, 64), (0,)
    )
    expected = layer_norm(x.astype(np.float64), 1.0, 0.0)
    np.testing.assert_allclose(out, expected, atol=1e-3)


def test_tied_cross_entropy():
    labels = np.array([0, 3, 3, 9, 5], np.int32)  # a repeated label: its rows of the table's gradient add up
    check(TiedCrossEntropy(LAYOUT), cross_entropy, [normal(5, 8), normal(10, 8, seed=1), labels], (0, 1), 5e-6)


def test_tied_cross_entropy_saturates_and_never_hides_what_is_not_finite():
    h, table = normal(4, 8), normal(10, 8, seed=1)
    labels = np.array([0, 1, 2, 3], np.int32)
    table[0] = -100 * h[0]
    table[4] = 100 * h[0]
    losses, _ = value_and_gradients(TiedCrossEntropy(LAYOUT), [h, table, labels], np.ones(4, np.float32), (0,))
    assert 80 < losses[0] < 90
    for bad in (np.nan, np.inf):
        h[2, 3] = bad
        losses, gradients = value_and_gradients(
            TiedCrossEntropy(LAYOUT), [h, table, labels], np.ones(4, np.float32), (0,)
        )
        assert np.isfinite(losses[[1, 3]]).all()
        assert np.isnan(losses[2]) or bad == np.inf  # an infinite logit leaves the label probability 0: 85 nats
        assert not np.isfinite(gradients[0][2]).all()


def test_embedding_lookup_adds_up_the_rows_of_a_repeated_id():
    ids = np.array([2, 0, 2, 2, 4], np.int32)
    check(EmbeddingLookup(LAYOUT), lambda table, i: table[i], [normal(6, 3), ids], (0,))


def test_a_layout_of_one_device_returns_the_primitive_itself():
    product = ops.MatMul()
    assert LAYOUT(product, (1, "tensor"), ("tensor", 1)) is product
    assert not LAYOUT.native and Layout("Ascend").native


def test_the_exchange_of_one_process_moves_nothing():
    from parallel.comm.exchange import LocalExchange

    rows = (Tensor(normal(2, 3)), Tensor(normal(0, 3)))
    assert LocalExchange().to_experts(rows) is rows
    assert LocalExchange().to_tokens(rows) is rows
