"""Order of a graph's inputs: domains' word embeddings, then per sparse layer its routing and its experts' weights.

One graph takes all of them flat, because only flat inputs can be differentiated one by one and given dynamic lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor

from parallel.operator_layout import Layout
from parallel.partition_spec import PartitionSpec
from rre.dispatch.capacity_dispatch import CapacitySpec
from rre.feed_forward_spec import FeedForwardSpec


@dataclass(frozen=True)
class LayerSignature:
    """Graph inputs of one sparse layer: `slots` experts of `network`, and what its router takes from outside the graph.

    `noise`: shape of a learned gate's noise, () = none. `capacity_spec`: the static shapes of a graph that is cut over
    a mesh, whose slots' weights come stacked; a learned gate's slots are the experts in their order.
    """

    name: str
    slots: int
    network: FeedForwardSpec
    learned: bool
    noise: tuple[int, ...] = ()
    compiled: bool = False
    capacity_spec: CapacitySpec | None = None

    @property
    def chunks(self) -> int:
        """Parts of the slots whose exchanges do not wait for one another."""
        return 1 if self.capacity_spec is None else self.capacity_spec.chunks

    @property
    def routing(self) -> int:
        """Number of routing inputs: the plan of a table router, or the gate's noise.

        A plan is order and offsets for compiled networks, else rows of each slot and of the dropped plus positions; of
        reserved rows it is `CapacitySpec.plan_inputs`.
        """
        if self.learned:
            return int(self.noise != ())
        if self.capacity_spec is not None:
            return self.chunks + 2
        return 2 if self.compiled else self.slots + 2

    def sharded_routing_inputs(self) -> list[tuple[tuple[int, ...], ms.dtype, PartitionSpec]]:
        """Full shape, type and partition spec of the routing inputs of a graph that is cut over a mesh."""
        if not self.learned:
            return self.capacity_spec.plan_inputs()
        return [(self.noise, ms.float32, ("rows", *(1,) * (len(self.noise) - 1)))] if self.noise else []

    @property
    def weights(self) -> int:
        """Number of weight inputs."""
        return len(self.network.tensors) * (self.slots if self.capacity_spec is None else self.chunks)


@dataclass(frozen=True)
class GraphSignature:
    """Signature of a graph over `batch` x `length` tokens: all its variable inputs, packed flat in one order.

    `num_exchange_ranks`: processes whose rows meet at this one's experts; the plan of a table router is of all their
    tokens. Of an SPMD graph: the `expert_part` whose slots this process fills, and its `local_experts` for them; None
    where it fills all.
    """

    layers: tuple[LayerSignature, ...]
    domain_embedding_shape: tuple[int, int, int] | None
    batch: int
    length: int
    hidden: int
    ffn: int
    num_exchange_ranks: int = 1
    expert_part: int | None = None
    local_experts: range | None = None

    def stored(self, experts: np.ndarray) -> np.ndarray:
        """Positions on a layer's expert axis as the store of this process counts them."""
        local = self.local_experts
        return experts if local is None else (experts - local.start) // local.step

    @property
    def bounds(self) -> tuple[tuple[int, int, int], ...]:
        """Per sparse layer: where its routing starts, where its weights start, where they end in `flat`."""
        bounds = []
        start = 0 if self.domain_embedding_shape is None else 1
        for layer_signature in self.layers:
            weights_start = start + layer_signature.routing
            bounds.append((start, weights_start, weights_start + layer_signature.weights))
            start = bounds[-1][2]
        return tuple(bounds)

    @property
    def differentiated(self) -> tuple[int, ...]:
        """Positions in `flat` whose gradients a training step wants: slots, then every layer's weights in order."""
        slots = () if self.domain_embedding_shape is None else (0,)
        return slots + tuple(i for _, b, c in self.bounds for i in range(b, c))

    def sharded_inputs(self) -> list[tuple[tuple[int, ...], ms.dtype, PartitionSpec]]:
        """Full shape, type and partition spec of every input of a graph that is cut over a mesh."""
        return [
            entry
            for layer_signature in self.layers
            for entry in (
                *layer_signature.sharded_routing_inputs(),
                *layer_signature.capacity_spec.weight_inputs(layer_signature.network, self.hidden, self.ffn),
            )
        ]

    def placeholders(self, layout: Layout | None = None) -> list[Tensor]:
        """Shapes for compiling, row vectors with dynamic length; under a mesh's `layout` what one rank gives."""
        if layout is not None and layout.spmd_mesh:
            inputs = self.sharded_inputs()
            return [Tensor(shape=layout.local_shape(shape, spec), dtype=dtype) for shape, dtype, spec in inputs]
        tensors: list[Tensor] = []
        if self.domain_embedding_shape is not None:
            tensors.append(Tensor(shape=list(self.domain_embedding_shape), dtype=ms.float32))
        tokens = self.num_exchange_ranks * self.batch * self.length
        for layer_signature in self.layers:
            if not layer_signature.learned and layer_signature.compiled:
                tensors += [Tensor(shape=[n], dtype=ms.int32) for n in (tokens, layer_signature.slots + 1)]
            elif not layer_signature.learned:
                tensors += [Tensor(shape=[None], dtype=ms.int32) for _ in range(layer_signature.slots + 1)]
                tensors.append(Tensor(shape=[tokens, 1], dtype=ms.int32))
            elif layer_signature.noise:
                tensors.append(Tensor(shape=list(layer_signature.noise), dtype=ms.float32))
            shapes = layer_signature.network.shapes(self.hidden, self.ffn).values()
            tensors += [Tensor(shape=list(s), dtype=ms.float32) for _ in range(layer_signature.slots) for s in shapes]
        return tensors
