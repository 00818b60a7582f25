"""Attention cores (see `Attention`) with a KV cache: over a prompt, and over a cache in two forms that compute alike.

Legend: B rows of the batch (one token of one text each), C positions of a prompt, L positions that a cache holds,
H heads, W head width. Everything is laid out head by head, [B*H, L, W], so that a row's query, key and value [B, D] are
[B*H, 1, W] as they stand in memory, and nothing is transposed.
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from pangu_sigma.config.model_section import ModelConfig
from pangu_sigma.model.layers.native_attention import MASKED_SCORE
from parallel.operator_layout import Layout

THREE_AXES = (1, 1, 1)


class DotProductAttention(nn.Cell):
    """Dot-product attention, base of all forms: softmax(q k^T + mask) v over three axes, products in the precision of k
    and v, softmax in float32. `scale` is for the queries."""

    def __init__(self, model: ModelConfig, layout: Layout, precision: ms.dtype) -> None:
        super().__init__()
        self.heads, self.width = model.heads, model.hidden // model.heads
        self.scale = 1.0 / math.sqrt(self.width)
        self.low = precision != ms.float32
        self.precision = precision
        self.multiply_transposed = layout(ops.BatchMatMul(transpose_b=True), THREE_AXES, THREE_AXES)
        self.multiply = layout(ops.BatchMatMul(), THREE_AXES, THREE_AXES)
        self.softmax = layout(ops.Softmax(-1), THREE_AXES)
        self.add = layout(ops.Add(), THREE_AXES, THREE_AXES)
        self.cast = layout(ops.Cast(), THREE_AXES)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """q [N, Q, W], k and v [N, L, W], additive mask [N, Q, L] -> [N, Q, W]."""
        return self.weighted_sum(self.softmax(self.add(self.scores(q, k), mask)), v)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """q k^T, float32 [N, Q, L]."""
        if self.low:
            return self.cast(self.multiply_transposed(self.lowered(q), k), ms.float32)
        return self.multiply_transposed(q, k)

    def weighted_sum(self, p: Tensor, v: Tensor) -> Tensor:
        """p [N, Q, L] @ v, float32 [N, Q, W]."""
        if self.low:
            return self.cast(self.multiply(self.lowered(p), v), ms.float32)
        return self.multiply(p, v)

    def lowered(self, x: Tensor) -> Tensor:
        """x in the precision of the products."""
        return self.cast(x, self.precision) if self.low else x


class PromptAttention(DotProductAttention):
    """Causal attention of a block of one document over itself and what is cached of the document: q, k, v [C, D] ->
    (y [C, D], (k, v)).

    `context`: (`causal_mask`,), or (`BlockMask`, keys, values [H, L, W]) of the positions before the block.
    """

    def __init__(self, model: ModelConfig, layout: Layout, precision: ms.dtype) -> None:
        super().__init__(model, layout, precision)
        self.transpose = layout(ops.Transpose(), THREE_AXES)
        self.behind = layout(ops.Concat(1), THREE_AXES, THREE_AXES)

    def split(self, x: Tensor) -> Tensor:
        """x [C, D] of all heads -> [H, C, W]."""
        return self.transpose(x.reshape(-1, self.heads, self.width), (1, 0, 2))

    def construct(self, q: Tensor, k: Tensor, v: Tensor, context: tuple[Tensor, ...], keys: Tensor):
        length = q.shape[0]
        heads_k, heads_v = self.lowered(self.split(k)), self.lowered(self.split(v))
        all_k, all_v = heads_k, heads_v
        if len(context) == 3:
            all_k, all_v = self.behind((context[1], heads_k)), self.behind((context[2], heads_v))
        y = self.attend(self.split(q * self.scale), all_k, all_v, context[0])
        y = self.transpose(y, (1, 0, 2)).reshape(length, self.heads * self.width)
        return y, (heads_k, heads_v)


def causal_mask(heads: int, length: int) -> np.ndarray:
    """Additive mask float32 [H, C, C]: 0 where key <= query. At full shape, because broadcasts are slow on CPU."""
    mask = np.triu(np.full((length, length), MASKED_SCORE, np.float32), 1)
    return np.ascontiguousarray(np.broadcast_to(mask, (heads, length, length)))


class BlockMask(nn.Cell):
    """Additive mask of a block behind a cache: the block's positions int32 [C], `causal_mask` [H, C, C] ->
    [H, C, L + C] that shows of the cache what lies before the block."""

    def __init__(self, heads: int, length: int, cached: int, layout: Layout) -> None:
        super().__init__()
        self.shape = (heads, length, cached)
        self.keys = Tensor(np.arange(cached, dtype=np.int32).reshape(1, 1, cached))
        self.less = layout(ops.Less(), THREE_AXES, THREE_AXES)
        self.cast = layout(ops.Cast(), THREE_AXES)
        self.spread = layout(ops.BroadcastTo(self.shape), THREE_AXES)
        self.beside = layout(ops.Concat(2), THREE_AXES, THREE_AXES)

    def construct(self, positions: Tensor, causal: Tensor):
        visible = self.cast(self.less(self.keys, positions[0].reshape(1, 1, 1)), ms.float32)
        return self.beside((self.spread((visible - 1.0) * (-MASKED_SCORE)), causal))


class PositionOneHot(nn.Cell):
    """One-hot encoding of positions: int32 [B] -> float32 [B*H, 1, L], 1 at a row's position, else 0."""

    def __init__(self, rows: int, heads: int, length: int, layout: Layout) -> None:
        super().__init__()
        self.shape = (rows, heads, length)
        self.keys = Tensor(np.arange(length, dtype=np.int32).reshape(1, 1, length))
        self.equal = layout(ops.Equal(), THREE_AXES, THREE_AXES)
        self.cast = layout(ops.Cast(), THREE_AXES)
        self.spread = layout(ops.BroadcastTo(self.shape), THREE_AXES)

    def construct(self, positions: Tensor) -> Tensor:
        one_hot = self.spread(self.cast(self.equal(self.keys, positions.reshape(-1, 1, 1)), ms.float32))
        return one_hot.reshape(self.shape[0] * self.shape[1], 1, self.shape[2])


class CacheMask(nn.Cell):
    """Additive mask of a cache: positions int32 [B] -> [B*H, 1, L] that shows keys up to a row's position."""

    def __init__(self, rows: int, heads: int, length: int, layout: Layout) -> None:
        super().__init__()
        self.shape = (rows, heads, length)
        self.keys = Tensor(np.arange(length, dtype=np.int32).reshape(1, 1, length))
        self.less_equal = layout(ops.LessEqual(), THREE_AXES, THREE_AXES)
        self.cast = layout(ops.Cast(), THREE_AXES)
        self.spread = layout(ops.BroadcastTo(self.shape), THREE_AXES)

    def construct(self, positions: Tensor) -> Tensor:
        visible = self.cast(self.less_equal(self.keys, positions.reshape(-1, 1, 1)), ms.float32)
        mask = self.spread((visible - 1.0) * (-MASKED_SCORE))
        return mask.reshape(self.shape[0] * self.shape[1], 1, self.shape[2])


class ParameterCacheAttention(DotProductAttention):
    """Attention over a cache in two parameters [B*H, L, W], which the graph writes: q, k, v [B, D] -> (y [B, D], ()).

    The form for accelerators, where the cache must stay on the device. `context`: indices int32 [B*H, 2] to write to
    (row and head, position) and the mask of `CacheMask`.
    """

    def __init__(self, model: ModelConfig, rows: int, length: int, layout: Layout, precision: ms.dtype) -> None:
        super().__init__(model, layout, precision)
        heads = rows * self.heads
        shape = (heads, length, self.width)
        self.keys = Parameter(ms.ops.zeros(shape, precision), name="keys", requires_grad=False)
        self.values = Parameter(ms.ops.zeros(shape, precision), name="values", requires_grad=False)
        self.flat = (heads, self.width)
        self.query_shape = (heads, 1, self.width)
        self.out_shape = (rows, model.hidden)
        self.write = layout(ops.ScatterNdUpdate())

    def construct(self, q: Tensor, k: Tensor, v: Tensor, context: tuple[Tensor, ...], keys: Tensor):
        indices, mask = context
        q = (q * self.scale).reshape(self.query_shape)
        keys = self.write(self.keys, indices, self.lowered(k.reshape(self.flat)))
        values = self.write(self.values, indices, self.lowered(v.reshape(self.flat)))
        return self.attend(q, keys, values, mask).reshape(self.out_shape), ()


class ReadOnlyCacheAttention(DotProductAttention):
    """Attention over a cache in two inputs that are only read: q, k, v [B, D] -> (y [B, D], (k, v) [B*H, 1, W]).

    The form for CPU, where the host writes the new rows into memory that it shares with the inputs; there an update
    inside the graph copies the cache. `context`: the `PositionOneHot` [B*H, 1, L]; the mask of `CacheMask`; keys,
    values [B*H, L, W], zero from a row's position on. So the score of the row's own key is
    added where the cache gave 0, and its own value is mixed in by the weight at its position.
    """

    def __init__(self, model: ModelConfig, rows: int, layout: Layout, precision: ms.dtype) -> None:
        super().__init__(model, layout, precision)
        self.shape = (rows * self.heads, 1, self.width)
        self.out_shape = (rows, model.hidden)
        self.spread = layout(ops.BatchMatMul(), THREE_AXES, THREE_AXES)
        self.pick = layout(ops.BatchMatMul(transpose_b=True), THREE_AXES, THREE_AXES)

    def construct(self, q: Tensor, k: Tensor, v: Tensor, context: tuple[Tensor, ...], keys: Tensor):
        one_hot, mask, cached_keys, cached_values = context
        q = (q * self.scale).reshape(self.shape)
        k, v = self.lowered(k.reshape(self.shape)), self.lowered(v.reshape(self.shape))
        scores = self.add(self.scores(q, cached_keys), self.spread(self.scores(q, k), one_hot))
        p = self.softmax(self.add(scores, mask))
        y = self.add(self.weighted_sum(p, cached_values), self.weighted_sum(self.pick(p, one_hot), v))
        return y.reshape(self.out_shape), (k, v)
