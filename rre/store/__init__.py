"""Expert stores: where expert weights and their optimizer state live."""

from rre.store.base import ExpertStore, Traffic
from rre.store.disk import DiskStore
from rre.store.memory import DeviceStore, HostStore

__all__ = ["DeviceStore", "DiskStore", "ExpertStore", "HostStore", "Traffic"]
