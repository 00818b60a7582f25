"""Causal attention of a device's own operators, sharded over a mesh by samples and heads (tensor parallelism).

Flash attention where the device has it and the compute type is one of its own (float16, bfloat16), else composed. Both
with MindSpore's gradients.

Legend: B samples, S positions, T = B*S rows, D hidden width, H heads, W = D/H head width.
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from parallel.operator_layout import Layout

MASKED_SCORE = -10000.0  # PanGu-alpha's value; its exponential is 0 in float32
WHOLE_WINDOW = 2**31 - 1  # tokens before and after a query that flash attention looks at: all


def uses_flash(layout: Layout, compute: ms.dtype) -> bool:
    """Whether attention is the device's fused operator, which computes in two-byte types alone."""
    return layout.device == "Ascend" and compute in (ms.float16, ms.bfloat16)


class NativeMask(nn.Cell):
    """Attention mask of packed documents: segments int32 [B, S] -> (mask [B, 1, S, S],), for flash attention uint8, 1
    where a key is hidden from a query; else float32, added to the scores. A query sees the keys of its own document up
    to itself."""

    def __init__(self, layout: Layout, compute: ms.dtype) -> None:
        super().__init__()
        self.flash = uses_flash(layout, compute)
        three = ("rows", 1, 1)
        self.queries = layout(ops.ExpandDims(), ("rows", 1))
        self.keys = layout(ops.ExpandDims(), ("rows", 1))
        self.other = layout(ops.NotEqual(), three, three)
        self.later = layout(ops.Greater(), (1, 1, 1), (1, 1, 1))
        self.either = layout(ops.LogicalOr(), three, (1, 1, 1))
        self.cast = layout(ops.Cast(), three)
        self.for_heads = layout(ops.ExpandDims(), three)
        self.scale = layout(ops.Mul(), three, ())
        self.masked = Tensor(MASKED_SCORE, ms.float32)

    def construct(self, segments: Tensor) -> tuple[Tensor, ...]:
        length = segments.shape[1]
        positions = np.arange(length, dtype=np.int32)
        query, key = Tensor(positions.reshape(1, length, 1)), Tensor(positions.reshape(1, 1, length))
        hidden = self.either(self.other(self.queries(segments, 2), self.keys(segments, 1)), self.later(key, query))
        if self.flash:
            return (self.for_heads(self.cast(hidden, ms.uint8), 1),)
        return (self.for_heads(self.scale(self.cast(hidden, ms.float32), self.masked), 1),)


class NativeAttention(nn.Cell):
    """Attention core of all heads: q, k, v [T, D], the mask of `NativeMask` -> (softmax(q k^T / sqrt(W) + mask) v
    [T, D], ())."""

    def __init__(self, hidden: int, heads: int, layout: Layout, compute: ms.dtype) -> None:
        super().__init__()
        self.heads, self.width, self.compute = heads, hidden // heads, compute
        self.flash = uses_flash(layout, compute)
        four = ("rows", "tensor", 1, 1)
        scale = 1.0 / math.sqrt(self.width)
        self.low = layout(ops.Cast(), ("rows", "tensor"))
        self.reshape = ops.Reshape()
        self.split = layout(ops.Transpose(), ("rows", 1, "tensor", 1))
        self.join = layout(ops.Transpose(), four)
        self.full = layout(ops.Cast(), ("rows", "tensor"))
        if self.flash:
            fused = ops.operations.nn_ops.FlashAttentionScore(
                heads, 1.0, scale, WHOLE_WINDOW, WHOLE_WINDOW, 0, "BNSD", 0
            )
            self.attention = layout(fused, four, four, four, ("rows", 1, 1, 1))
            return
        self.scores = layout(ops.BatchMatMul(transpose_b=True), four, four)
        self.full_scores = layout(ops.Cast(), four)
        self.scale = layout(ops.Mul(), four, ())
        self.add_mask = layout(ops.Add(), four, ("rows", 1, 1, 1))
        self.softmax = layout(ops.Softmax(-1), four)
        self.low_scores = layout(ops.Cast(), four)
        self.product = layout(ops.BatchMatMul(), four, four)
        self.factor = Tensor(scale, ms.float32)

    def split_heads(self, x_TD: Tensor, batch: int, length: int) -> Tensor:
        """x [B*S, D] of all heads -> [B, H, S, W] in the precision of the products."""
        x_BSHW = self.reshape(self.low(x_TD, self.compute), (batch, length, self.heads, self.width))
        return self.split(x_BSHW, (0, 2, 1, 3))

    def construct(self, q_TD: Tensor, k_TD: Tensor, v_TD: Tensor, masks: tuple[Tensor, ...], keys: Tensor):
        mask = masks[0]
        batch, length = mask.shape[0], mask.shape[2]
        q_BHSW = self.split_heads(q_TD, batch, length)
        k_BHSW = self.split_heads(k_TD, batch, length)
        v_BHSW = self.split_heads(v_TD, batch, length)
        if self.flash:
            y_BHSW = self.attention(q_BHSW, k_BHSW, v_BHSW, None, None, None, mask, None)[3]
        else:
            scores_BHSS = self.scale(self.full_scores(self.scores(q_BHSW, k_BHSW), ms.float32), self.factor)
            p_BHSS = self.softmax(self.add_mask(scores_BHSS, mask))
            y_BHSW = self.product(self.low_scores(p_BHSS, self.compute), v_BHSW)
        y_TD = self.reshape(self.join(y_BHSW, (0, 2, 1, 3)), (batch * length, self.heads * self.width))
        return self.full(y_TD, ms.float32), ()
