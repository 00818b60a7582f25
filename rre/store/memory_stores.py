"""Expert stores in memory: all experts in every step (device), or the activated ones only (host)."""

from __future__ import annotations

from rre.store.expert_store import ExpertStore


class HostStore(ExpertStore):
    """Expert store in host memory; a step takes the experts that its batch activates, which on CPU needs no copy."""


class DeviceStore(HostStore):
    """Expert store with all experts resident: every step's graph takes each of them, activated or not."""

    all_resident = True
