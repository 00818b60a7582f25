"""Expert stores: where expert weights and their optimizer state live."""

from rre.store.disk_store import DiskStore
from rre.store.expert_store import ExpertStore, StoreStats
from rre.store.memory_stores import DeviceStore, HostStore
