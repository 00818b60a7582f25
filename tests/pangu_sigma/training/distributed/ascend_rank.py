"""In the dry process: what `train` builds on one rank of a mesh of devices, up to where a device would compute.

    python ascend_rank.py CONFIG.yaml RESULT.npz

The trainer compiles its step, the shared parameters get their values, and the graphs of a phase that freezes them and
of an evaluation are compiled beside it. RESULT holds for every shared parameter the rank's part of it (`value NAME`),
what MindSpore's own loader would have made of the whole one (`loaded NAME`) and, as `moment NAME`, the optimizer's.

A rank of a pipeline stage has one graph. It plans a step's text, puts the experts that meet it where the graph has
them and tells their values, and what the loader makes of the whole ones, in the same way; `inputs` is True for each
input that has the shape which the graph takes.
"""

import os
import sys

from parallel.operator_layout import LOCAL_SLICES

os.environ.update(LOCAL_SLICES)  # as `pangu_sigma.runtime` does

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.communication import init
from mindspore.parallel._tensor import _load_tensor_by_layout

from pangu_sigma.config import load_config
from pangu_sigma.data.mixture_sampler import Batch
from pangu_sigma.data.tokenizers.vocabulary_size import vocabulary_size
from pangu_sigma.model.build_model import build_model, initialise_shared
from pangu_sigma.model.initialization import initial_value
from pangu_sigma.training.distributed.distributed_trainer import distributed_trainer
from pangu_sigma.training.distributed.mesh_evaluation import EvaluationGraph
from pangu_sigma.training.distributed.pipeline_step import PipelineTrainStep
from pangu_sigma.training.trainer import Trainer
from parallel.comm.processes import Processes
from rre.counted_random import generator, normal


def main() -> None:
    config, rank = load_config(sys.argv[1]), int(os.environ["RANK_ID"])
    ms.set_context(device_target="GPU", mode=ms.GRAPH_MODE, save_graphs=2, save_graphs_path="graphs")
    init("nccl")
    model = build_model(config, vocabulary_size(config), 0, processes=Processes(config.parallel.mesh, rank))
    trainer = distributed_trainer(model)
    staged = trainer.forward_backward.one_graph
    if staged:
        cell = trainer.forward_backward.pipeline.cell
    else:
        cell = trainer.forward_backward.compiled_step(True, trainer.objective).cell
    layouts = cell.parameter_layout_dict
    initialise_shared(model)
    results = {}
    for name, array in model.shared.values().items():
        full = initial_value(name, model.shared.shapes[name], config.run.seed, config.model)
        loaded = _load_tensor_by_layout(Tensor(full), layouts[name], rank) if name in layouts else full
        results[f"value {name}"] = array
        results[f"loaded {name}"] = np.asarray(loaded)
    for name, array in trainer.optimizer.moments().items():
        results[f"moment {name}"] = array
    if staged:
        results |= planned_step(trainer, cell, rank)
        np.savez(sys.argv[2], **results)
        return
    ms.set_context(save_graphs_path="frozen")
    trainer.forward_backward.compiled_step(False, trainer.objective)
    ms.set_context(save_graphs_path="evaluation")
    evaluation = EvaluationGraph(model, 2 * config.parallel.mesh.rows, 8)
    with evaluation.graph.context:
        evaluation.cell.compile(*evaluation.cell.get_inputs())
    np.savez(sys.argv[2], **results)


def planned_step(trainer: Trainer, cell: PipelineTrainStep, rank: int) -> dict[str, np.ndarray]:
    """What a rank gives its stage's graph for a step."""
    runner, model = trainer.forward_backward, trainer.model
    rows, draw = trainer.read_rows, np.random.default_rng(1)
    text = draw.integers(0, 512, (model.config.train.batch_size, model.config.data.sequence_length + 1))
    planned = trainer.plan(Batch(text[rows].astype(np.int32), np.zeros(rows.size, np.int32), rows.astype(np.int64), 0))
    inputs = trainer.inputs.pack_pipeline(planned, 1.0, len(model.groups.names))
    results = {"inputs": np.array([a.shape == tuple(t.shape) for a, t in zip(inputs, cell.get_inputs(), strict=True)])}
    runner.pipeline.set_experts(runner.local_experts(planned[0]))
    layers = {layer.name: index for index, layer in enumerate(trainer.inputs.layers)}
    std = {"up.weight": model.config.model.init_std, "down.weight": model.config.model.residual_std}
    for parameter in cell.experts:
        layer_name, tensor = parameter.name.split(".experts.")
        tensor, chunk = tensor.split("/")
        capacity_spec = trainer.inputs.layers[layers[layer_name]].capacity_spec
        shape = model.expert_shards[tensor].shape
        experts = planned[0].plans[layers[layer_name]].experts[capacity_spec.by_chunk()[int(chunk)]]
        full_experts = np.zeros((experts.size, *shape), np.float32)
        for slot, expert in enumerate(experts.tolist()) if tensor in std else ():
            rng = generator(model.config.run.seed, f"initial {layer_name} {tensor}", expert)
            full_experts[slot] = normal(rng, (1, *shape), std[tensor], model.config.model.init_cutoff)[0]
        results[f"value {parameter.name}"] = parameter.asnumpy()
        stated = cell.parameter_layout_dict[parameter.name]
        # Where a product takes the slots by placement group, here one, the cut is stated with an axis of 1 before them.
        full = [1] * (len(stated[1]) - full_experts.ndim) + list(full_experts.shape)
        results[f"loaded {parameter.name}"] = np.asarray(
            _load_tensor_by_layout(Tensor(full_experts), (*stated[:6], full, *stated[7:]), rank)
        )
    return results


if __name__ == "__main__":
    main()
