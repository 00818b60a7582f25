"""Trainer of a model that several processes share: what its step needs of them."""

from __future__ import annotations

from functools import partial

from pangu_sigma.model.batch_planner import BatchPlanner
from pangu_sigma.model.graph_inputs import GraphInputs
from pangu_sigma.model.model import Model
from pangu_sigma.training.distributed.gradient_all_reduce import AllReducer, SpmdReducer
from pangu_sigma.training.distributed.mesh_runtime import mesh_runtime_of
from pangu_sigma.training.distributed.pipeline_runner import PipelineRunner
from pangu_sigma.training.gradient_accumulation import ForwardBackward, GradientAccumulation
from pangu_sigma.training.objective import TrainingObjective
from pangu_sigma.training.trainer import Trainer


def distributed_trainer(model: Model, objective: TrainingObjective | None = None) -> Trainer:
    """The trainer of this process's part of the model; of one process that has all of it, a plain one."""
    if model.processes.size == 1:
        return Trainer(model, objective)
    if model.layout.spmd_mesh is None:
        return Trainer(model, objective, AllReducer(model))
    objective = objective or TrainingObjective()
    reducer, runtime = SpmdReducer(model), mesh_runtime_of(model)

    def make_forward_backward(inputs: GraphInputs, planner: BatchPlanner) -> ForwardBackward:
        if model.config.parallel.pipeline > 1:
            return PipelineRunner(model, reducer, inputs, runtime.pipeline(inputs))
        accumulation = GradientAccumulation(
            model, reducer, inputs, planner, partial(runtime.gradient_step, inputs)
        )
        if model.shared.deferred_init:
            # From the compilation of this one on, the model's shared parameters are this rank's shards.
            accumulation.compiled_step(True, objective)
        return accumulation

    return Trainer(model, objective, reducer, make_forward_backward)
