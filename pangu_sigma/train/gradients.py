"""Gradients of an optimizer step: of shared parameters and of the experts that received a token.

A graph gives the gradients of all its expert inputs, in the order of the inputs. Here they are matched with the experts
whose weights those inputs were; an expert without tokens, or of a domain that does not train, gets no gradient at all,
so that the optimizer does not touch it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from mindspore import Tensor, ops

from pangu_sigma.model.batch_planner import RoutedBatch
from pangu_sigma.model.graph_inputs import GraphSignature, LayerSignature
from pangu_sigma.model.model import Model
from pangu_sigma.tensor_names import DOMAIN_EMBEDDING
from rre.store import ExpertStore

# (layer name, expert as this process's store counts) -> gradients of the expert's tensors.
ExpertGradients = dict[tuple[str, int], list[Tensor]]


@dataclass
class Gradients:
    """Gradients of one optimizer step, summed over its micro-batches.

    shared: in the order of the trained shared parameters. experts: only those that received a token and train.
    shared_squares: square sums [n] of `shared` where they came with the gradients (a single micro-batch), else None.
    """

    shared: tuple[Tensor, ...] = ()
    experts: ExpertGradients = field(default_factory=dict)
    shared_squares: np.ndarray | None = None

    def add(self, other: Gradients) -> None:
        """Sum in another micro-batch's gradients; the order of the sum is the order of the micro-batches."""
        self.shared = tuple(a + b for a, b in zip(self.shared, other.shared, strict=True))
        for key, tensors in other.experts.items():
            sums = self.experts.get(key)
            self.experts[key] = tensors if sums is None else [a + b for a, b in zip(sums, tensors, strict=True)]
        self.shared_squares = None

    def square_sums(
        self, store: ExpertStore, tensor_weights: Sequence[float] | None = None
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Square sums for the global norm: of the shared gradients [n], and of all experts' by layer name.

        Sums are float32 per tensor or block of one. tensor_weights: how much each tensor of an expert counts, 1 for
        None.
        """
        shared = self.shared_squares
        if shared is None:
            half_square = ops.L2Loss()
            shared = np.array([2.0 * float(half_square(t).asnumpy()) for t in self.shared])
        by_layer: dict[str, list[Tensor]] = {}
        for (layer_name, _), tensors in self.experts.items():
            by_layer.setdefault(layer_name, []).extend(tensors)
        sums = {layer_name: store.square_sums(tensors) for layer_name, tensors in by_layer.items()}
        if tensor_weights is not None:
            sums = {name: array.reshape(-1, len(tensor_weights)) * tensor_weights for name, array in sums.items()}
        return shared, {layer_name: float(array.sum()) for layer_name, array in sums.items()}


def select_expert_gradients(
    model: Model,
    signature: GraphSignature,
    batch: RoutedBatch,
    trained_domains: Collection[str],
    input_gradients: Sequence[Tensor],
    received: np.ndarray,
) -> ExpertGradients:
    """The gradients of this process's experts, and of domain embeddings, that received a token and train.

    input_gradients: of the graph's differentiated inputs, in order. received [layers, E]: rows that came to each
    expert, from whatever rank. The gradient of an expert without rows is a product over nothing, whose memory MindSpore
    leaves as it was: it must not be looked at.
    """
    groups = model.groups
    gradients: ExpertGradients = {}
    offset = 0  # of the layer's first input
    # 1. The per-domain word embeddings are one input, stacked by domain.
    if signature.domain_embedding_shape is not None:
        for domain_id in np.unique(batch.domain):
            if groups.names[domain_id] in trained_domains:
                gradients[(DOMAIN_EMBEDDING, int(domain_id))] = [input_gradients[0][int(domain_id)]]
        offset = 1
    owner, first = np.repeat(groups.names, groups.sizes), model.local_experts.start
    for layer, layer_signature in enumerate(signature.layers):
        num_tensors = len(layer_signature.network.tensors)
        plan = batch.plans[layer]  # None where a learned gate routes inside the graph
        # 2. A layer with fixed slots takes its experts stacked.
        if layer_signature.capacity_spec is not None:
            experts = np.arange(layer_signature.slots) if plan is None else plan.experts
            rows = received[layer] if plan is None else plan.counts
            is_trained = np.isin(owner[experts], list(trained_domains)) & (rows > 0)
            stacked = input_gradients[offset : offset + layer_signature.weights]
            offset += layer_signature.weights
            gradients |= unstack_slot_gradients(signature, layer_signature, experts, is_trained, stacked)
            continue
        # 3. Any other layer takes each expert's tensors as inputs of their own, one expert behind the other.
        experts = range(layer_signature.slots) if plan is None else plan.experts.tolist()
        is_filled = [True] * layer_signature.slots if plan is None else plan.counts > 0
        for expert, has_rows in zip(experts, is_filled, strict=True):
            global_expert = first + expert
            if has_rows and received[layer, global_expert] > 0 and owner[global_expert] in trained_domains:
                gradients[(layer_signature.name, expert)] = list(input_gradients[offset : offset + num_tensors])
            offset += num_tensors
    return gradients


def unstack_slot_gradients(
    signature: GraphSignature,
    layer_signature: LayerSignature,
    experts: np.ndarray,
    is_trained: np.ndarray,
    stacked: Sequence[Tensor],
) -> ExpertGradients:
    """The gradients of the experts in those slots of this process that train, from a layer's stacked gradients.

    experts [N]: who is in each slot of the layer. is_trained: bool [N]. stacked: chunk by chunk the gradient of each
    tensor, [slots of this process, …].
    """
    gradients: ExpertGradients = {}
    num_tensors = len(layer_signature.network.tensors)
    for chunk, slots in enumerate(layer_signature.capacity_spec.by_chunk(signature.expert_part)):
        of_chunk = stacked[chunk * num_tensors : (chunk + 1) * num_tensors]
        for i, slot in enumerate(slots.tolist()):
            if is_trained[slot]:
                expert = int(signature.stored(experts[slot]))
                gradients[(layer_signature.name, expert)] = [tensor[i] for tensor in of_chunk]
    return gradients
