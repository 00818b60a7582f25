"""A graph's inputs: what is packed has the shapes that were compiled for, splits into its groups again, and gradients
come back to the experts whose weights they are of."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping

import numpy as np
import pytest
from mindspore import Tensor

from pangu_sigma.config import config_from_dict
from pangu_sigma.model.batch_planner import BatchPlanner
from pangu_sigma.model.build_model import build_model
from pangu_sigma.model.forward_pass import ForwardPass
from pangu_sigma.model.graph_inputs import (
    BATCH_INPUTS,
    GraphInputs,
    fixed_arrays,
    layer_inputs,
    split_inputs,
    with_weights,
)
from pangu_sigma.model.model import Model
from pangu_sigma.model.routed_batch import RoutedBatch
from pangu_sigma.tensor_names import DOMAIN_EMBEDDING
from rre.dispatch.dispatch_plan import plan_by_expert
from rre.router_specs import ROUTER_SPECS
from tests.pangu_sigma.training.distributed.test_spmd_step import MESHES, VALUES, WholeMesh
from tests.pangu_sigma.training.small_trainer import batch, small_config, small_model

SPARSE = {"layers": 2, "include_query_layer": True}
CASES: dict[str, tuple[Mapping, Mapping]] = {
    name: ({"layers": 3, "sparse": {**SPARSE, "router": name, **({"top_k": 2} if name == "olmoe" else {})}}, {})
    for name in ROUTER_SPECS if name != "every_expert"
}  # fmt: skip
CASES |= {
    "mixture": ({"top_layer": "mixture", "sparse": {"layers": 0}}, {}),
    "noise": ({"layers": 3, "sparse": {**SPARSE, "router": "switch", "jitter": 0.1}}, {}),
    "composed": ({"layers": 3, "sparse": SPARSE}, {"run": {"kernels": "composed"}}),
    "host store": ({"sparse": SPARSE}, {"experts": {"store": "host"}, "data": {"max_domains_per_batch": 1}}),
    "own embedding": ({"domain_parameters": {"embedding": "own"}}, {}),
    "no sparse layer": ({"sparse": {"layers": 0}}, {}),
}
SPMD = {f"mesh {i}": ({}, mesh) for i, mesh in enumerate(MESHES)}
SPMD["mesh, learned"] = ({"router": "gshard", "capacity_samples": 2}, {"data": 2, "expert": 2, "tensor": 2})


def spmd_model(sparse: Mapping, mesh: Mapping) -> Model:
    """A model whose graphs are cut over a mesh, all of whose ranks' parts this process holds."""
    model = {**VALUES["model"], "sparse": {**VALUES["model"]["sparse"], **sparse}}
    run, store = {**VALUES["run"], "device": "Ascend"}, {"store": "device" if sparse else "host"}
    config = config_from_dict({**VALUES, "run": run, "model": model, "parallel": mesh, "experts": store})
    return build_model(config, 48, 2, layout=WholeMesh(config.parallel.mesh))


@pytest.fixture(scope="module", params=[*CASES, *SPMD])
def packed(request):
    """(model, its graph's inputs, a planned batch, the packed tensors)."""
    if request.param in SPMD:
        model, drawn = spmd_model(*SPMD[request.param]), batch(0, [0, 0, 1, 0, 2, 3, 2, 2])
    else:
        values, sections = CASES[request.param]
        domains = [1, 1, 1, 1] if "data" in sections else [0, 2, 2, 0]
        model, drawn = small_model(small_config(values, **sections)), batch(0, domains)
    inputs = model.training_inputs(len(drawn.domain))
    planned = BatchPlanner(model, inputs, training=True)(drawn.tokens, drawn.domain, drawn.sample, 0)
    return model, inputs, planned, inputs.pack(planned, model.store)


def split(inputs: GraphInputs, tensors: list) -> tuple:
    return split_inputs(tuple(tensors[len(inputs.fixed_specs()) :]), inputs.bounds)


def weights_of(model: Model, layer_name: str, expert: int) -> list[np.ndarray]:
    return [model.store.table(layer_name, name)[expert] for name in model.store.shapes[layer_name]]


def test_the_forward_pass_names_the_fixed_inputs_in_their_order():
    names = list(small_model(small_config()).training_inputs(4).fixed_specs())
    assert list(inspect.signature(ForwardPass.construct).parameters)[1:-1] == names
    without = tuple(name for name in names if name != "auxiliary_weight")
    assert without == BATCH_INPUTS
    assert with_weights(without, "weights", "auxiliary_weight") == tuple(names)


def test_packed_inputs_have_the_shapes_and_types_of_the_placeholders(packed):
    _, inputs, _, tensors = packed
    expected = inputs.placeholders()
    assert len(tensors) == len(expected)
    for index, (tensor, placeholder) in enumerate(zip(tensors, expected, strict=True)):
        assert tensor.dtype == placeholder.dtype, index
        dynamic = [size for size, known in zip(tensor.shape, placeholder.shape, strict=True) if known == -1]
        assert tensor.shape == placeholder.shape or dynamic, index


def test_what_is_packed_splits_into_its_groups(packed):
    model, inputs, planned, tensors = packed
    fixed = dict(zip(inputs.fixed_specs(), tensors, strict=False))
    for name, array in fixed_arrays(planned).items():
        np.testing.assert_array_equal(fixed[name].asnumpy(), array, err_msg=name)
    tables, layers, extra = split(inputs, [*tensors, "a loss's own"])
    assert extra == ("a loss's own",)
    assert [t.shape for t in tables] == list(inputs.word_tables)
    for table in tables:
        np.testing.assert_array_equal(table.asnumpy(), model.store.table(DOMAIN_EMBEDDING, "word"))
    assert len(layers) == len(inputs.layers)
    for layer, plan, noise, (routing, weights) in zip(inputs.layers, planned.plans, planned.noise, layers, strict=True):
        arrays = layer.routing_arrays(plan, noise)
        assert len(arrays) == len(routing)
        for tensor, array in zip(routing, arrays, strict=True):
            np.testing.assert_array_equal(tensor.asnumpy(), array)
        # Slot by slot the weights of its expert: as tensors of their own, or stacked chunk by chunk.
        each = len(layer.network.tensors)
        experts = np.arange(layer.slots) if plan is None else plan.experts
        for run, slots in enumerate(layer.slots_by_input(None)):
            tensors_of_run = [t.asnumpy() for t in weights[run * each : (run + 1) * each]]
            for i, slot in enumerate(slots):
                actual = tensors_of_run if layer.capacity_spec is None else [t[i] for t in tensors_of_run]
                for one, expected in zip(actual, weights_of(model, layer.name, experts[slot]), strict=True):
                    np.testing.assert_array_equal(one, expected)


def test_routing_and_weights_that_stand_apart_are_grouped_alike(packed):
    _, inputs, planned, tensors = packed
    _, layers, _ = split(inputs, tensors)
    routing = tuple(t for of_layer, _ in layers for t in of_layer)
    weights = tuple(t for _, of_layer in layers for t in of_layer)
    assert layer_inputs(routing, weights, inputs.separate_bounds) == layers
    assert len(routing) == len(inputs.routing_specs()) == len(inputs.routing_arrays(planned))
    assert len(inputs.word_tables) + len(weights) == len(inputs.weight_specs()) == len(inputs.differentiated)


def received_rows(model: Model, planned: RoutedBatch) -> np.ndarray:
    """Rows of each expert [layers, E]; of learned gates made up, with experts that got none."""
    rows = planned.load.copy()
    for layer, plan in enumerate(planned.plans):
        if plan is None:
            rows[layer] = np.arange(model.groups.total) % 3
    return rows


def test_gradients_come_back_to_the_experts_whose_weights_they_are_of(packed):
    """With the weights themselves in the place of the gradients, every expert gets its own."""
    model, inputs, planned, tensors = packed
    gradients = [tensors[i] for i in inputs.differentiated]
    owner = np.repeat(np.arange(len(model.groups.names)), model.groups.sizes)
    received = received_rows(model, planned)
    domains = [2] if inputs.word_tables else []
    result = inputs.expert_gradients(gradients, planned.plans, (owner != 0) & (received > 0), domains)
    expected = {(DOMAIN_EMBEDDING, domain) for domain in domains}
    for layer, layer_specs in enumerate(inputs.layers):
        for expert in range(model.groups.total):
            if owner[expert] != 0 and received[layer, expert] > 0:
                expected.add((layer_specs.name, expert))
    assert result.keys() == expected
    for (layer_name, expert), its in result.items():
        for one, weights in zip(its, weights_of(model, layer_name, expert), strict=True):
            np.testing.assert_array_equal(one.asnumpy(), weights)


def test_one_part_of_several_processes_counts_experts_as_its_store_does():
    inputs = small_model(small_config()).training_inputs(4)
    inputs = dataclasses.replace(inputs, local_experts=range(2, 8), layers=inputs.layers[:1])
    each, total = len(inputs.layers[0].network.tensors), inputs.layers[0].slots
    gradients = [Tensor(np.float32(i)) for i in range(each * total)]
    plan = plan_by_expert(np.array([[1], [3], [3]]), np.arange(total))
    trains = np.array([[expert != 3 for expert in range(8)]])
    result = inputs.expert_gradients(gradients, [plan], trains)
    assert {key: [float(g) for g in its] for key, its in result.items()} == {
        (inputs.layers[0].name, 3): [float(3 * each + i) for i in range(each)]
    }


def test_the_inputs_of_a_stage_are_those_of_its_layers(packed):
    _, inputs, _, _ = packed
    names = [layer.name for layer in inputs.layers]
    assert [layer.name for layer in inputs.of_layers(names[1:]).layers] == names[1:]
    assert inputs.of_layers(names) == inputs
