"""Device-aware primitives: native operators on Ascend, compositions that are fast on CPU, one gradient for both.

Each cell here is one operation with its own gradient, because on CPU the automatic one takes slow kernels (the
gradients of BiasAdd, GeLU, LayerNorm and Softmax cost several times their forward pass there). A cell that needs an
intermediate result in its gradient returns it behind the result proper; callers drop it.

Legend: T rows, K and N inner and outer width, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore.ops import Primitive
from mindspore.ops.auto_generate import SiLU

from parallel.operator_layout import Layout
from parallel.ops.compiled_kernels import (
    CompiledCrossEntropy,
    CompiledLayerNorm,
    CompiledLinear,
    CompiledProduct,
    CompiledRmsNorm,
    CompiledSquareSums,
)
from parallel.ops.native_ops import NativeCrossEntropy, NativeLinear, NativeLookup, NativeProduct
from parallel.partition_spec import AxisSpec, PartitionSpec

FAST_GELU_SLOPE = 1.702
GELU_SLOPE = 2.0 * 0.7978845608  # 2 sqrt(2 / pi)
GELU_CUBIC = GELU_SLOPE * 0.044715


class Product(nn.Cell):
    """Linear layer without bias: y_TN = x_TK @ w_KN, in `compute` precision."""

    def __init__(self, layout: Layout, compute: ms.dtype = ms.float32) -> None:
        super().__init__()
        self.compute = compute
        self.product = layout(ops.MatMul(), (1, 1), (1, 1))
        self.by_transposed_weight = layout(ops.MatMul(transpose_b=True), (1, 1), (1, 1))
        self.by_transposed_input = layout(ops.MatMul(transpose_a=True), (1, 1), (1, 1))
        self.cast = layout(ops.Cast(), (1, 1))

    def low(self, x: Tensor) -> Tensor:
        """x in the precision of the product."""
        return x if self.compute == ms.float32 else self.cast(x, self.compute)

    def full(self, x: Tensor) -> Tensor:
        """x in float32."""
        return x if self.compute == ms.float32 else self.cast(x, ms.float32)

    def construct(self, x: Tensor, w: Tensor) -> Tensor:
        return self.full(self.product(self.low(x), self.low(w)))

    def bprop(self, x: Tensor, w: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        return self.gradients(x, w, dout)

    def gradients(self, x: Tensor, w: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        """(dx_TK, dw_KN) of the product."""
        dy = self.low(dout)
        dx = self.full(self.by_transposed_weight(dy, self.low(w)))
        return dx, self.full(self.by_transposed_input(self.low(x), dy))


class Linear(Product):
    """Linear layer: y_TN = x_TK @ w_KN + b_N; the product runs in `compute` precision, everything else in float32."""

    def __init__(self, layout: Layout, compute: ms.dtype = ms.float32) -> None:
        super().__init__(layout, compute)
        self.add_bias = layout(ops.BiasAdd(), (1, 1), (1,))
        self.column_sum = layout(ops.ReduceSum(), (1, 1))

    def construct(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return self.add_bias(self.full(self.product(self.low(x), self.low(w))), b)

    def bprop(self, x: Tensor, w: Tensor, b: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dx, dw = self.gradients(x, w, dout)
        return dx, dw, self.bias_gradient(dout)

    def bias_gradient(self, dout: Tensor) -> Tensor:
        """The sum of dout [T, N] over its rows: [N]."""
        # A product with a row of ones is three times as fast as ReduceSum on CPU, but needs a static number of rows.
        if dout.shape[0] > 0:
            return self.product(ops.ones((1, dout.shape[0]), ms.float32), dout).reshape(-1)
        return self.column_sum(dout, 0)


class InferenceLinear(nn.Cell):
    """Linear layer without a gradient: x_TK, w_KN and, with `biases`, b_N -> y_TN; as `Linear`, in a third of its
    compilation."""

    def __init__(self, layout: Layout, compute: ms.dtype, biases: bool) -> None:
        super().__init__()
        self.compute, self.biases = compute, biases
        self.product = layout(ops.MatMul(), (1, 1), (1, 1))
        self.cast = layout(ops.Cast(), (1, 1))
        self.add_bias = layout(ops.BiasAdd(), (1, 1), (1,))

    def construct(self, x: Tensor, w: Tensor, *b: Tensor) -> Tensor:
        if self.compute == ms.float32:
            y = self.product(x, w)
        else:
            y = self.cast(self.product(self.cast(x, self.compute), self.cast(w, self.compute)), ms.float32)
        return self.add_bias(y, b[0]) if self.biases else y


class FastGelu(nn.Cell):
    """Sigmoid approximation of GELU: x * sigmoid(slope x), elementwise, for any shape (Hendrycks and Gimpel 2016, arXiv
    1606.08415, section 2).

    The slope 1 makes it SiLU, of the same section. Returns (y, slope x, sigmoid(slope x)).
    """

    def __init__(self, layout: Layout, slope: float = FAST_GELU_SLOPE) -> None:
        super().__init__()
        self.slope = slope
        self.sigmoid = layout(ops.Sigmoid())
        self.sigmoid_gradient = layout(ms.ops.operations._grad_ops.SigmoidGrad())
        self.mul = layout(ops.Mul())
        self.add = layout(ops.Add())

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        steep = x * self.slope
        gate = self.sigmoid(steep)
        return self.mul(x, gate), steep, gate

    def bprop(self, x: Tensor, out: tuple[Tensor, ...], dout: tuple[Tensor, ...]) -> tuple[Tensor]:
        # y' = s + slope x s (1 - s); SigmoidGrad(s, g) = g s (1 - s) in one pass.
        _, steep, gate = out
        return (self.mul(dout[0], self.add(self.sigmoid_gradient(gate, steep), gate)),)


class Gelu(nn.Cell):
    """GELU in its tanh form (arXiv 1606.08415, equation in section 2), elementwise. Returns (y, x, gate).

    Written as x * sigmoid(2 u), the same as x * (1 + tanh(u)) / 2: the CPU's Tanh is off by 1e-4 around 5.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.sigmoid = layout(ops.Sigmoid())
        self.sigmoid_gradient = layout(ms.ops.operations._grad_ops.SigmoidGrad())
        self.square = layout(ops.Square())
        self.mul = layout(ops.Mul())
        self.add = layout(ops.Add())

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate = self.sigmoid(self.mul(x, self.square(x) * GELU_CUBIC + GELU_SLOPE))
        return self.mul(x, gate), x, gate

    def bprop(self, x: Tensor, out: tuple[Tensor, ...], dout: tuple[Tensor, ...]) -> tuple[Tensor]:
        # With u2 = 2 u: y' = s + x s (1 - s) u2'; SigmoidGrad(s, g) = g s (1 - s) in one pass.
        _, _, gate = out
        steep = self.mul(x, self.square(x) * (3 * GELU_CUBIC) + GELU_SLOPE)
        return (self.mul(dout[0], self.add(self.sigmoid_gradient(gate, steep), gate)),)


class LayerNorm(nn.Cell):
    """Layer norm: (x - mean) / sqrt(var + epsilon) * gamma + beta over the last axis of x_TD (arXiv 1607.06450).

    Returns (y_TD, x - mean, 1/std_T1, outer product of 1/std and gamma_TD). Everything that would broadcast is a
    product with a row or a column instead, which on CPU takes a third of the time.
    """

    def __init__(self, layout: Layout, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.mean = layout(ops.ReduceMean(keep_dims=True), (1, 1))
        self.sub = layout(ops.Sub(), (1, 1), (1, 1))
        self.mul = layout(ops.Mul(), (1, 1), (1, 1))
        self.square = layout(ops.Square(), (1, 1))
        self.rsqrt = layout(ops.Rsqrt(), (1, 1))
        self.add_bias = layout(ops.BiasAdd(), (1, 1), (1,))
        self.product = layout(ops.MatMul(), (1, 1), (1, 1))

    def construct(self, x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ones = ops.ones((1, x.shape[1]), ms.float32)
        centred = self.sub(x, self.product(self.mean(x, -1), ones))
        inverse_std = self.rsqrt(self.mean(self.square(centred), -1) + self.epsilon)
        scale = self.product(inverse_std, gamma.reshape(1, -1))
        return self.add_bias(self.mul(centred, scale), beta), centred, inverse_std, scale

    def bprop(
        self, x: Tensor, gamma: Tensor, beta: Tensor, out: tuple[Tensor, ...], dout: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        # dx = r g - r mean(g) - centred r^3 mean(g centred), with r = 1/std and g = dy gamma.
        dy = dout[0]
        _, centred, inverse_std, scale = out
        tokens, hidden = x.shape
        dy_centred = self.mul(dy, centred)
        dgamma = self.product(inverse_std.reshape(1, -1), dy_centred).reshape(-1)
        dbeta = self.product(ops.ones((1, tokens), ms.float32), dy).reshape(-1)
        column = gamma.reshape(-1, 1) * (1.0 / hidden)
        ones = ops.ones((1, hidden), ms.float32)
        mean_term = self.product(self.mul(self.product(dy, column), inverse_std), ones)
        cube = self.mul(self.square(inverse_std), inverse_std)
        along = self.product(self.mul(self.product(dy_centred, column), cube), ones)
        dx = self.sub(self.sub(self.mul(dy, scale), mean_term), self.mul(centred, along))
        return dx, dgamma, dbeta


class RmsNorm(nn.Cell):
    """RMS norm: x / sqrt(mean x^2 + epsilon) * gamma over the last axis of x_TD (arXiv 1910.07467, equation 4).

    Returns (y_TD, 1/rms_T1, outer product of 1/rms and gamma_TD); composed as `LayerNorm` is.
    """

    def __init__(self, layout: Layout, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.mean = layout(ops.ReduceMean(keep_dims=True), (1, 1))
        self.sub = layout(ops.Sub(), (1, 1), (1, 1))
        self.mul = layout(ops.Mul(), (1, 1), (1, 1))
        self.square = layout(ops.Square(), (1, 1))
        self.rsqrt = layout(ops.Rsqrt(), (1, 1))
        self.product = layout(ops.MatMul(), (1, 1), (1, 1))

    def construct(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inverse = self.rsqrt(self.mean(self.square(x), -1) + self.epsilon)
        scale = self.product(inverse, gamma.reshape(1, -1))
        return self.mul(x, scale), inverse, scale

    def bprop(
        self, x: Tensor, gamma: Tensor, out: tuple[Tensor, ...], dout: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        # dx = r g - x r^3 mean(g x), with r = 1/rms and g = dy gamma.
        dy = dout[0]
        _, inverse, scale = out
        hidden = x.shape[1]
        dy_x = self.mul(dy, x)
        dgamma = self.product(inverse.reshape(1, -1), dy_x).reshape(-1)
        cube = self.mul(self.square(inverse), inverse)
        along = self.mul(self.product(dy_x, gamma.reshape(-1, 1) * (1.0 / hidden)), cube)
        along = self.product(along, ops.ones((1, hidden), ms.float32))
        return self.sub(self.mul(dy, scale), self.mul(x, along)), dgamma


class TiedCrossEntropy(nn.Cell):
    """Cross-entropy with a tied head. Token losses of logits_TV = h_TD @ table_VD^T against labels_T, in float32.
    Returns (loss_T, probabilities_TV).

    The gradient uses d loss/d logits = p - onehot without ever building the one-hot matrix: its part is a gather of
    table rows for h and a sum of rows of h by label for the table. A loss saturates at 85 nats, where the
    probability of the label leaves float32.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.logits = layout(ops.MatMul(transpose_b=True), (1, 1), (1, 1))
        self.product = layout(ops.MatMul(), (1, 1), (1, 1))
        self.by_transposed = layout(ops.MatMul(transpose_a=True), (1, 1), (1, 1))
        self.softmax = layout(ops.Softmax(-1), (1, 1))
        self.pick = layout(ops.GatherD(), (1, 1), (1, 1))
        self.rows = layout(ops.Gather(), (1, 1), (1,))
        self.sum_by_label = layout(ops.UnsortedSegmentSum(), (1, 1), (1,))
        self.log = layout(ops.Log(), (1,))
        self.mul = layout(ops.Mul(), (1, 1), (1, 1))

    def construct(self, h: Tensor, table: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = self.softmax(self.logits(h, table))
        picked = self.pick(probabilities, 1, labels.reshape(-1, 1)).reshape(-1)
        # An addition that changes no probability above 1e-30 keeps log finite and, unlike a maximum, lets NaN through.
        return -self.log(picked + 1e-37), probabilities

    def bprop(
        self, h: Tensor, table: Tensor, labels: Tensor, out: tuple[Tensor, Tensor], dout: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, probabilities = out
        weight = self.product(dout[0].reshape(-1, 1), ops.ones((1, h.shape[1]), ms.float32))
        dh = self.mul(self.product(probabilities, table) - self.rows(table, labels, 0), weight)
        weighted = self.mul(h, weight)
        dtable = self.by_transposed(probabilities, weighted) - self.sum_by_label(weighted, labels, table.shape[0])
        return dh, dtable, labels


class EmbeddingLookup(nn.Cell):
    """Embedding lookup: table_VD[ids_T]; the gradient sums rows by id."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.rows = layout(ops.Gather(), (1, 1), (1,))
        self.sum_by_id = layout(ops.UnsortedSegmentSum(), (1, 1), (1,))

    def construct(self, table: Tensor, ids: Tensor) -> Tensor:
        return self.rows(table, ids, 0)

    def bprop(self, table: Tensor, ids: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        return self.sum_by_id(dout, ids, table.shape[0]), ids


class Native(nn.Cell):
    """Wrapper of a fused operator of the device with MindSpore's own gradient; gives its only output as a tuple."""

    def __init__(self, operator: Primitive) -> None:
        super().__init__()
        self.operator = operator

    def construct(self, *inputs: Tensor) -> tuple[Tensor]:
        return (self.operator(*inputs),)


class SquareSums(nn.Cell):
    """Sums of squares, for a global norm. Tensors -> float32 [n], the sum of squares of each; without a gradient."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.half_square = layout(ops.L2Loss())
        self.each = ops.HyperMap()
        self.stack = layout(ops.Stack())

    def construct(self, *tensors: Tensor) -> Tensor:
        # Not a loop: that is unrolled with the whole tuple at every turn, which compiles in the cube of its length.
        return self.stack(self.each(self.half_square, tensors)) * 2.0


def activation(name: str, layout: Layout, *cuts: PartitionSpec) -> nn.Cell:
    """The activation of this name in the device's fast form: x, cut so -> (y, whatever its gradient keeps)."""
    if layout.native:
        fused = {"fast_gelu": ops.FastGeLU, "gelu": ops.GeLU, "silu": SiLU}[name]
        return Native(layout(fused(), *cuts))
    if name == "silu":
        return FastGelu(layout, slope=1.0)
    return {"fast_gelu": FastGelu, "gelu": Gelu}[name](layout)


def layer_norm(layout: Layout, epsilon: float) -> nn.Cell | Primitive:
    """Layer normalisation in the device's fast form: (x_TD, gamma, beta) -> (y_TD, whatever its gradient keeps)."""
    if layout.native or layout.few_rows:
        return layout(ops.LayerNorm(1, 1, epsilon), layout.residual_spec, (1,), (1,))
    return CompiledLayerNorm(layout.kernels, epsilon) if layout.kernels else LayerNorm(layout, epsilon)


def rms_norm(layout: Layout, epsilon: float) -> nn.Cell | Primitive:
    """RMS normalisation in the device's fast form: (x_TD, gamma) -> (y_TD, whatever its gradient keeps)."""
    if layout.native:
        return layout(ops.RmsNorm(epsilon), layout.residual_spec, (1,))
    return CompiledRmsNorm(layout.kernels, epsilon) if layout.kernels else RmsNorm(layout, epsilon)


def linear(
    layout: Layout, compute: ms.dtype = ms.float32, biases: bool = True, inner: AxisSpec = 1, outer: AxisSpec = 1
) -> nn.Cell:
    """The affine map in the device's fast form: (x_TK, w_KN, b_N) -> y_TN; without `biases` (x_TK, w_KN).

    `inner` cuts K over a mesh, `outer` N.
    """
    if layout.native:
        return (NativeLinear if biases else NativeProduct)(layout, compute, inner, outer)
    if layout.few_rows:
        return InferenceLinear(layout, compute, biases)
    if layout.product_kernels:
        return (CompiledLinear if biases else CompiledProduct)(layout.kernels)
    return (Linear if biases else Product)(layout, compute)


def embedding_lookup(layout: Layout, cut: AxisSpec = 1) -> nn.Cell:
    """Rows of a table by number in the device's fast form: (table_VD, ids_T) -> y_TD; `cut` cuts V over a mesh."""
    return NativeLookup(layout, cut) if layout.native or layout.few_rows else EmbeddingLookup(layout)


def tied_cross_entropy(layout: Layout) -> nn.Cell:
    """Token losses in the device's fast form: (h_TD, table_VD, labels_T) -> (losses_T, whatever its gradient keeps)."""
    if layout.native:
        return NativeCrossEntropy(layout)
    return CompiledCrossEntropy(layout.kernels) if layout.kernels else TiedCrossEntropy(layout)


def square_sums(layout: Layout, shapes: Sequence[tuple[int, ...]]) -> nn.Cell:
    """Sums of squares in the device's fast form: tensors of these shapes -> [n]."""
    return CompiledSquareSums(layout.kernels, shapes) if layout.kernels else SquareSums(layout)
