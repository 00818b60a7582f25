"""Named model sizes: PanGu-α's published ones and a tiny one that a laptop trains in minutes.

Sizes: PanGu-α (arXiv 2104.12369), table 1; 350M from the public PyTorch port. `layers` counts the query layer. A fifth
of the layers is sparse, the top ones: as PanGu-Σ (arXiv 2303.10845) has 8 of the 13B's 40.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType


def _pangu_alpha(layers: int, hidden: int, heads: int) -> Mapping[str, int]:
    return MappingProxyType(
        {
            "layers": layers, "hidden": hidden, "heads": heads, "ffn": 4 * hidden, "positions": 1024,
            "vocab_size": 40000, "sparse_layers": layers // 5,
        }  # fmt: skip
    )


PRESETS: Mapping[str, Mapping[str, int | None]] = MappingProxyType(
    {
        "tiny": MappingProxyType(
            {
                "layers": 4, "hidden": 128, "heads": 4, "ffn": 512, "positions": 256, "vocab_size": None,
                "sparse_layers": 2,
            }  # fmt: skip
        ),
        "350M": _pangu_alpha(24, 1024, 16),
        "2.6B": _pangu_alpha(32, 2560, 32),
        "13B": _pangu_alpha(40, 5120, 40),
        "200B": _pangu_alpha(64, 16384, 128),
    }
)
