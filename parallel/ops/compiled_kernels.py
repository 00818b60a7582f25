"""Primitives for CPUs as compiled kernels (`kernels/*.c`): whole sublayers in one pass instead of many operators.

The kernels use the matrix product of the oneDNN that MindSpore brings and threads of their own. Each cell is one
operation with its own gradient, the same function as its composed form in `primitives` and `rre.experts`.

Legend: T tokens, K and N inner and outer width, D hidden width, V vocabulary, B samples, S positions, H heads,
C = T k choices, F inner width of a feed-forward network.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from importlib.util import find_spec

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

ACTIVATIONS = {"fast_gelu": 0, "gelu": 1, "silu": 2}


def library() -> str | None:
    """The path of the compiled kernels; None where they were not built or cannot run in this process."""
    spec = find_spec("parallel.ops._kernels")
    if spec is None or spec.origin is None:
        return None
    try:
        ready = ctypes.CDLL(spec.origin).pangu_sigma_kernels_ready()
    except (OSError, AttributeError):
        return None
    return spec.origin if ready else None


class HostKernels:
    """The kernels that work on NumPy arrays, outside any graph; they run in the calling thread without the GIL."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        pointer, int64, float32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        self._adamw = self._library.pangu_sigma_adamw
        self._adamw.argtypes, self._adamw.restype = [pointer] * 4 + [int64] + [float32] * 7, None
        self._square_sum = self._library.pangu_sigma_square_sum
        self._square_sum.argtypes, self._square_sum.restype = [pointer, int64], ctypes.c_double

    def adamw(self, weight, m, v, gradient, beta1, beta2, first, second, rate, epsilon, kept) -> None:
        """m = beta1 m + first g; v = beta2 v + (second g)^2; w = kept w - rate m / (sqrt(v) + epsilon), in place."""
        arrays = (weight, m, v, gradient)
        if not all(a.flags.c_contiguous and a.dtype == np.float32 and a.size == weight.size for a in arrays):
            raise ValueError("adamw needs contiguous float32 arrays of one size")
        self._adamw(
            *(a.ctypes.data for a in arrays), weight.size, beta1, beta2, first, second, rate, epsilon, kept
        )

    def square_sum(self, values) -> float:
        """Sum of squares of a contiguous float32 array: float32 inside blocks of 8,192, float64 over them."""
        if not values.flags.c_contiguous or values.dtype != np.float32:
            raise ValueError("square_sum needs a contiguous float32 array")
        return self._square_sum(values.ctypes.data, values.size)


def kernel_times(path: str) -> dict[str, tuple[int, float]]:
    """Kernel name -> (calls, seconds) of the compiled kernels since this process began."""
    ask = ctypes.CDLL(path).pangu_sigma_kernel_time
    label, calls, spent = ctypes.c_char_p(), ctypes.c_int64(), ctypes.c_int64()
    times: dict[str, tuple[int, float]] = {}
    while ask(len(times), ctypes.byref(label), ctypes.byref(calls), ctypes.byref(spent)):
        times[label.value.decode()] = (calls.value, spent.value * 1e-9)
    return times


def _kernel(path: str, name: str, shapes, types) -> ops.Custom:
    return ops.Custom(f"{path}:pangu_sigma_{name}", shapes, types, "aot")


class CompiledLinear(nn.Cell):
    """Linear layer as a compiled kernel: y_TN = x_TK @ w_KN + b_N."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.forward = _kernel(path, "affine", lambda x, w, b: [x[0], w[1]], lambda x, w, b: x)
        self.backward = _kernel(path, "affine_gradient", lambda x, w, dy: (x, w, [w[1]]), lambda x, w, dy: (x, x, x))

    def construct(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return self.forward(x, w, b)

    def bprop(self, x: Tensor, w: Tensor, b: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.backward(x, w, dout)


class CompiledProduct(nn.Cell):
    """Linear layer without bias as a compiled kernel: y_TN = x_TK @ w_KN."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.forward = _kernel(path, "affine", lambda x, w: [x[0], w[1]], lambda x, w: x)
        self.backward = _kernel(path, "affine_gradient", lambda x, w, dy: (x, w), lambda x, w, dy: (x, x))

    def construct(self, x: Tensor, w: Tensor) -> Tensor:
        return self.forward(x, w)

    def bprop(self, x: Tensor, w: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        return self.backward(x, w, dout)


class CompiledRmsNorm(nn.Cell):
    """RMS norm as a compiled kernel: x / sqrt(mean x^2 + epsilon) * gamma over the last axis of x_TD. Returns (y_TD,
    1/rms_T).
    """

    def __init__(self, path: str, epsilon: float) -> None:
        super().__init__()
        self.epsilon = Tensor([epsilon], ms.float32)
        self.forward = _kernel(path, "rms_norm", lambda x, g, e: (x, [x[0]]), lambda x, g, e: (x, x))
        self.backward = _kernel(path, "rms_norm_gradient", lambda x, g, r, dy: (x, g), lambda x, g, r, dy: (x, x))

    def construct(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(x, gamma, self.epsilon)

    def bprop(
        self, x: Tensor, gamma: Tensor, out: tuple[Tensor, ...], dout: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        return self.backward(x, gamma, out[1], dout[0])


class CompiledApplyRotary(nn.Cell):
    """RoPE as a compiled kernel: x_TD, (cosines, sines) [T, W/2] -> x with the values i and i + W/2 of every head
    rotated by the row's angle i."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.there, self.back = Tensor([1], ms.int32), Tensor([-1], ms.int32)
        self.run = _kernel(path, "rotate", lambda x, c, s, way: x, lambda x, c, s, way: x)

    def construct(self, x: Tensor, cos_sin: tuple[Tensor, ...]) -> Tensor:
        return self.run(x, cos_sin[0], cos_sin[1], self.there)

    def bprop(self, x: Tensor, cos_sin: tuple[Tensor, ...], out: Tensor, dout: Tensor):
        return self.run(dout, cos_sin[0], cos_sin[1], self.back), cos_sin


class CompiledLayerNorm(nn.Cell):
    """Layer norm as a compiled kernel: (x - mean) / sqrt(var + epsilon) * gamma + beta over the last axis of x_TD.
    Returns (y_TD, mean_T, 1/std_T).
    """

    def __init__(self, path: str, epsilon: float) -> None:
        super().__init__()
        self.epsilon = Tensor([epsilon], ms.float32)
        self.forward = _kernel(
            path, "layer_norm", lambda x, g, b, e: (x, [x[0]], [x[0]]), lambda x, g, b, e: (x, x, x)
        )
        self.backward = _kernel(
            path, "layer_norm_gradient", lambda x, g, m, r, dy: (x, g, g), lambda x, g, m, r, dy: (x, x, x)
        )

    def construct(self, x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.forward(x, gamma, beta, self.epsilon)

    def bprop(
        self, x: Tensor, gamma: Tensor, beta: Tensor, out: tuple[Tensor, ...], dout: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.backward(x, gamma, out[1], out[2], dout[0])


class CompiledAttention(nn.Cell):
    """Causal attention with segments, fused as a compiled kernel: q, k, v [T, D] of all heads, segments int32 [B, S] ->
    (y [T, D], log sums [B, H, S]).

    softmax(q k^T / sqrt(D / H)) v over the keys of a query's own segment up to itself.
    """

    def __init__(self, path: str, heads: int) -> None:
        super().__init__()
        self.heads = Tensor([heads], ms.int32)
        self.forward = _kernel(
            path, "attention", lambda q, k, v, s, h: (q, [s[0], heads, s[1]]), lambda q, k, v, s, h: (q, q)
        )
        self.backward = _kernel(
            path, "attention_gradient",
            lambda q, k, v, s, h, y, p, dy: (q, q, q), lambda q, k, v, s, h, y, p, dy: (q, q, q),
        )  # fmt: skip

    def construct(self, q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(q, k, v, segments, self.heads)

    def bprop(self, q: Tensor, k: Tensor, v: Tensor, segments: Tensor, out: tuple, dout: tuple):
        dq, dk, dv = self.backward(q, k, v, segments, self.heads, out[0], out[1], dout[0])
        return dq, dk, dv, segments


class CompiledCrossEntropy(nn.Cell):
    """Cross-entropy with a tied head, compiled. As `primitives.TiedCrossEntropy`: h_TD, table_VD, labels_T ->
    (losses_T, probabilities_TV).
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.forward = _kernel(
            path, "cross_entropy", lambda h, t, y: ([h[0]], [h[0], t[0]]), lambda h, t, y: (h, h)
        )
        self.backward = _kernel(
            path, "cross_entropy_gradient", lambda h, t, y, p, d: (h, t, h), lambda h, t, y, p, d: (h, h, h)
        )

    def construct(self, h: Tensor, table: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(h, table, labels)

    def bprop(self, h: Tensor, table: Tensor, labels: Tensor, out: tuple, dout: tuple):
        dh, dtable, _ = self.backward(h, table, labels, out[1], dout[0])
        return dh, dtable, labels


class CompiledSquareSums(nn.Cell):
    """Sums of squares, for a global norm, as a compiled kernel. Tensors of the given shapes -> float32 [n], the sum of
    squares of each; without a gradient.
    """

    def __init__(self, path: str, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        count = len(shapes)
        self.sizes = Tensor([math.prod(shape) for shape in shapes], ms.int64)
        self.sums = _kernel(path, "square_sums", lambda *_: [count], lambda first, *_: first)

    def construct(self, *tensors: Tensor) -> Tensor:
        return self.sums(*tensors, self.sizes)


class CompiledFeedForward(nn.Cell):
    """Grouped feed-forward networks (experts) as a compiled kernel: x_TD, order int32 [C], offsets int32 [N + 1], N
    networks -> (y_CD by choice, what the activation takes [C, F], or [C, 2 F] of a gated network).

    `tensors` 4: weight and bias up and down; 2: the weights alone; 3: gated, weights gate, up and down. Slot n works on
    the choices order[offsets[n]:offsets[n + 1]] (token * k + choice); results of choices behind the last slot are zero.
    `exact_rows` > 0: outside training it computes in blocks of exactly so many rows, which makes a row's result
    independent of all others. The weight gradients of a slot without rows are left as the memory was: whoever takes
    gradients must not look at them.
    """

    def __init__(self, path: str, activation: str, exact_rows: int = 0, tensors: int = 4) -> None:
        super().__init__()
        self.exact = Tensor([ACTIVATIONS[activation], exact_rows, tensors], ms.int32)
        self.ragged = Tensor([ACTIVATIONS[activation], 0, tensors], ms.int32)
        halves = 2 if tensors == 3 else 1

        def forward_shapes(x, order, offsets, settings, *weights):
            return [order[0], x[1]], [order[0], halves * weights[0][1]]

        def forward_types(x, order, offsets, settings, *weights):
            return x, x

        def backward_shapes(x, order, offsets, settings, *rest):
            kept, dy = rest[-2:]
            inner = [order[0], kept[1] // halves]
            return (x, *rest[:-2], inner, kept, dy, dy, dy)

        def backward_types(x, order, offsets, settings, *rest):
            return (x,) * (len(rest) + 4)

        self.forward = _kernel(path, "feed_forward", forward_shapes, forward_types)
        self.backward = _kernel(path, "feed_forward_gradient", backward_shapes, backward_types)

    def construct(self, x: Tensor, order: Tensor, offsets: Tensor, weights: tuple) -> tuple[Tensor, Tensor]:
        settings = self.ragged if self.training else self.exact
        return self.forward(x, order, offsets, settings, *weights)

    def bprop(self, x: Tensor, order: Tensor, offsets: Tensor, weights: tuple, out: tuple, dout: tuple):
        gradients = self.backward(x, order, offsets, self.ragged, *weights, out[1], dout[0])
        return gradients[0], order, offsets, gradients[1 : 1 + len(weights)]


class CompiledCombine(nn.Cell):
    """Combine of a sparse layer as a compiled kernel: y_CD by choice, weights [T, k] -> sum over a token's choices of
    weight * row, [T, D].
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.forward = _kernel(path, "combine", lambda y, w: [w[0], y[1]], lambda y, w: y)
        self.backward = _kernel(path, "combine_gradient", lambda y, w, d: (y, w), lambda y, w, d: (y, y))

    def construct(self, y: Tensor, weights: Tensor) -> Tensor:
        return self.forward(y, weights)

    def bprop(self, y: Tensor, weights: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        return self.backward(y, weights, dout)


class CompiledPlan(nn.Cell):
    """Dispatch plan (counting sort of rows by expert), compiled: expert ids int32 [T, k], E for a dropped
    choice -> (order [C], offsets [E + 1]) of the C = T k choices, for `CompiledFeedForward`.
    """

    def __init__(self, path: str, experts: int) -> None:
        super().__init__()
        self.sort = _kernel(path, "plan", lambda ids: (ids, [experts + 1]), lambda ids: (ids, ids))

    def construct(self, expert_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.sort(expert_ids.reshape(-1))
