"""Bytes that a device sends in one optimizer step, by what they are for."""

from __future__ import annotations

from pangu_sigma.config import Config
from pangu_sigma.config.capacity_sizes import activated_slots, dispatch_buffer, samples_at_a_time
from pangu_sigma.config.parameter_counts import counted_tensors
from pangu_sigma.model.tensor_parallel_layout import num_shards_of
from pangu_sigma.plan.memory_estimate import FLOAT32, compute_bytes, expert_values
from pangu_sigma.tensor_names import is_expert, is_routing

# Rows go to experts and back, and their gradients the same way.
EXCHANGES = 4
# Each sublayer sums over the tensor axis once forward and once backward.
SUMS_PER_SUBLAYER = 2


def all_to_all_bytes(config: Config) -> float:
    """Bytes that a device sends to other ranks in the all-to-alls of a step.

    Recomputation repeats the one to the experts; what comes back from them no gradient asks for (the compiled graph of
    `plan --compile` shows it).
    """
    sent, mesh = dispatch_buffer(config), config.parallel.mesh
    if sent is None or mesh.exchange_size == 1:
        return 0.0
    exchanges = EXCHANGES + (1 if config.train.recompute else 0)
    layers = len(config.model.sparse_prefixes) / mesh.pipeline
    away = (mesh.exchange_size - 1) / mesh.exchange_size
    row = config.model.hidden * compute_bytes(config)
    return sent.rows * row * away * exchanges * layers * config.train.gradient_accumulation_steps


def tensor_sum_bytes(config: Config) -> float:
    """Bytes that a device sends to add up parts of products over the tensor axis (ring all-reduce: 2 (t - 1) / t)."""
    mesh, model = config.parallel.mesh, config.model
    if mesh.tensor == 1:
        return 0.0
    tokens = samples_at_a_time(config) * config.data.sequence_length
    sent = dispatch_buffer(config)
    sparse = len(model.sparse_prefixes)
    beside = sparse if model.sparse.shared_expert else 0
    rows = tokens * (2 * model.layers - sparse + beside) + (sent.rows * sparse if sent else 0)
    again = 1 + 0.5 * config.train.recompute
    sums = SUMS_PER_SUBLAYER * again * rows / mesh.pipeline + 2 * tokens
    ring = 2 * (mesh.tensor - 1) / mesh.tensor
    return sums * model.hidden * compute_bytes(config) * ring * config.train.gradient_accumulation_steps


def gradient_sum_bytes(config: Config, vocabulary: int) -> float:
    """Bytes that a device sends to add up gradients over the ranks that hold the same parameters, once a step."""
    mesh = config.parallel.mesh
    total = 0.0
    for tensor in counted_tensors(config, vocabulary):
        name, shape = tensor.name, tensor.shape
        ranks = mesh.data if is_expert(name) else mesh.rows
        if is_routing(name) or ranks == 1 or (is_expert(name) and config.experts.store != "device"):
            continue
        total += FLOAT32 * tensor.size / num_shards_of(name, shape, mesh) / mesh.pipeline * 2 * (ranks - 1) / ranks
    return total


def host_link_bytes(config: Config) -> float:
    """Bytes between a device and its host in a step: activated experts there, their gradients back, float32.

    For every micro-batch; under pipeline stages, whose graph is of the whole step, once.
    """
    if config.experts.store == "device" or not config.model.sparse_prefixes:
        return 0.0
    mesh = config.parallel.mesh
    local = activated_slots(config) / mesh.exchange_size * len(config.model.sparse_prefixes) / mesh.pipeline
    times = config.train.gradient_accumulation_steps if mesh.pipeline == 1 else 1
    return 2 * FLOAT32 * expert_values(config) / mesh.tensor * local * times


def step_bytes(config: Config, vocabulary: int) -> dict[str, float]:
    """All of them by name."""
    return {
        "all-to-all": all_to_all_bytes(config),
        "tensor sums": tensor_sum_bytes(config),
        "gradient sums": gradient_sum_bytes(config, vocabulary),
        "host link": host_link_bytes(config),
    }
