"""Dropout whose mask is counted: a function of (seed, step, global sample, layer, site), so that resume repeats it.

MindSpore's own generator state does not restore dropout on CPU, and a kept state would depend on the number of
processes. The mask is an integer hash (the 32-bit finaliser of MurmurHash3) of a per-sample key and the element's
number inside the sample.
"""

from __future__ import annotations

import hashlib

import mindspore as ms
from mindspore import Tensor, nn, ops

# MurmurHash3's two multipliers and the golden-ratio increment, as signed 32-bit numbers.
FIRST, SECOND, GOLDEN = -2048144789, -1028477387, -1640531527


class CountedUniform(nn.Cell):
    """Counter-based uniform numbers: keys int32 [B] -> uniform float32 [B, count] in [0, 1), one stream per (key,
    layer, site)."""

    def __init__(self, layer: int, site: str) -> None:
        super().__init__()
        digest = hashlib.sha256(f"{layer} {site}".encode()).digest()
        self.salt = int.from_bytes(digest[:4], "little", signed=True)

    def right(self, x: Tensor, bits: int) -> Tensor:
        """x shifted right by `bits`, zeros coming in."""
        # RightShift keeps the sign; the mask makes it the unsigned shift that the hash is defined with.
        shifted = ops.bitwise_right_shift(x, Tensor(bits, ms.int32))
        return ops.bitwise_and(shifted, Tensor((1 << (32 - bits)) - 1, ms.int32))

    def mix(self, x: Tensor) -> Tensor:
        """MurmurHash3's 32-bit finaliser."""
        x = ops.bitwise_xor(x, self.right(x, 16)) * FIRST
        x = ops.bitwise_xor(x, self.right(x, 13)) * SECOND
        return ops.bitwise_xor(x, self.right(x, 16))

    def construct(self, keys: Tensor, count: int) -> Tensor:
        element = ops.arange(count).astype(ms.int32).reshape(1, count) * GOLDEN
        key = self.mix(ops.bitwise_xor(keys, Tensor(self.salt, ms.int32))).reshape(-1, 1)
        shape = (keys.shape[0], count)
        hashed = self.mix(ops.bitwise_xor(ops.BroadcastTo(shape)(element), ops.BroadcastTo(shape)(key)))
        return ops.cast(self.right(hashed, 8), ms.float32) * (1.0 / (1 << 24))


class CountedDropout(nn.Cell):
    """Dropout: x with a leading axis of B samples (or B*S rows) -> x * keep / (1 - rate); the identity outside
    training."""

    def __init__(self, rate: float, layer: int, site: str) -> None:
        super().__init__()
        self.drops = rate > 0.0
        if self.drops:
            self.masked = MaskedByKeys(rate, layer, site)

    def construct(self, x: Tensor, keys: Tensor) -> Tensor:
        if not self.drops or not self.training:
            return x
        y, _ = self.masked(x, keys)
        return y


class MaskedByKeys(nn.Cell):
    """Dropout with its own gradient: (x, keys) -> (x * keep / (1 - rate), keep / (1 - rate)); only the first has a
    gradient.

    The gradient is written by hand because MindSpore's recomputation makes a cycle of the graph it derives itself.
    """

    def __init__(self, rate: float, layer: int, site: str) -> None:
        super().__init__()
        self.rate = rate
        self.uniform = CountedUniform(layer, site)

    def construct(self, x: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        drawn = self.uniform(keys, x.size // keys.shape[0])
        keep = ops.cast(ops.greater_equal(drawn, self.rate), x.dtype) * (1.0 / (1.0 - self.rate))
        keep = keep.reshape(x.shape)
        return x * keep, keep

    def bprop(
        self, x: Tensor, keys: Tensor, out: tuple[Tensor, Tensor], dout: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        return dout[0] * out[1], ops.zeros_like(keys)
