"""Fused decode step: compiled kernels for decoding on CPU (`kernels/decode.c`): one token for each of B texts, a layer
at a time.

Inference only, float32. A row's result depends on that row alone, to the bit. Legend: B rows, D hidden, F inner width,
H heads, W = D/H, L cache positions, V vocabulary.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn

from parallel.ops.compiled_kernels import ACTIVATIONS, _kernel


class CompiledDecodeLayer(nn.Cell):
    """Base of a decode step's transformer layer as one compiled kernel, `run`: h [B, D], queries [B, D], positions
    int32 [B], keys and values [B*H, L, W], `settings`, `epsilon`, 12 tensors of the layer, then 4 or 4 B of its
    networks -> (h [B, D], key and value [B*H, 1, W] of every row).

    The 12 are gamma, beta, then weight and bias of query, key, value and projection, gamma, beta; a network's 4 are
    weight and bias up and down. A row sees its cache before its position. With `from_queries` the attention's queries
    are made of `queries`, else of h.
    """

    def __init__(self, path: str, heads: int, activation: str, epsilon: float, from_queries: bool) -> None:
        super().__init__(auto_prefix=False)
        self.settings = Tensor([heads, ACTIVATIONS[activation], int(from_queries)], ms.int32)
        self.epsilon = Tensor([epsilon], ms.float32)

        def shapes(h, queries, positions, keys, values, settings, epsilon, *weights):
            new = [keys[0], 1, keys[2]]
            return h, new, new, [h[0], 3 * h[1] + weights[12][1] + heads * (keys[1] + 1) + 3]

        self.run = _kernel(path, "decode_layer", shapes, lambda h, *_: (h, h, h, h))


class CompiledDecodeHead(nn.Cell):
    """Base of a decode step's output head as a compiled kernel, `run`: h [B, D], one word table [V, D] or one of each
    row -> logits [B, V]."""

    def __init__(self, path: str) -> None:
        super().__init__(auto_prefix=False)
        self.run = _kernel(path, "decode_head", lambda h, *tables: [h[0], tables[0][0]], lambda h, *_: h)
