"""An estimated step time: work over stated rates, one after the other, nothing overlapped."""

from __future__ import annotations

from pangu_sigma.config import Config, parameter_counts
from pangu_sigma.config.capacity_sizes import dispatch_buffer
from pangu_sigma.plan.hardware import Hardware
from pangu_sigma.plan.memory_estimate import FLOAT32, MOMENTS, expert_values
from pangu_sigma.plan.traffic_estimate import host_link_bytes, step_bytes


def step_flops(config: Config, vocabulary: int) -> float:
    """Operations of a step on all devices: 6 a weight and token (8 with recompute), and attention's 12 L h S a token.

    Rows that capacity dispatch reserves are computed whether they are filled or not.
    """
    counts = parameter_counts(config, vocabulary)
    activated = min(counts.activated_per_token.values())
    activated += (config.predictions - 1) * vocabulary * config.model.hidden
    model, length = config.model, config.data.sequence_length
    tokens = config.train.batch_size * length
    sent = dispatch_buffer(config)
    idle = 0.0
    if sent:
        idle = (sent.rows - sent.choices) / sent.tokens * len(model.sparse_prefixes) * expert_values(config)
    forward = 2 * (activated + idle) + 4 * model.layers * model.hidden * length / 2
    return (4 if config.train.recompute else 3) * forward * tokens


def step_seconds(config: Config, vocabulary: int, hardware: Hardware) -> dict[str, float]:
    """Seconds of a step by what they are spent on."""
    mesh = config.parallel.mesh
    sent = step_bytes(config, vocabulary)
    rate = hardware.peak_tflops * 1e12 * hardware.efficiency
    # While a pipeline fills and empties, pipeline - 1 of the accumulation's slots stand idle.
    bubble = 1 + (mesh.pipeline - 1) / config.train.gradient_accumulation_steps
    seconds = {
        "products": step_flops(config, vocabulary) / mesh.size / rate * bubble,
        # The last rank of rank 0's groups for exchanges, of tensor shards and of replicas.
        "all-to-all": sent["all-to-all"] / hardware.link((mesh.exchange_size - 1) * mesh.data * mesh.tensor),
        "tensor sums": sent["tensor sums"] / hardware.link(mesh.tensor - 1),
        "gradient sums": sent["gradient sums"] / hardware.link((mesh.rows - 1) * mesh.tensor),
        "host link": sent["host link"] / (hardware.to_host_gbps * 1e9),
        "host update": 0.0,
    }
    if host_link_bytes(config):
        # Each activated value is read and written once with its moments, and its gradient is read.
        values = (
            sent["host link"] / 2 / FLOAT32 / (config.train.gradient_accumulation_steps if mesh.pipeline == 1 else 1)
        )
        moved = values * FLOAT32 * (2 * (1 + MOMENTS) + 1) * min(hardware.devices_per_host, mesh.size)
        seconds["host update"] = moved / (hardware.host_memory_gbps * 1e9)
    return seconds
