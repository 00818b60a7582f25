"""Bytes on a device and on a host: weights, optimizer state, gradients, activations.

float32 parameters and moments, products in the compute type (2 or 4 bytes). Counted are the values that the gradient
needs; the allocator's fragments and the collectives' buffers are not.
"""

from __future__ import annotations

import math

from pangu_sigma.config import Config
from pangu_sigma.config.capacity_sizes import activated_slots, dispatch_buffer, samples_at_a_time
from pangu_sigma.config.parameter_counts import counted_tensors
from pangu_sigma.model.pipeline_stages import layers_of_stage, stage_of, unlike_stages
from pangu_sigma.model.tensor_parallel_layout import is_matrix, num_shards_of, spec_of
from pangu_sigma.plan.hardware import Hardware
from pangu_sigma.tensor_names import is_expert, is_routing, parse_name, tensor_name
from parallel.optimizer_sharding import optimizer_num_shards

FLOAT32 = 4
MOMENTS = 2


def compute_bytes(config: Config) -> int:
    """Bytes of a value in the compute type."""
    return FLOAT32 if config.train.precision == "float32" else 2


def device_bytes(config: Config, vocabulary: int) -> dict[str, float]:
    """Bytes of the fullest rank's device by what they are for."""
    # Of stages with the same layers the lowest holds most micro-batches.
    stages = unlike_stages(config.model, config.parallel.mesh)
    return max((stage_bytes(config, vocabulary, stage) for stage in stages), key=lambda by_kind: sum(by_kind.values()))


def stage_bytes(config: Config, vocabulary: int, stage: int) -> dict[str, float]:
    """Bytes of a device of one pipeline stage by what they are for."""
    mesh, low = config.parallel.mesh, compute_bytes(config)
    divided = config.parallel.optimizer_parallel
    by_kind = dict.fromkeys(("weights", "moments", "gradients", "compute copies", "activations"), 0.0)
    resident = config.experts.store == "device"
    for tensor in counted_tensors(config, vocabulary, layers_of_stage(config.model, mesh, stage)):
        name, shape = tensor.name, tensor.shape
        if is_routing(name) or (parse_name(name).layer is None and stage_of(name, config.model.layers, mesh) != stage):
            continue
        if is_expert(name) and not resident:
            continue
        cut = num_shards_of(name, shape, mesh)
        values = tensor.size / cut
        share = optimizer_num_shards(shape, spec_of(name, shape), mesh) if divided and not is_expert(name) else 1
        by_kind["weights"] += FLOAT32 * values / share
        by_kind["moments"] += MOMENTS * FLOAT32 * values / share
        # Of a step of several micro-batches in one graph, gradients are added up whole before they are divided.
        gathered = values if share > 1 and mesh.pipeline > 1 else 0.0
        by_kind["gradients"] += FLOAT32 * (values / share + gathered)
        if low != FLOAT32 and is_matrix(name, shape):
            by_kind["compute copies"] += low * values
    if mesh.pipeline > 1 and stage == mesh.pipeline - 1 and config.model.head_spec.is_tied:
        # What the first stage sends of the word table.
        by_kind["weights"] += FLOAT32 * vocabulary * config.model.hidden / mesh.tensor
    _, sparse_layers = number_of_layers(config, stage)
    if sparse_layers and not resident:
        per_slot = sum(
            math.prod(shape) / (mesh.tensor if "tensor" in spec_of(tensor_name("experts", name), shape) else 1)
            for name, shape in config.model.expert_network.shapes(config.model.hidden, config.model.ffn).items()
        )
        local = activated_slots(config) / mesh.exchange_size * sparse_layers
        by_kind["weights"] += FLOAT32 * per_slot * local
        by_kind["gradients"] += FLOAT32 * per_slot * local
        by_kind["compute copies"] += (low if low != FLOAT32 else 0) * per_slot * local
    by_kind["activations"] = activation_bytes(config, vocabulary, stage)
    return by_kind


def number_of_layers(config: Config, stage: int) -> tuple[int, int]:
    """(layers, sparse ones among them) of a pipeline stage."""
    model, indices = config.model, layers_of_stage(config.model, config.parallel.mesh, stage)
    kinds = model.kinds_of_layers(indices)
    return len(indices), sum(many for name, many in kinds if name in model.sparse_prefixes)


def expert_values(config: Config) -> int:
    """Trained values of one expert."""
    return config.model.expert_network.num_params(config.model.hidden, config.model.ffn)


def activation_bytes(config: Config, vocabulary: int, stage: int = 0) -> float:
    """Bytes that micro-batches keep on a device of a pipeline stage for their gradients.

    Per token and layer, with c bytes in the compute type: the residual stream before each norm (4 h each) and each
    norm's result (c h each), q, k, v and the attention's result (4 c h), queries and keys again where they are
    normalised and where they are turned (4 h each), the inner values before (4 f, gated 8 f) and after (c f) the
    activation; what follows the norms is cut over tensor, the rest under sequence parallelism. Attention keeps no
    scores (flash attention). With recompute a layer keeps its input alone, and one layer stands in full.

    On CPU, whose kernels are of whole sublayers: inner values once, before the activation; queries and keys as
    attention takes them; no rows apart of experts; and of the head the probabilities in the logits' place. Other
    operators keep more there.
    """
    model, mesh, low = config.model, config.parallel.mesh, compute_bytes(config)
    tokens = samples_at_a_time(config) * config.data.sequence_length
    rows_cut = mesh.tensor if config.parallel.sequence_parallel else 1
    outside = (2 * FLOAT32 + 2 * low) * model.hidden / rows_cut
    whole = config.run.device == "CPU"
    inside, inside_expert = (
        ((2 if form.gated else 1) * (low if whole else FLOAT32) + (0 if whole else low)) * model.ffn / mesh.tensor
        for form in (model.network, model.expert_network)
    )
    turned = 2 * int(model.position_spec.rotates and not whole)
    again = FLOAT32 * (len(model.attention.qk_norm_spec.norms) + turned)
    dense = tokens * (outside + (4 * low + again) * model.hidden / mesh.tensor + inside)
    kept = tokens * FLOAT32 * model.hidden / rows_cut
    sent, sparse = dispatch_buffer(config), dense
    if sent is not None:
        # Rows in both places, and the inner values of what arrives, which is as many rows as left; a shared expert
        # stands where the dense network would.
        beside = tokens * inside_expert if model.sparse.shared_expert else 0
        apart = 0 if whole else 2 * low * model.hidden
        sparse = dense - tokens * inside + beside + sent.rows * (apart + inside_expert)
    layers, sparse_layers = number_of_layers(config, stage)
    if config.train.recompute:
        kept_values = kept * layers + max(dense, sparse if sparse_layers else 0.0)
    else:
        kept_values = dense * (layers - sparse_layers) + sparse * sparse_layers
    # One forward, one backward: the first stage of a pipeline holds as many micro-batches as there are stages.
    kept_values *= mesh.pipeline - stage
    logits = (1 if whole else 2) * FLOAT32 * config.predictions * tokens * vocabulary / mesh.tensor
    return kept_values + (logits if stage == mesh.pipeline - 1 else 0)


def host_bytes(config: Config, hardware: Hardware) -> float:
    """Bytes in the memory of one host: its ranks' slices of the experts with their moments, float32."""
    if config.experts.store == "device" or not config.model.sparse_prefixes:
        return 0.0
    mesh = config.parallel.mesh
    ranks = min(hardware.devices_per_host, mesh.size)
    # A host's ranks may all be of the stage that has most sparse layers.
    layers = max(number_of_layers(config, stage)[1] for stage in unlike_stages(config.model, mesh))
    experts = config.experts_in_layer * layers
    stored = (1 + MOMENTS) * FLOAT32 * experts * expert_values(config) / mesh.expert / mesh.tensor
    if config.experts.store == "disk":
        return min(stored * ranks, config.experts.resident_gib * 2**30 * ranks)
    return stored * ranks
