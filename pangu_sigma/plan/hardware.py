"""What the plan assumes of the machines; every number can be set on the command line."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30

# PanGu-Sigma's published rate (arXiv 2303.10845): 512 Ascend 910, 1.085 T parameters.
PAPER_TOKENS_PER_SECOND = 69_905
PAPER_DEVICES = 512


@dataclass(frozen=True)
class Hardware:
    """A host with its devices. Defaults: Ascend 910 (32 GiB, 256 TFLOP/s of float16), 8 a host, 512 GiB a host.

    `efficiency` is the share of the peak that matrix products reach, an assumption to replace by a measurement.
    Bandwidths are per device and direction, in GB/s: inside a host, between hosts (100 Gbit/s RoCE), to host memory
    (PCIe). `host_memory_gbps` is what a whole host's processors move while they update experts.
    """

    device_gib: float = 32.0
    host_gib: float = 512.0
    devices_per_host: int = 8
    peak_tflops: float = 256.0
    efficiency: float = 0.3
    inside_gbps: float = 30.0
    between_gbps: float = 12.5
    to_host_gbps: float = 16.0
    host_memory_gbps: float = 100.0

    def link(self, last_rank: int) -> float:
        """Bytes a second of a device in rank 0's group up to `last_rank`: the slowest way between any two of them."""
        return (self.inside_gbps if last_rank < self.devices_per_host else self.between_gbps) * 1e9
