"""Causal multi-head attention, cut into query chunks so that the masked half of the score matrix is not computed.

Legend: B samples, S positions, T = B*S rows, D hidden width, H heads, W = D/H head width, C query chunks.
"""

from __future__ import annotations

import math

import mindspore as ms
from mindspore import Tensor, nn, ops

from pangu_sigma.config.model_section import ModelConfig
from pangu_sigma.model.layers.dropout import CountedDropout
from pangu_sigma.model.layers.linear_and_norm import NORMS, LinearCell
from pangu_sigma.model.layers.native_attention import MASKED_SCORE, NativeAttention, NativeMask
from parallel.operator_layout import Layout
from parallel.ops.compiled_kernels import CompiledAttention
from parallel.ops.rotary import turn

SMALLEST_CHUNK = 64
MOST_CHUNKS = 4


def chunk_count(length: int) -> int:
    """Query chunks for a sequence: C chunks compute (C + 1) / (2 C) of the score matrix; more than 4 gain nothing."""
    chunks = MOST_CHUNKS
    while chunks > 1 and (length % chunks or length // chunks < SMALLEST_CHUNK):
        chunks //= 2
    return chunks


class CausalMask(nn.Cell):
    """segments [B, S] -> C additive masks [B, H, S/C, visible keys]: 0 where key <= query in one document.

    Built once per step and shared by all layers, at the full shape, because adding over equal shapes is several times
    as fast as a broadcast on CPU.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def construct(self, segments: Tensor) -> tuple[Tensor, ...]:
        batch, length = segments.shape
        chunks = chunk_count(length)
        size = length // chunks
        masks = ()
        for c in range(chunks):
            start, end = c * size, (c + 1) * size
            rows = ops.arange(start, end).reshape(1, size, 1)
            columns = ops.arange(end).reshape(1, 1, end)
            same = ops.equal(segments[:, start:end].reshape(batch, size, 1), segments[:, :end].reshape(batch, 1, end))
            visible = ops.logical_and(same, ops.less_equal(columns, rows))
            mask = (ops.cast(visible, ms.float32) - 1.0) * (-MASKED_SCORE)
            masks = masks + (ops.BroadcastTo((batch, self.heads, size, end))(mask.reshape(batch, 1, size, end)),)
        return masks


class ScaledDotProduct(nn.Cell):
    """softmax(q k^T + mask) v for q, k, v [B, H, S, W], q already scaled. Returns (y [B, H, S, W], C probabilities).

    Gradient: dS = P * (dP - sum(dO * O)) (Rabe and Staats 2021, arXiv 2112.05682; the sum form of arXiv 2205.14135).
    The row term rides along as one more column of the product dO V^T, which spares a broadcast over all scores.
    """

    def __init__(self, layout: Layout, compute: ms.dtype) -> None:
        super().__init__()
        self.compute = compute
        four = (1, 1, 1, 1)
        self.by_transposed = layout(ops.BatchMatMul(transpose_b=True), four, four)
        self.product = layout(ops.BatchMatMul(), four, four)
        self.transposed_by = layout(ops.BatchMatMul(transpose_a=True), four, four)
        self.softmax = layout(ops.Softmax(-1), four)
        self.add = layout(ops.Add(), four, four)
        self.mul = layout(ops.Mul(), four, four)
        self.row_sum = layout(ops.ReduceSum(keep_dims=True), four)
        self.beside = layout(ops.Concat(-1), four)
        self.below = layout(ops.Concat(2), four)
        self.slice = layout(ops.Slice(), four)
        self.sum_all = layout(ops.AddN())
        self.cast = layout(ops.Cast(), four)

    def part(self, x: Tensor, start: int, end: int) -> Tensor:
        """Positions `start` to `end` of x [B, H, S, W]."""
        batch, heads, _, width = x.shape
        return self.slice(x, (0, 0, start, 0), (batch, heads, end - start, width))

    def low(self, x: Tensor) -> Tensor:
        """x in the precision of the products."""
        return x if self.compute == ms.float32 else self.cast(x, self.compute)

    def full(self, x: Tensor) -> Tensor:
        """x in float32."""
        return x if self.compute == ms.float32 else self.cast(x, ms.float32)

    def construct(self, q: Tensor, k: Tensor, v: Tensor, masks: tuple[Tensor, ...]):
        length = q.shape[2]
        size = length // len(masks)
        q, k, v = self.low(q), self.low(k), self.low(v)
        outs, kept = (), ()
        for c in range(len(masks)):
            end = (c + 1) * size
            scores = self.full(self.by_transposed(self.part(q, c * size, end), self.part(k, 0, end)))
            p = self.softmax(self.add(scores, masks[c]))
            outs = outs + (self.full(self.product(self.low(p), self.part(v, 0, end))),)
            kept = kept + (p,)
        y = outs[0] if len(masks) == 1 else self.below(outs)
        return y, kept

    def bprop(self, q: Tensor, k: Tensor, v: Tensor, masks: tuple[Tensor, ...], out, dout):
        y, kept = out
        dy = dout[0]
        batch, heads, length, width = q.shape
        size = length // len(masks)
        row_term = self.row_sum(self.mul(dy, y), -1)
        dy_and_term = self.low(self.beside((dy, row_term)))
        v_and_minus_one = self.low(self.beside((v, ops.fill(ms.float32, (batch, heads, length, 1), -1.0))))
        q, k, dy = self.low(q), self.low(k), self.low(dy)
        dq, dk, dv = (), (), ()
        for c in range(len(masks)):
            end = (c + 1) * size
            p = kept[c]
            minus_term = self.part(v_and_minus_one, 0, end)
            dp = self.full(self.by_transposed(self.part(dy_and_term, c * size, end), minus_term))
            ds = self.low(self.mul(p, dp))
            dq = dq + (self.full(self.product(ds, self.part(k, 0, end))),)
            dk_part = self.full(self.transposed_by(ds, self.part(q, c * size, end)))
            dv_part = self.full(self.transposed_by(self.low(p), self.part(dy, c * size, end)))
            if end < length:
                zeros = ops.fill(ms.float32, (batch, heads, length - end, width), 0.0)
                dk_part, dv_part = self.below((dk_part, zeros)), self.below((dv_part, zeros))
            dk, dv = dk + (dk_part,), dv + (dv_part,)
        if len(masks) == 1:
            return dq[0], dk[0], dv[0], masks
        return self.below(dq), self.sum_all(dk), self.sum_all(dv), masks


class DroppedDotProduct(nn.Cell):
    """The same function with dropout on the probabilities, which the chunked gradient does not cover."""

    def __init__(self, layout: Layout, rate: float, layer: int) -> None:
        super().__init__()
        four = (1, 1, 1, 1)
        self.by_transposed = layout(ops.BatchMatMul(transpose_b=True), four, four)
        self.product = layout(ops.BatchMatMul(), four, four)
        self.softmax = layout(ops.Softmax(-1), four)
        self.below = layout(ops.Concat(2), four)
        self.dropout = CountedDropout(rate, layer, "attention probabilities")

    def construct(self, q: Tensor, k: Tensor, v: Tensor, masks: tuple[Tensor, ...], keys: Tensor):
        length = q.shape[2]
        size = length // len(masks)
        outs = ()
        for c in range(len(masks)):
            end = (c + 1) * size
            p = self.softmax(self.by_transposed(q[:, :, c * size : end], k[:, :, :end]) + masks[c])
            outs = outs + (self.product(self.dropout(p, keys + c), v[:, :, :end]),)
        return outs[0] if len(masks) == 1 else self.below(outs)


class ComposedAttention(nn.Cell):
    """q, k, v [T, D] of all heads, masks of `CausalMask` -> y [T, D], of MindSpore's operators."""

    def __init__(self, hidden: int, heads: int, layout: Layout, compute: ms.dtype, dropout: float, layer: int) -> None:
        super().__init__()
        self.heads = heads
        self.width = hidden // heads
        self.rate = dropout
        self.core = DroppedDotProduct(layout, dropout, layer) if dropout else ScaledDotProduct(layout, compute)
        self.transpose = layout(ops.Transpose(), (1, 1, 1, 1))
        self.scale = 1.0 / math.sqrt(self.width)

    def split(self, x: Tensor, batch: int, length: int) -> Tensor:
        """x [B*S, D] of all heads -> [B, H, S, W]."""
        return self.transpose(x.reshape(batch, length, self.heads, self.width), (0, 2, 1, 3))

    def construct(self, q: Tensor, k: Tensor, v: Tensor, masks: tuple[Tensor, ...], keys: Tensor) -> Tensor:
        batch, length = masks[0].shape[0], masks[-1].shape[3]
        q = self.split(q * self.scale, batch, length)
        k = self.split(k, batch, length)
        v = self.split(v, batch, length)
        if self.rate > 0.0:
            y = self.core(q, k, v, masks, keys)
        else:
            y, _ = self.core(q, k, v, masks)
        return self.transpose(y, (0, 2, 1, 3)).reshape(batch * length, self.heads * self.width)


class CompiledAttentionCore(nn.Cell):
    """The same function as one compiled kernel, which needs no masks but the segments themselves."""

    def __init__(self, heads: int, kernels: str) -> None:
        super().__init__()
        self.core = CompiledAttention(kernels, heads)

    def construct(self, q: Tensor, k: Tensor, v: Tensor, masks: tuple[Tensor, ...], keys: Tensor) -> Tensor:
        return self.core(q, k, v, masks[0])[0]


class SegmentsAsMask(nn.Cell):
    """segments int32 [B, S] -> (segments,): what stands for the masks where the compiled kernel is used."""

    def construct(self, segments: Tensor) -> tuple[Tensor, ...]:
        return (segments,)


def is_compiled(layout: Layout, dropout: float) -> bool:
    """Whether attention runs as a compiled kernel, which knows no dropout on the probabilities."""
    return bool(layout.kernels) and dropout == 0.0


def is_native(layout: Layout, dropout: float) -> bool:
    """Whether attention runs as the device's own operators with their own gradients."""
    return layout.native and dropout == 0.0


def attention_mask(heads: int, layout: Layout, dropout: float, compute: ms.dtype = ms.float32) -> nn.Cell:
    """The cell that turns segments [B, S] into what every layer's attention takes as `masks`."""
    if is_native(layout, dropout):
        return NativeMask(layout, compute)
    return SegmentsAsMask() if is_compiled(layout, dropout) else CausalMask(heads)


class Attention(nn.Cell):
    """x_TD (and for the query layer its own query rows) -> y_TD.

    Biases, the norms of projected queries and keys, and what turns both are the configuration's (`turns`: () or those
    of `RotaryPositions`).
    """

    def __init__(self, model: ModelConfig, layer: int, layout: Layout, compute: ms.dtype) -> None:
        super().__init__()
        hidden, heads, dropout = model.hidden, model.heads, model.attention.dropout
        by_heads = (1, "tensor")
        self.query = LinearCell(hidden, hidden, layout, compute, model.init_std, model.biases, by_heads)
        self.key = LinearCell(hidden, hidden, layout, compute, model.init_std, model.biases, by_heads)
        self.value = LinearCell(hidden, hidden, layout, compute, model.init_std, model.biases, by_heads)
        self.projection = LinearCell(hidden, hidden, layout, compute, model.residual_std, model.biases, ("tensor", 1))
        self.normalises = model.attention.qk_norm
        if self.normalises:
            self.query_norm = NORMS[model.norm](hidden, model.norm_epsilon, layout)
            self.key_norm = NORMS[model.norm](hidden, model.norm_epsilon, layout)
        self.rotates = model.position == "rope"
        if self.rotates:
            self.turn = turn(layout, heads, hidden // heads)
        if is_native(layout, dropout):
            self.core = NativeAttention(hidden, heads, layout, compute)
        elif is_compiled(layout, dropout):
            self.core = CompiledAttentionCore(heads, layout.kernels)
        else:
            self.core = ComposedAttention(hidden, heads, layout, compute, dropout, layer)

    def construct(self, query_rows: Tensor, x: Tensor, masks: tuple[Tensor, ...], turns: tuple, keys: Tensor) -> Tensor:
        q, k = self.query(query_rows), self.key(x)
        if self.normalises:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rotates:
            q, k = self.turn(q, turns), self.turn(k, turns)
        return self.projection(self.core(q, k, self.value(x), masks, keys))
