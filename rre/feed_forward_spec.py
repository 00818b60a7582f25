"""Feed-forward spec: tensors and shapes of one feed-forward network, known before any framework is loaded.

A spec serves dense layers' networks as well as experts and shared experts; a model may have one for each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class FeedForwardSpec:
    """Spec of a feed-forward network: activation(x W_up + b_up) W_down + b_down.

    `gated`: (activation(x W_gate) * (x W_up)) W_down without `biases`, which is SwiGLU with silu and GEGLU with gelu
    (Shazeer 2020, arXiv 2002.05202, equation 6).
    """

    activation: str
    gated: bool = False
    biases: bool = True

    def shapes(self, hidden: int, ffn: int) -> dict[str, Shape]:
        """Shapes of the network's tensors, [in, out], in the order in which every graph and kernel takes them."""
        shapes: dict[str, Shape] = {}
        if self.gated:
            shapes["gate.weight"] = (hidden, ffn)
        shapes["up.weight"] = (hidden, ffn)
        if self.biases:
            shapes["up.bias"] = (ffn,)
        shapes["down.weight"] = (ffn, hidden)
        if self.biases:
            shapes["down.bias"] = (hidden,)
        return shapes

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the network's tensors in that order."""
        return tuple(self.shapes(1, 1))

    def num_params(self, hidden: int, ffn: int) -> int:
        """Count the trained values of the network."""
        return sum(math.prod(shape) for shape in self.shapes(hidden, ffn).values())
