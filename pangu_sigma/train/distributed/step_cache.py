"""Step cache: the compiled gradient steps of a run, each made when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable

from pangu_sigma.model.graph_inputs import GraphInputs
from pangu_sigma.model.model import Model
from pangu_sigma.model.sharded_parameters import ShardedParameters
from pangu_sigma.train.distributed.mesh_runtime import Step, mesh_runtime_of
from pangu_sigma.train.objective import TrainingObjective
from pangu_sigma.train.step import GradientStep


class StepCache:
    """A gradient step with shared gradients and one without, made by `make_step`(with shared gradients, objective).

    Their inputs and outputs are `GradientStep`'s, on a mesh of this rank's shards.
    """

    def __init__(self, make_step: Callable[[bool, TrainingObjective], Step]) -> None:
        self.make_step = make_step
        self._steps: dict[bool, Step] = {}

    def clear(self) -> None:
        """Forget all: what they minimise has changed."""
        self._steps.clear()

    def __call__(self, with_shared: bool, objective: TrainingObjective) -> Step:
        """The step."""
        if with_shared not in self._steps:
            self._steps[with_shared] = self.make_step(with_shared, objective)
        return self._steps[with_shared]


def step_cache_of(model: Model, inputs: GraphInputs, objective: TrainingObjective) -> StepCache:
    """The steps of a model: of one process's own graph, or of a mesh's."""
    if not isinstance(model.shared, ShardedParameters):
        return StepCache(
            lambda with_shared, minimised: GradientStep(model.net, inputs, model.layout, with_shared, minimised)
        )
    runtime = mesh_runtime_of(model)
    steps = StepCache(lambda with_shared, minimised: runtime.gradient_step(inputs, with_shared, minimised))
    if model.shared.deferred_init:
        # From the compilation of this one on, the model's shared parameters are this rank's shards.
        steps(True, objective)
    return steps
