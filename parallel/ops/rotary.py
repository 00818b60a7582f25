"""RoPE: rotary position embedding (RoFormer, Su et al. 2021, arXiv 2104.09864) in the halved form that Hugging Face's
and OLMo's models have.

In every head of width W, values i and i + W/2 are rotated together by the angle position * theta^(-2i / W). A query
rotated by its position and a key rotated by its own have a product that depends on the distance alone.

Legend: T rows, H heads, W head width, D = H W, P positions.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn, ops

from parallel.operator_layout import Layout
from parallel.ops.compiled_kernels import CompiledApplyRotary


def rotary_angles(positions: int, width: int, theta: float) -> np.ndarray:
    """Angles float32 [P, W/2] of every position, in float32 throughout, as models of this form were trained."""
    wavelengths = np.float32(theta) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    return np.outer(np.arange(positions, dtype=np.float32), np.float32(1.0) / wavelengths)


class ApplyRotary(nn.Cell):
    """RoPE composed of plain operators: x_TD, (cosines, sines) of `RotaryCosSin` -> x with every pair rotated.

    The pair's other value, with its sign, is a product with a fixed matrix [W, W]: slices of an axis are slow on CPU.
    """

    def __init__(self, layout: Layout, heads: int, width: int) -> None:
        super().__init__()
        half = width // 2
        other = np.zeros((width, width), np.float32)
        other[np.arange(half) + half, np.arange(half)] = -1.0
        other[np.arange(half), np.arange(half) + half] = 1.0
        self.other = Tensor(other)
        self.width = width
        self.product = layout(ops.MatMul(), (1, 1), (1, 1))
        self.by_transposed = layout(ops.MatMul(transpose_b=True), (1, 1), (1, 1))
        self.mul = layout(ops.Mul(), (1, 1), (1, 1))
        self.add = layout(ops.Add(), (1, 1), (1, 1))

    def construct(self, x: Tensor, cos_sin: tuple[Tensor, ...]) -> Tensor:
        other = self.product(x.reshape(-1, self.width), self.other).reshape(x.shape)
        return self.add(self.mul(x, cos_sin[0]), self.mul(other, cos_sin[1]))

    def bprop(self, x: Tensor, cos_sin: tuple[Tensor, ...], out: Tensor, dout: Tensor):
        back = self.mul(dout, cos_sin[1]).reshape(-1, self.width)
        back = self.by_transposed(back, self.other).reshape(x.shape)
        return self.add(self.mul(dout, cos_sin[0]), back), cos_sin


class NativeApplyRotary(nn.Cell):
    """RoPE with MindSpore's own gradient, sharded over a mesh by rows and heads; (cosines, sines) are [T, W]."""

    def __init__(self, layout: Layout, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        three, of_row = ("rows", "tensor", 1), ("rows", 1, 1)
        self.reshape = ops.Reshape()
        self.halves = layout(ops.Split(2, 2), three)
        self.neg = layout(ops.Neg(), three)
        self.beside = layout(ops.Concat(2), three, three)
        self.for_heads = layout(ops.ExpandDims(), ("rows", 1))
        self.mul = layout(ops.Mul(), three, of_row)
        self.add = layout(ops.Add(), three, three)

    def construct(self, x: Tensor, cos_sin: tuple[Tensor, ...]) -> Tensor:
        y = self.reshape(x, (-1, self.heads, self.width))
        first, second = self.halves(y)
        other = self.beside((self.neg(second), first))
        y = self.add(self.mul(y, self.for_heads(cos_sin[0], 1)), self.mul(other, self.for_heads(cos_sin[1], 1)))
        return self.reshape(y, x.shape)


class RotaryCosSin(nn.Cell):
    """Cosines and sines of RoPE: position ids [T] -> (cosines, sines), made once per step for all layers.

    Shapes: [T, D], or [T, W/2] where compiled, or [T, W] where native.
    """

    def __init__(self, layout: Layout, positions: int, heads: int, width: int, theta: float) -> None:
        super().__init__()
        table = rotary_angles(positions, width, theta)
        if not layout.kernels:
            # At full shape, because multiplying equal shapes is several times as fast as a broadcast on CPU.
            table = np.tile(table, (1, 2))
        self.repeats = 1 if layout.kernels or layout.native else heads
        self.cosines, self.sines = Tensor(np.cos(table)), Tensor(np.sin(table))
        self.take = layout(ops.Gather(), (1, 1), ("rows",))
        self.tile = layout(ops.Tile(), (1, 1))

    def construct(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        cosines, sines = self.take(self.cosines, ids, 0), self.take(self.sines, ids, 0)
        if self.repeats == 1:
            return cosines, sines
        return self.tile(cosines, (1, self.repeats)), self.tile(sines, (1, self.repeats))


def rotary(layout: Layout, heads: int, width: int) -> nn.Cell:
    """RoPE in the device's fast form: (x_TD, cos_sin of `RotaryCosSin`) -> y_TD."""
    if layout.native:
        return NativeApplyRotary(layout, heads, width)
    return CompiledApplyRotary(layout.kernels) if layout.kernels else ApplyRotary(layout, heads, width)
