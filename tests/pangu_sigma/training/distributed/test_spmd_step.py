"""The graph that is cut over devices is the same function: computed whole by one process it trains as the CPU's does.

A layout of a mesh has no effect on values outside MindSpore's semi-auto-parallel mode, so the very cells that are
compiled for a cluster run here, with every shard in one process.
"""

from __future__ import annotations

import numpy as np
import pytest

from pangu_sigma.config import config_from_dict
from pangu_sigma.errors import UserError
from pangu_sigma.model.build_model import build_model
from pangu_sigma.training.schedule import scheduled_step
from pangu_sigma.training.trainer import Trainer
from parallel.operator_layout import Layout, MeshLayout

VOCAB, LENGTH, BATCH = 64, 16, 8
VALUES = {
    "schema_version": 2,
    "run": {"dir": "run", "kernels": "composed"},
    "model": {
        "layers": 3, "hidden": 16, "heads": 4, "ffn": 32, "positions": LENGTH, "vocab_size": VOCAB, "init_std": 0.3,
        "sparse": {"layers": 2, "dispatch": "capacity", "capacity_factor": 0.8, "shared_expert": True},
    },
    "domains": [{"name": n, "data": ["unread.jsonl"], "experts": 4} for n in ("a", "b", "c", "d")],
    "data": {"sequence_length": LENGTH, "tokenizer": {"kind": "train", "vocab_size": VOCAB}},
    "optimizer": {"learning_rate": 1e-2},
    "schedule": {"kind": "constant"},
    "train": {"steps": 4, "batch_size": BATCH},
    "experts": {"store": "host"},
}  # fmt: skip
MESHES = [
    {"data": 2, "expert": 2, "tensor": 2},
    {"expert": 4, "tensor": 2, "placement": "domain", "placement_groups": 2, "expert_chunks": 2},
]


class WholeMesh(MeshLayout):
    """A mesh's layout in one process, which gives every rank's part of an input."""

    def local_shape(self, shape, spec):
        return Layout.local_shape(self, shape, spec)


def trained(values, layout_of=None, steps=2):
    """(losses, gradient norms, first moments of every trained tensor, rows dropped) of a few steps.

    Moments, because they are sums of gradients: Adam turns the rounding of a gradient that is zero, such as that of a
    key's bias, into a weight's full step.
    """
    config = config_from_dict(values)
    layout = layout_of(config) if layout_of else None
    model = build_model(config, VOCAB, 3, layout=layout)
    trainer = Trainer(model)
    draw = np.random.default_rng(4)
    results, dropped = [], 0
    for step in range(steps):
        tokens = draw.integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
        # The first half of the ranks reads the first two domains, as domain placement asks.
        domain = np.array([0, 0, 1, 0, 2, 3, 2, 2])
        planned = trainer.planner(tokens, domain, np.arange(BATCH) + step * BATCH, step)
        results.append(trainer.step(scheduled_step(trainer.config, step), [planned]))
        dropped += int(planned.dropped.sum())
    model.store.flush()
    moments = {name: m for name, m in trainer.optimizer.moments().items() if name.startswith("optimizer.m.")}
    moments |= {
        f"{layer_name} {name}": table.copy() for kind, layer_name, name, table in model.store.tables() if kind == "m"
    }
    return [r.loss for r in results], [r.gradient_norm for r in results], moments, dropped


@pytest.fixture(scope="module")
def expected():
    return trained(VALUES)


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: "-".join(f"{k}{v}" for k, v in m.items()))
def test_a_step_that_is_cut_over_a_mesh_trains_as_one_process_does(expected, mesh):
    values = {**VALUES, "run": {**VALUES["run"], "device": "Ascend"}, "parallel": mesh}
    sharded = trained(values, lambda config: WholeMesh(config.parallel.mesh))
    assert sharded[3] == expected[3] > 0
    np.testing.assert_allclose(sharded[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(sharded[1], expected[1], rtol=1e-4)
    assert sharded[2].keys() == expected[2].keys()
    for name, value in expected[2].items():
        np.testing.assert_allclose(sharded[2][name], value, atol=1e-5, rtol=1e-3, err_msg=name)
        if value.ndim > 1 and " " in name:
            # An expert that no row reached has no gradient at all, in either.
            idle = [not expert.any() for expert in value]
            assert idle == [not expert.any() for expert in sharded[2][name]], name


def test_olmoes_parts_that_are_cut_over_a_mesh_train_as_in_one_process():
    # All but the norm: a device's own has no kernel on CPU, and is compiled alone (tests of `plan --compile`).
    parts = {
        "position": "rope", "feed_forward": "swiglu", "activation": "silu", "head": "untied",
        "biases": False, "query_layer": "none", "attention": {"qk_norm": True},
    }  # fmt: skip
    values = {**VALUES, "model": {**VALUES["model"], **parts}}
    expected = trained(values)
    mesh = {"data": 2, "expert": 2, "tensor": 2, "expert_chunks": 2}
    cut = {**values, "run": {**VALUES["run"], "device": "Ascend"}, "parallel": mesh}
    sharded = trained(cut, lambda config: WholeMesh(config.parallel.mesh))
    np.testing.assert_allclose(sharded[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(sharded[1], expected[1], rtol=1e-4)
    assert sharded[2].keys() == expected[2].keys() and any("gate.weight" in name for name in sharded[2])
    for name, value in expected[2].items():
        np.testing.assert_allclose(sharded[2][name], value, atol=1e-5, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize(
    ("router", "samples"),
    [("switch", 1), ("gshard", 2), ("olmoe", 1), pytest.param("noisy_top_k", 2, marks=pytest.mark.slow)],
)
def test_a_learned_gate_that_is_cut_over_a_mesh_trains_as_one_process_does(router, samples):
    sparse = {**VALUES["model"]["sparse"], "router": router, "capacity_samples": samples}
    values = {**VALUES, "model": {**VALUES["model"], "sparse": sparse}, "experts": {"store": "device"}}
    expected = trained(values)
    mesh = {"data": 2, "expert": 2, "tensor": 2}
    cut = {**values, "run": {**VALUES["run"], "device": "Ascend"}, "parallel": mesh}
    sharded = trained(cut, lambda config: WholeMesh(config.parallel.mesh))
    np.testing.assert_allclose(sharded[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(sharded[1], expected[1], rtol=1e-4)
    assert sharded[2].keys() == expected[2].keys()
    assert any(name.endswith("router.weight") and value.any() for name, value in sharded[2].items())
    for name, value in expected[2].items():
        np.testing.assert_allclose(sharded[2][name], value, atol=1e-5, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model", {"dropout": 0.1}, "model.dropout = 0.1 has no form that is cut over devices"),
        ("model", {"domain_parameters": {"embedding": "own"}}, "set it to shared"),
        ("sparse", {"router": "expert_choice", "dispatch": "dropless"}, "choose one of rre, .*, noisy_top_k, olmoe"),
        ("sparse", {"router": "olmoe", "balance": "pooled"}, "set it to per_layer"),
        ("chunked gate", {"router": "switch"}, "set it to 1, or the router to rre or hash"),
        ("sparse", {"dispatch": "dropless"}, "fixed shapes: set it to capacity"),
        ("model", {"hidden": 12}, "which every expert is cut|does not divide"),
        ("parallel", {"expert_chunks": 3}, "choose a divisor of 4"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(section, changes, message):
    mesh = {"data": 2, "expert": 4, "tensor": 4}
    values = {**VALUES, "run": {**VALUES["run"], "device": "Ascend"}, "parallel": mesh}
    model = {**VALUES["model"]}
    if section == "model":
        model |= changes
    elif section in ("sparse", "chunked gate"):
        model["sparse"] = {**model["sparse"], **changes}
        values["experts"] = {"store": "device"}
        values["parallel"] = {**values["parallel"], "expert_chunks": 2 if section == "chunked gate" else 1}
    else:
        values["parallel"] = {**values["parallel"], **changes}
    with pytest.raises(UserError, match=message):
        config_from_dict({**values, "model": model})
