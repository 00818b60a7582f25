"""Expert stores in memory: all experts in every step (device), or the activated ones only (host)."""

from __future__ import annotations

import numpy as np

from rre.store.expert_store import STATE_TENSORS, ExpertStore


class HostStore(ExpertStore):
    """Expert store in host memory; a step takes the experts that its batch activates, which on CPU needs no copy."""

    def _make_tables(self) -> dict[str, dict[str, dict[str, np.ndarray]]]:
        return {
            kind: {
                layer_name: {name: np.zeros((self.experts[layer_name], *s), np.float32) for name, s in tensors.items()}
                for layer_name, tensors in self.shapes.items()
            }
            for kind in STATE_TENSORS
        }


class DeviceStore(HostStore):
    """Expert store with all experts resident: every step's graph takes each of them, activated or not."""

    all_resident = True
