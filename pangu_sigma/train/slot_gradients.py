"""Gradients of stacked slots, as a graph that is cut over a mesh gives them, back to the experts that stood in them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mindspore import Tensor

from pangu_sigma.model.graph_inputs import GraphSignature, LayerSignature


def slot_gradients(
    signature: GraphSignature,
    layer_signature: LayerSignature,
    experts: np.ndarray,
    wanted: np.ndarray,
    stacked: Sequence[Tensor],
) -> dict[tuple[str, int], list[Tensor]]:
    """(layer name, expert as the store counts) -> its tensors' gradients, of those slots of this process that are
    `wanted` bool [N].

    `experts` [N]: who stands in each slot of the layer; `stacked`: chunk by chunk the gradient of each tensor
    [slots of this process, …].
    """
    found, tensors = {}, len(layer_signature.network.tensors)
    for chunk, slots in enumerate(layer_signature.capacity_spec.by_chunk(signature.expert_part)):
        of_chunk = stacked[chunk * tensors : (chunk + 1) * tensors]
        for i, slot in enumerate(slots.tolist()):
            if wanted[slot]:
                number = int(signature.stored(experts[slot]))
                found[(layer_signature.name, number)] = [gradient[i] for gradient in of_chunk]
    return found
