"""What one feed-forward network is made of, known before any framework is loaded: one line per tensor.

A form serves dense layers' networks as well as experts and shared experts; a model may have one for each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class FeedForwardSpec:
    """activation(x W_up + b_up) W_down + b_down, or `gated`: (activation(x W_gate) * (x W_up)) W_down without `biases`,
    which is SwiGLU with silu and GEGLU with gelu (Shazeer 2020, arXiv 2002.05202, equation 6).
    """

    activation: str
    gated: bool = False
    biases: bool = True

    def shapes(self, hidden: int, ffn: int) -> dict[str, Shape]:
        """Shapes of the network's tensors, [in, out], in the order in which every graph and kernel takes them."""
        found: dict[str, Shape] = {}
        if self.gated:
            found["gate.weight"] = (hidden, ffn)
        found["up.weight"] = (hidden, ffn)
        if self.biases:
            found["up.bias"] = (ffn,)
        found["down.weight"] = (ffn, hidden)
        if self.biases:
            found["down.bias"] = (hidden,)
        return found

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the network's tensors in that order."""
        return tuple(self.shapes(1, 1))

    def num_params(self, hidden: int, ffn: int) -> int:
        """Trained values of the network."""
        return sum(math.prod(shape) for shape in self.shapes(hidden, ffn).values())
