"""Inputs of a graph over a micro-batch: their order, shapes, packing, splitting, and whose experts their gradients are
of.

The order, which no other file knows:
1. the fixed inputs (`GraphInputs.fixed_specs`), which `ForwardPass` takes by name;
2. the word tables, where domains have their own;
3. per sparse layer, from the bottom up, its routing and the weights of its slots' experts;
4. what a loss takes beside the batch.

All but the fixed ones are flat, because only flat inputs can be differentiated one by one and given dynamic lengths.
Inside a graph `split_inputs` and `layer_inputs` group them again, by bounds that `GraphInputs` computed before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import mindspore as ms
import numpy as np
from mindspore import Tensor

from pangu_sigma.model.routed_batch import ReservedRowsPlan, RoutedBatch
from pangu_sigma.tensor_names import DOMAIN_EMBEDDING, chunk_name
from parallel.operator_layout import Layout
from parallel.partition_spec import PartitionSpec
from rre.dispatch.capacity_dispatch import CapacitySpec
from rre.dispatch.dispatch_plan import DispatchPlan
from rre.feed_forward_spec import FeedForwardSpec
from rre.store import ExpertStore

# Full shape (None: of dynamic length), type and partition spec of an input.
InputSpec = tuple[tuple[int | None, ...], ms.dtype, PartitionSpec]
# Of one sparse layer: where its routing begins and ends, where its weights begin and end.
LayerBounds = tuple[int, int, int, int]
Plan = DispatchPlan | ReservedRowsPlan | None


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of one sparse layer: its routing, and the weights of the experts of `network` in its `slots`.

    `planned`: the host plans which rows each slot computes, and the plan is an input; else the graph knows itself, and
    slots are the layer's experts in their order. `noise`: shape of a learned gate's noise, () = none. `text`: shape of
    what tells it text from padding, () = nothing does. `compiled`: the
    plan is the order of all rows and where each slot begins in it, as compiled experts take it, instead of each slot's
    rows. `capacity_spec`: the static shapes of a graph that is cut over a mesh, whose slots' weights come stacked.
    """

    name: str
    slots: int
    network: FeedForwardSpec
    planned: bool
    noise: tuple[int, ...] = ()
    compiled: bool = False
    capacity_spec: CapacitySpec | None = None
    text: tuple[int, ...] = ()

    @property
    def chunks(self) -> int:
        """Parts of the slots whose exchanges do not wait for one another."""
        return 1 if self.capacity_spec is None else self.capacity_spec.chunks

    def routing_specs(self, tokens: int) -> list[InputSpec]:
        """Of the routing inputs, `tokens` being those that reach this process's experts."""
        if not self.planned:
            shapes = filter(None, (self.noise, self.text))
            return [(shape, ms.float32, ("rows", *(1,) * (len(shape) - 1))) for shape in shapes]
        if self.capacity_spec is not None:
            return self.capacity_spec.plan_inputs()
        if self.compiled:
            return [((tokens,), ms.int32, ()), ((self.slots + 1,), ms.int32, ())]
        # Rows of each slot and of the dropped, then every token's position.
        return [((None,), ms.int32, ())] * (self.slots + 1) + [((tokens, 1), ms.int32, ())]

    def routing_arrays(
        self, plan: Plan, noise: np.ndarray | None, batch: RoutedBatch | None = None
    ) -> list[np.ndarray]:
        """The routing inputs of one batch; outside of training nobody asks it for its text."""
        if plan is None:
            return ([noise] if self.noise else []) + ([batch.text.reshape(self.text)] if self.text else [])
        if self.capacity_spec is not None:
            return [*plan.plan.inputs]
        return [plan.order, plan.offsets] if self.compiled else [*plan.rows, plan.position]

    def experts(self, plan: Plan) -> np.ndarray:
        """The expert in each slot, int [slots]."""
        return np.arange(self.slots) if plan is None else plan.experts

    def weight_specs(self, hidden: int, ffn: int) -> list[InputSpec]:
        """Of the weights: the tensors of the first slot's expert, of the second's, …; or stacked, chunk by chunk."""
        if self.capacity_spec is not None:
            return self.capacity_spec.weight_inputs(self.network, hidden, ffn)
        return [(shape, ms.float32, ()) for shape in self.network.shapes(hidden, ffn).values()] * self.slots

    def slots_by_input(self, expert_part: int | None) -> np.ndarray:
        """For each run of inputs that holds one tensor of every kind, the slots that it is of: int [runs, slots]."""
        if self.capacity_spec is None:
            return np.arange(self.slots)[:, None]
        return self.capacity_spec.by_chunk(expert_part)


@dataclass(frozen=True)
class GraphInputs:
    """All inputs of a graph over `batch` x `length` tokens of a model `hidden` wide, whose experts are `ffn` wide.

    `word_tables`: shapes of the word tables that are inputs where domains have their own: one [domains, V, D], or in
    decoding one [V, D] of each sample.
    `num_exchange_ranks`: processes whose rows meet at this one's experts; the plan of a table router is of all their
    tokens. `local_experts`: the experts of a layer that the store of this process holds, None for all. Of an SPMD
    graph: the `expert_part` whose slots this process fills, None where it fills all.
    """

    layers: tuple[LayerInputs, ...]
    word_tables: tuple[tuple[int, ...], ...]
    batch: int
    length: int
    hidden: int
    ffn: int
    num_exchange_ranks: int = 1
    expert_part: int | None = None
    local_experts: range | None = None

    # --- shapes

    def fixed_specs(self) -> dict[str, InputSpec]:
        """Of the fixed inputs by name; `ForwardPass.construct` names them in this order."""
        of_token = (self.batch, self.length), ms.int32, ("rows", 1)
        of_sample = (self.batch,), ms.int32, ("rows",)
        return {
            "tokens": of_token,
            "labels": of_token,
            "weights": (of_token[0], ms.float32, of_token[2]),
            "auxiliary_weight": ((), ms.float32, ()),
            "positions": of_token,
            "segments": of_token,
            "domain": of_sample,
            "keys": of_sample,
        }

    def routing_specs(self) -> list[InputSpec]:
        """Of the routing inputs of all layers."""
        tokens = self.num_exchange_ranks * self.batch * self.length
        return [spec for layer in self.layers for spec in layer.routing_specs(tokens)]

    def weight_specs(self) -> list[InputSpec]:
        """Of the differentiated inputs: the word tables, then every layer's weights."""
        tables = [(shape, ms.float32, ()) for shape in self.word_tables]
        return [*tables, *(spec for layer in self.layers for spec in layer.weight_specs(self.hidden, self.ffn))]

    def variable_specs(self) -> list[InputSpec]:
        """Of the flat inputs: word tables, then routing and weights layer by layer."""
        routing, weights = self.routing_specs(), self.weight_specs()
        specs = weights[: len(self.word_tables)]
        for start, end, weights_start, weights_end in self.separate_bounds:
            specs += routing[start:end] + weights[len(self.word_tables) :][weights_start:weights_end]
        return specs

    def specs(self) -> list[InputSpec]:
        """Of all inputs but a loss's own."""
        return [*self.fixed_specs().values(), *self.variable_specs()]

    def placeholders(self, layout: Layout | None = None) -> list[Tensor]:
        """Inputs of unknown content for compiling; under a mesh's `layout` of the shapes that one rank gives."""
        return placeholders(self.specs(), layout)

    # --- order

    @cached_property
    def separate_bounds(self) -> tuple[LayerBounds, ...]:
        """Bounds of each layer among the routing inputs of all layers, and among the weights of all layers."""
        routing = accumulate((len(layer.routing_specs(0)) for layer in self.layers), initial=0)
        runs = (len(layer.network.tensors) * len(layer.slots_by_input(self.expert_part)) for layer in self.layers)
        pairs = zip(pairwise(routing), pairwise(accumulate(runs, initial=0)), strict=True)
        return tuple((*of_routing, *of_weights) for of_routing, of_weights in pairs)

    @cached_property
    def bounds(self) -> tuple[int, tuple[LayerBounds, ...], int]:
        """What `split_inputs` takes: (number of word tables, bounds of each layer among the flat inputs, their end)."""
        first = len(self.word_tables)
        bounds = tuple(
            (first + a + c, first + b + c, first + b + c, first + b + d) for a, b, c, d in self.separate_bounds
        )
        return first, bounds, bounds[-1][-1] if bounds else first

    @property
    def differentiated(self) -> tuple[int, ...]:
        """Positions among all inputs of those whose gradients a step takes: word tables, then every layer's weights."""
        tables, layers, _ = self.bounds
        fixed = len(self.fixed_specs())
        weights = (i for _, _, start, end in layers for i in range(start, end))
        return tuple(fixed + i for i in (*range(tables), *weights))

    def expert_tensors(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Name -> (position among all inputs, full shape [slots of a chunk, …]) of the weights of a graph that is cut
        over a mesh, in their order."""
        names = [
            chunk_name(layer.name, tensor, chunk)
            for layer in self.layers for chunk in range(layer.chunks) for tensor in layer.network.tensors
        ]  # fmt: skip
        shapes = (shape for shape, _, _ in self.weight_specs())
        return dict(zip(names, zip(self.differentiated, shapes, strict=True), strict=True))

    def of_layers(self, names: Sequence[str]) -> GraphInputs:
        """The inputs of these sparse layers alone, as a pipeline stage has them."""
        return replace(self, layers=tuple(layer for layer in self.layers if layer.name in names))

    # --- packing

    def pack(
        self, batch: RoutedBatch, store: ExpertStore, weights: np.ndarray | None = None, auxiliary_weight: float = 0.0,
        *extra: Tensor,
    ) -> list[Tensor]:  # fmt: skip
        """All inputs for a batch, with experts fetched from `store` and the loss's `extra` inputs last.

        weights float32 [B, S] of the token losses, by default the batch's mask; auxiliary_weight: of the routers'.
        """
        fixed = fixed_arrays(batch)
        fixed["weights"] = batch.mask if weights is None else weights
        fixed["auxiliary_weight"] = np.array(auxiliary_weight, np.float32)
        tensors = [Tensor(fixed[name]) for name in self.fixed_specs()]
        store.start_step()
        tables = [store.full_table(DOMAIN_EMBEDDING, "word")] if self.word_tables else []
        routing = [
            layer.routing_arrays(*of_layer, batch) for layer, *of_layer in self._by_layer(batch.plans, batch.noise)
        ]
        experts = [layer.experts(plan) for layer, plan in self._by_layer(batch.plans)]
        return [*tensors, *self.pack_flat(store, tables, routing, experts), *extra]

    def pack_flat(
        self, store: ExpertStore, tables: Sequence[Tensor], routing: Sequence[Sequence[np.ndarray]],
        experts: Sequence[np.ndarray],
    ) -> list[Tensor]:  # fmt: skip
        """The flat inputs: word tables, then of each layer its routing and the weights of the experts in its slots."""
        tensors = [*tables]
        for layer, arrays, of_slots in self._by_layer(routing, experts):
            tensors += [Tensor(array) for array in arrays]
            if layer.capacity_spec is None:
                tensors += store.fetch(layer.name, of_slots)
            else:
                tensors += [Tensor(array) for array in self.stacked_weights(layer, of_slots, store)]
        return tensors

    def _by_layer(self, *of_layers: Sequence) -> Iterator[tuple]:
        return zip(self.layers, *of_layers, strict=True)

    def stacked_weights(self, layer: LayerInputs, experts: np.ndarray, store: ExpertStore) -> list[np.ndarray]:
        """A layer's weights of a graph that is cut over a mesh: of the `experts` in the slots of this process."""
        stacked, tensors = [], len(layer.network.tensors)
        for slots in layer.slots_by_input(self.expert_part):
            fetched = store.fetch(layer.name, self.stored(experts[slots]))
            stacked += [np.stack([t.asnumpy() for t in fetched[i::tensors]]) for i in range(tensors)]
        return stacked

    def stored(self, experts: np.ndarray) -> np.ndarray:
        """Positions on a layer's expert axis as the store of this process counts them."""
        local = self.local_experts
        return experts if local is None else (experts - local.start) // local.step

    # --- gradients

    def expert_gradients(
        self, gradients: Sequence[Tensor], plans: Sequence[Plan], trains: np.ndarray, domains: Iterable[int] = ()
    ) -> dict[tuple[str, int], list[Tensor]]:
        """(layer name, expert as the store counts) -> gradients of its tensors, from those of the differentiated
        inputs.

        plans: of each layer. trains bool [layers, E]: experts that train and received a row; no other's gradients are
        looked at, because a product over no rows leaves memory as it was. domains: ids whose own word table trains.
        """
        by_expert = {(DOMAIN_EMBEDDING, int(domain)): [gradients[0][int(domain)]] for domain in domains}
        gradients = gradients[len(self.word_tables) :]
        for index, (layer, plan) in enumerate(self._by_layer(plans)):
            _, _, start, end = self.separate_bounds[index]
            of_layer, tensors = gradients[start:end], len(layer.network.tensors)
            is_stacked = layer.capacity_spec is not None
            experts = layer.experts(plan)
            if not is_stacked and self.local_experts is not None:
                experts = self.local_experts.start + experts  # such a plan counts as the store does
            takes = trains[index, experts] & (True if plan is None else plan.counts > 0)
            for run, slots in enumerate(layer.slots_by_input(self.expert_part).tolist()):
                of_run = of_layer[run * tensors : (run + 1) * tensors]
                for i, slot in enumerate(slots):
                    if takes[slot]:
                        key = (layer.name, int(self.stored(experts[slot])))
                        by_expert[key] = [gradient[i] for gradient in of_run] if is_stacked else list(of_run)
        return by_expert

    # --- a pipeline's graph of a whole step, whose inputs are all cut into micro-batches and whose experts are its own

    def pipeline_specs(self, micro_batches: int, num_domains: int) -> list[InputSpec]:
        """Of the inputs of `PipelinedLoss` for a whole step; these inputs are of one micro-batch."""
        fixed = self.fixed_specs()
        specs = [*(fixed[name] for name in PIPELINE_INPUTS), ((self.batch, num_domains), ms.float32, ("rows", 1))]
        return [
            ((micro_batches * shape[0], *shape[1:]), dtype, spec)
            for shape, dtype, spec in (*specs, *self.routing_specs())
        ]

    def pack_pipeline(self, batches: Sequence[RoutedBatch], weight: float, num_domains: int) -> list[np.ndarray]:
        """This rank's rows of every micro-batch, one behind the other; `weight`: of each token that counts."""
        domains = np.eye(num_domains, dtype=np.float32)
        of_each = []
        for batch in batches:
            fixed = fixed_arrays(batch)
            fixed["weights"] = batch.mask * np.float32(weight)
            arrays = [fixed[name] for name in PIPELINE_INPUTS] + [domains[batch.domain]]
            of_each.append(arrays + self.routing_arrays(batch))
        return [np.concatenate(parts) for parts in zip(*of_each, strict=True)]

    def routing_arrays(self, batch: RoutedBatch) -> list[np.ndarray]:
        """The routing inputs of all layers for a batch."""
        by_layer = self._by_layer(batch.plans, batch.noise)
        return [array for layer, plan, noise in by_layer for array in layer.routing_arrays(plan, noise, batch)]


# Fixed inputs that a planned batch has, and of these those of a pipeline's graph, which has no dropout, embeddings per
# domain and auxiliary losses.
BATCH_INPUTS = ("tokens", "labels", "weights", "positions", "segments", "domain", "keys")
PIPELINE_INPUTS = BATCH_INPUTS[:5]
WEIGHTS, DOMAIN = BATCH_INPUTS.index("weights"), BATCH_INPUTS.index("domain")


def fixed_arrays(batch: RoutedBatch) -> dict[str, np.ndarray]:
    """The fixed inputs that a batch has by name: `BATCH_INPUTS`, its mask as the weights."""
    return {name: batch.mask if name == "weights" else getattr(batch, name) for name in BATCH_INPUTS}


def placeholders(specs: Iterable[InputSpec], layout: Layout | None = None) -> list[Tensor]:
    """Tensors of unknown content for compiling; under a mesh's `layout` of the shapes that one rank gives."""
    local_shape = (layout or Layout()).local_shape
    return [Tensor(shape=local_shape(shape, spec), dtype=dtype) for shape, dtype, spec in specs]


# --- functions of a graph: `bounds` are constants that its cell holds


def split_inputs(flat: tuple, bounds: tuple) -> tuple:
    """The flat inputs (after the fixed ones) -> (word tables, (routing, weights) of every sparse layer, the loss's own
    inputs); `bounds` of `GraphInputs.bounds`."""
    tables, layers, end = bounds
    return flat[:tables], layer_inputs(flat, flat, layers), flat[end:]


def layer_inputs(routing: tuple, weights: tuple, bounds: tuple) -> tuple:
    """(routing, weights) of every sparse layer, from what all layers' routing and all layers' weights stand in."""
    layers = ()
    for start, end, weights_start, weights_end in bounds:
        layers = layers + ((routing[start:end], weights[weights_start:weights_end]),)
    return layers


def split_pipeline_inputs(flat: tuple, experts: tuple, bounds: tuple) -> tuple:
    """A pipeline's inputs of a micro-batch -> (`PIPELINE_INPUTS`, domains one-hot float32 [B, d], (routing, weights) of
    every sparse layer); `experts`: all weights; `bounds` of `GraphInputs.separate_bounds`."""
    end = len(PIPELINE_INPUTS)
    return flat[:end], flat[end], layer_inputs(flat[end + 1 :], experts, bounds)


def with_weights(batch_inputs: tuple, weights: Tensor, auxiliary_weight: Tensor) -> tuple:
    """`BATCH_INPUTS` of a batch -> the fixed inputs, with these weights."""
    return batch_inputs[:WEIGHTS] + (weights, auxiliary_weight) + batch_inputs[WEIGHTS + 1 :]
