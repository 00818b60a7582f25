"""The graph of a whole step is the sum of its micro-batches, in value and gradients; every tensor has one stage."""

from __future__ import annotations

import os

import numpy as np
from mindspore import ParameterTuple, Tensor, ops

from pangu_sigma.config import config_from_dict
from pangu_sigma.model.batch_planner import BatchPlanner
from pangu_sigma.model.build_model import build_model
from pangu_sigma.model.forward_pass import ForwardPass, WeightedLoss
from pangu_sigma.model.pipeline_stages import stage_of
from pangu_sigma.training.distributed.pipeline_step import PipelinedLoss
from parallel.mesh import Mesh
from parallel.micro_batches import MicroBatches
from parallel.operator_layout import LOCAL_SLICES
from tests.pangu_sigma.training.distributed.test_spmd_step import BATCH, LENGTH, VALUES, VOCAB, WholeMesh

MICRO = 2


def test_micro_batches_of_one_graph_add_up():
    mesh = {"expert": 2, "pipeline": 2}
    config = config_from_dict(
        {
            **VALUES, "run": {**VALUES["run"], "device": "Ascend"}, "parallel": mesh, "experts": {"store": "device"},
            "model": {**VALUES["model"], "layers": 4},
            "train": {**VALUES["train"], "gradient_accumulation_steps": MICRO},
        }
    )  # fmt: skip
    model = build_model(config, VOCAB, 3, layout=WholeMesh(config.parallel.mesh))
    inputs = model.training_inputs(BATCH // MICRO)
    planner = BatchPlanner(model, inputs, training=True)
    draw = np.random.default_rng(4)
    batches = []
    for index in range(MICRO):
        tokens = draw.integers(0, VOCAB, (BATCH // MICRO, LENGTH + 1)).astype(np.int32)
        batches.append(planner(tokens, np.arange(4), np.arange(4) + 4 * index, 0))
    token_weight = np.float32(1) / np.float32(100)
    columns = [inputs.pack_pipeline([b], token_weight, 4) for b in batches]
    packed = inputs.pack(batches[0], model.store)
    weights = [packed[i] for i in inputs.differentiated]

    model.net.set_stages(config.parallel.mesh)
    loss = PipelinedLoss(model.net, model.layout, inputs)
    assert [p.shape for p in loss.experts] == [w.shape for w in weights]
    assert {p.name: p.shape for p in loss.experts} == {name: s for name, (_, s) in inputs.expert_tensors().items()}
    for parameter, weight in zip(loss.experts, weights, strict=True):
        parameter.set_data(weight)
    trained = ParameterTuple([*model.net.trainable_params(), *loss.experts])
    alone = ops.value_and_grad(loss.set_train(), None, trained)
    # One micro-batch alone is a training loss' objective; each of its domains has one sample.
    training_loss = ForwardPass(model.net, inputs, WeightedLoss(model.net.head, model.layout)).set_train()
    expected, sums = np.zeros(4), [0.0] * len(trained)
    for planned, parts in zip(batches, columns, strict=True):
        one, its = alone(*(Tensor(a) for a in parts))
        _, by_sample, _, _ = training_loss(*inputs.pack(planned, model.store))
        np.testing.assert_allclose(one.asnumpy(), by_sample.asnumpy() / 100, rtol=1e-6)
        expected += one.asnumpy()
        sums = [a + g.asnumpy() for a, g in zip(sums, its, strict=True)]
    full_inputs = [Tensor(array) for array in inputs.pack_pipeline(batches, token_weight, 4)]
    for sent_per_micro_batch in (False, True):
        if sent_per_micro_batch:
            model.net.send_tied_embedding(model.layout)
        value, gradients = ops.value_and_grad(MicroBatches(loss, MICRO).set_train(), None, trained)(*full_inputs)
        np.testing.assert_allclose(value.asnumpy(), expected, rtol=1e-6)
        for parameter, gradient, expected_gradient in zip(trained, gradients, sums, strict=True):
            np.testing.assert_allclose(
                gradient.asnumpy(), expected_gradient, atol=1e-6, rtol=1e-4, err_msg=parameter.name
            )
        assert any(np.abs(g.asnumpy()).max() > 0 for g in gradients[-4:])

    packed = [(t.shape, t.dtype) for t in full_inputs]
    assert [(shape, dtype) for shape, dtype, _ in inputs.pipeline_specs(MICRO, 4)] == packed


def test_a_process_that_trains_has_slices_stay():
    assert os.environ.items() >= LOCAL_SLICES.items()


def test_every_tensor_has_one_stage():
    mesh = Mesh(pipeline=4)
    names = ["embedding.word", "embedding.position", "blocks.0.norm1.gamma", "blocks.5.router.weight"]
    names += ["domains.law.optimizer.m.blocks.4.experts.up.weight", "query_layer.norm1.beta", "embedding.query"]
    names += ["head.word"]
    assert [stage_of(name, 8, mesh) for name in names] == [0, 0, 0, 2, 2, 3, 3, 3]
