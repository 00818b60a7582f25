"""Causal multi-head attention. On CPU it is computed in query chunks, so that the masked half of the score matrix is
skipped.

Legend: B samples, S positions, T = B*S rows, D hidden width, H heads, W = D/H head width, C query chunks; q queries of
a chunk, k keys that they see.
"""

from __future__ import annotations

import math

import mindspore as ms
from mindspore import Tensor, nn, ops

from pangu_sigma.config.model_section import ModelConfig
from pangu_sigma.model.layers.dropout import CountedDropout
from pangu_sigma.model.layers.linear import LinearCell
from pangu_sigma.model.layers.native_attention import MASKED_SCORE, NativeAttention, NativeMask
from parallel.operator_layout import Layout
from parallel.ops.compiled_kernels import CompiledAttention
from parallel.ops.rotary import rotary

SMALLEST_CHUNK = 64
MOST_CHUNKS = 4


def chunk_count(length: int) -> int:
    """Query chunks for a sequence: C chunks compute (C + 1) / (2 C) of the score matrix; more than 4 gain nothing."""
    chunks = MOST_CHUNKS
    while chunks > 1 and (length % chunks or length // chunks < SMALLEST_CHUNK):
        chunks //= 2
    return chunks


class CausalMask(nn.Cell):
    """Additive attention masks of packed documents: segments [B, S] -> C masks [B, H, q, k], 0 where key <= query in
    one document, `MASKED_SCORE` elsewhere.

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
            mask_Bqk = (ops.cast(visible, ms.float32) - 1.0) * (-MASKED_SCORE)
            masks = masks + (ops.BroadcastTo((batch, self.heads, size, end))(mask_Bqk.reshape(batch, 1, size, end)),)
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
        self.multiply_transposed = layout(ops.BatchMatMul(transpose_b=True), four, four)
        self.multiply = layout(ops.BatchMatMul(), four, four)
        self.transposed_multiply = layout(ops.BatchMatMul(transpose_a=True), four, four)
        self.softmax = layout(ops.Softmax(-1), four)
        self.add = layout(ops.Add(), four, four)
        self.mul = layout(ops.Mul(), four, four)
        self.row_sum = layout(ops.ReduceSum(keep_dims=True), four)
        self.concat_columns = layout(ops.Concat(-1), four)
        self.concat_positions = layout(ops.Concat(2), four)
        self.slice = layout(ops.Slice(), four)
        self.sum_all = layout(ops.AddN())
        self.cast = layout(ops.Cast(), four)

    def take_positions(self, x_BHSW: Tensor, start: int, end: int) -> Tensor:
        """Positions `start` to `end` of x."""
        batch, heads, _, width = x_BHSW.shape
        return self.slice(x_BHSW, (0, 0, start, 0), (batch, heads, end - start, width))

    def to_compute(self, x: Tensor) -> Tensor:
        """x in the precision of the products."""
        return x if self.compute == ms.float32 else self.cast(x, self.compute)

    def to_float32(self, x: Tensor) -> Tensor:
        """x in float32."""
        return x if self.compute == ms.float32 else self.cast(x, ms.float32)

    def construct(self, q_BHSW: Tensor, k_BHSW: Tensor, v_BHSW: Tensor, masks: tuple[Tensor, ...]):
        length = q_BHSW.shape[2]
        size = length // len(masks)
        q_BHSW, k_BHSW, v_BHSW = self.to_compute(q_BHSW), self.to_compute(k_BHSW), self.to_compute(v_BHSW)
        chunks, probabilities = (), ()
        for c in range(len(masks)):
            end = (c + 1) * size
            q_BHqW, k_BHkW = self.take_positions(q_BHSW, c * size, end), self.take_positions(k_BHSW, 0, end)
            scores_BHqk = self.to_float32(self.multiply_transposed(q_BHqW, k_BHkW))
            p_BHqk = self.softmax(self.add(scores_BHqk, masks[c]))
            v_BHkW = self.take_positions(v_BHSW, 0, end)
            chunks = chunks + (self.to_float32(self.multiply(self.to_compute(p_BHqk), v_BHkW)),)
            probabilities = probabilities + (p_BHqk,)
        y_BHSW = chunks[0] if len(masks) == 1 else self.concat_positions(chunks)
        return y_BHSW, probabilities

    def bprop(self, q_BHSW: Tensor, k_BHSW: Tensor, v_BHSW: Tensor, masks: tuple[Tensor, ...], out, dout):
        y_BHSW, probabilities = out
        dy_BHSW = dout[0]
        batch, heads, length, width = q_BHSW.shape
        size = length // len(masks)
        # 1. One column more than W: dO beside its row term, V beside -1; their product is dP - sum(dO * O).
        row_term = self.row_sum(self.mul(dy_BHSW, y_BHSW), -1)
        dy_and_term = self.to_compute(self.concat_columns((dy_BHSW, row_term)))
        minus_one = ops.fill(ms.float32, (batch, heads, length, 1), -1.0)
        v_and_minus_one = self.to_compute(self.concat_columns((v_BHSW, minus_one)))
        q_BHSW, k_BHSW, dy_BHSW = self.to_compute(q_BHSW), self.to_compute(k_BHSW), self.to_compute(dy_BHSW)
        dq, dk, dv = (), (), ()
        # 2. Each chunk's gradients; those of keys that it does not see are zero.
        for c in range(len(masks)):
            start, end = c * size, (c + 1) * size
            p_BHqk = probabilities[c]
            v_chunk = self.take_positions(v_and_minus_one, 0, end)
            dp_BHqk = self.to_float32(
                self.multiply_transposed(self.take_positions(dy_and_term, start, end), v_chunk)
            )
            ds_BHqk = self.to_compute(self.mul(p_BHqk, dp_BHqk))
            dq = dq + (self.to_float32(self.multiply(ds_BHqk, self.take_positions(k_BHSW, 0, end))),)
            q_BHqW, dy_BHqW = self.take_positions(q_BHSW, start, end), self.take_positions(dy_BHSW, start, end)
            dk_BHkW = self.to_float32(self.transposed_multiply(ds_BHqk, q_BHqW))
            dv_BHkW = self.to_float32(self.transposed_multiply(self.to_compute(p_BHqk), dy_BHqW))
            if end < length:
                zeros = ops.fill(ms.float32, (batch, heads, length - end, width), 0.0)
                dk_BHkW, dv_BHkW = self.concat_positions((dk_BHkW, zeros)), self.concat_positions((dv_BHkW, zeros))
            dk, dv = dk + (dk_BHkW,), dv + (dv_BHkW,)
        # 3. Queries' chunks follow one another; keys and values add up what every chunk gave them.
        if len(masks) == 1:
            return dq[0], dk[0], dv[0], masks
        return self.concat_positions(dq), self.sum_all(dk), self.sum_all(dv), masks


class DropoutDotProduct(nn.Cell):
    """`ScaledDotProduct` with dropout on the probabilities, which the chunked gradient does not cover."""

    def __init__(self, layout: Layout, rate: float, layer: int) -> None:
        super().__init__()
        four = (1, 1, 1, 1)
        self.multiply_transposed = layout(ops.BatchMatMul(transpose_b=True), four, four)
        self.multiply = layout(ops.BatchMatMul(), four, four)
        self.softmax = layout(ops.Softmax(-1), four)
        self.concat_positions = layout(ops.Concat(2), four)
        self.dropout = CountedDropout(rate, layer, "attention probabilities")

    def construct(
        self, q_BHSW: Tensor, k_BHSW: Tensor, v_BHSW: Tensor, masks: tuple[Tensor, ...], keys: Tensor
    ) -> Tensor:
        length = q_BHSW.shape[2]
        size = length // len(masks)
        chunks = ()
        for c in range(len(masks)):
            end = (c + 1) * size
            scores_BHqk = self.multiply_transposed(q_BHSW[:, :, c * size : end], k_BHSW[:, :, :end])
            p_BHqk = self.softmax(scores_BHqk + masks[c])
            chunks = chunks + (self.multiply(self.dropout(p_BHqk, keys + c), v_BHSW[:, :, :end]),)
        return chunks[0] if len(masks) == 1 else self.concat_positions(chunks)


class ComposedAttention(nn.Cell):
    """Attention core of MindSpore's operators: q, k, v [T, D] of all heads, masks of `CausalMask` -> (y [T, D], ())."""

    def __init__(self, hidden: int, heads: int, layout: Layout, compute: ms.dtype, dropout: float, layer: int) -> None:
        super().__init__()
        self.heads = heads
        self.width = hidden // heads
        self.rate = dropout
        self.core = DropoutDotProduct(layout, dropout, layer) if dropout else ScaledDotProduct(layout, compute)
        self.transpose = layout(ops.Transpose(), (1, 1, 1, 1))
        self.scale = 1.0 / math.sqrt(self.width)

    def split_heads(self, x_TD: Tensor, batch: int, length: int) -> Tensor:
        """x [B*S, D] of all heads -> [B, H, S, W]."""
        return self.transpose(x_TD.reshape(batch, length, self.heads, self.width), (0, 2, 1, 3))

    def construct(self, q_TD: Tensor, k_TD: Tensor, v_TD: Tensor, masks: tuple[Tensor, ...], keys: Tensor):
        batch, length = masks[0].shape[0], masks[-1].shape[3]
        q_BHSW = self.split_heads(q_TD * self.scale, batch, length)
        k_BHSW = self.split_heads(k_TD, batch, length)
        v_BHSW = self.split_heads(v_TD, batch, length)
        if self.rate > 0.0:
            y_BHSW = self.core(q_BHSW, k_BHSW, v_BHSW, masks, keys)
        else:
            y_BHSW, _ = self.core(q_BHSW, k_BHSW, v_BHSW, masks)
        return self.transpose(y_BHSW, (0, 2, 1, 3)).reshape(batch * length, self.heads * self.width), ()


class CompiledAttentionCore(nn.Cell):
    """`ComposedAttention` as one compiled CPU kernel, which needs no masks but the segments themselves."""

    def __init__(self, heads: int, kernels: str) -> None:
        super().__init__()
        self.core = CompiledAttention(kernels, heads)

    def construct(self, q_TD: Tensor, k_TD: Tensor, v_TD: Tensor, masks: tuple[Tensor, ...], keys: Tensor):
        return self.core(q_TD, k_TD, v_TD, masks[0])[0], ()


class SegmentsAsMask(nn.Cell):
    """segments int32 [B, S] -> (segments,): what stands for the masks where the compiled kernel is used."""

    def construct(self, segments: Tensor) -> tuple[Tensor, ...]:
        return (segments,)


def is_compiled(model: ModelConfig, layout: Layout) -> bool:
    """Whether attention runs as a compiled kernel."""
    return bool(layout.kernels) and not model.attention.composed_only


def is_native(model: ModelConfig, layout: Layout) -> bool:
    """Whether attention runs as the device's own operators with their own gradients."""
    return layout.native and not model.attention.composed_only


def attention_mask(model: ModelConfig, layout: Layout, compute: ms.dtype) -> nn.Cell:
    """The cell that makes the attention masks: segments int32 [B, S] -> what every layer's attention takes as
    `masks`."""
    if is_native(model, layout):
        return NativeMask(layout, compute)
    return SegmentsAsMask() if is_compiled(model, layout) else CausalMask(model.heads)


def training_core(model: ModelConfig, layer: int, layout: Layout, compute: ms.dtype) -> nn.Cell:
    """The attention core of training and evaluation, over whole sequences (see `Attention`)."""
    if is_native(model, layout):
        return NativeAttention(model.hidden, model.heads, layout, compute)
    if is_compiled(model, layout):
        return CompiledAttentionCore(model.heads, layout.kernels)
    return ComposedAttention(model.hidden, model.heads, layout, compute, model.attention.dropout, layer)


class Attention(nn.Cell):
    """Multi-head self-attention of a layer: x_TD, and for the query layer its own query rows [T, D] -> (y_TD, what the
    core keeps).

    Between the projections stands a `core`: q, k, v [T, D] of all heads, `context`, dropout keys -> (softmax(q k^T /
    sqrt(W)) v [T, D], new keys and values for a cache). What it sees is its own business, and so is `context`: the
    masks of `attention_mask` for training's, a cache for decoding's (`pangu_sigma.generation.kv_cache_attention`).
    Biases, the norms of projected queries and keys (QK norm) and rotary position embeddings are the configuration's
    (`cos_sin`: () or those of `RotaryPositions`).
    """

    def __init__(self, model: ModelConfig, layer: int, layout: Layout, compute: ms.dtype, core: nn.Cell | None) -> None:
        super().__init__()
        hidden = model.hidden
        by_heads = (1, "tensor")
        self.query = LinearCell(hidden, hidden, layout, compute, model.init_std, model.biases, by_heads)
        self.key = LinearCell(hidden, hidden, layout, compute, model.init_std, model.biases, by_heads)
        self.value = LinearCell(hidden, hidden, layout, compute, model.init_std, model.biases, by_heads)
        self.projection = LinearCell(hidden, hidden, layout, compute, model.residual_std, model.biases, ("tensor", 1))
        self.normalises = model.attention.qk_norm
        if self.normalises:
            self.query_norm, self.key_norm = (model.norm_spec.build(model, layout) for _ in range(2))
        self.rotates = model.position_spec.rotates
        if self.rotates:
            self.apply_rotary = rotary(layout, model.heads, hidden // model.heads)
        self.core = core or training_core(model, layer, layout, compute)

    def construct(self, query_rows: Tensor, x_TD: Tensor, cos_sin: tuple, context: tuple, keys: Tensor):
        q_TD, k_TD = self.query(query_rows), self.key(x_TD)
        if self.normalises:
            q_TD, k_TD = self.query_norm(q_TD), self.key_norm(k_TD)
        if self.rotates:
            q_TD, k_TD = self.apply_rotary(q_TD, cos_sin), self.apply_rotary(k_TD, cos_sin)
        y_TD, kept = self.core(q_TD, k_TD, self.value(x_TD), context, keys)
        return self.projection(y_TD), kept
