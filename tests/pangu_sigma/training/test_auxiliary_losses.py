"""The auxiliary losses of every gate that has some reach the objective exactly once: in a plain step, with recomputed
activations, and in micro-batches."""

from dataclasses import dataclass

import numpy as np
import pytest
from mindspore import Tensor, nn

from pangu_sigma.data.mixture_sampler import Batch
from pangu_sigma.training.step import GradientStep
from rre.router_specs import ROUTER_SPECS
from tests.pangu_sigma.training.small_trainer import batch, changed_names, small_trainer, step_on, tensors_now

GATES = {
    "switch": {"jitter": 0.1, "aux_loss_weight": 0.5, "dispatch": "capacity", "capacity_factor": 0.8},
    "gshard": {"aux_loss_weight": 0.5, "dispatch": "capacity", "capacity_factor": 0.8},
    "glam": {"aux_loss_weight": 0.5},
    "noisy_top_k": {"top_k": 2, "importance_loss_weight": 0.5, "load_loss_weight": 0.5},
    "olmoe": {"top_k": 2, "aux_loss_weight": 0.5, "z_loss_weight": 0.1, "shared_expert": True},
    "olmoe, pooled": {"top_k": 2, "aux_loss_weight": 0.5, "z_loss_weight": 0.1, "balance": "pooled"},
}
# One layer is the whole model where that says enough: graphs take seconds to compile.
SHORT = {"layers": 1, "query_layer": "none", "init_std": 0.3}
GATE = "blocks.0.router.weight"


@dataclass(frozen=True)
class AuxiliaryLossStep:
    """Of one step: the objective with its auxiliary losses, the mean token loss and the auxiliary loss, all summed over
    micro-batches; `gradients` of the shared parameters by name, and `without` the auxiliary losses."""

    objective: float
    loss: float
    auxiliary: float
    gradients: dict[str, np.ndarray]
    without: dict[str, np.ndarray]


class ValueAndGradient(nn.Cell):
    """Everything that value and gradient of a step give."""

    def __init__(self, step: GradientStep) -> None:
        super().__init__(auto_prefix=False)
        self.step = step

    def construct(self, *inputs: Tensor):
        return self.step.value_and_grad(*inputs)


def sparse(gate: str) -> dict:
    return {"router": gate.split(",")[0], **GATES[gate]}


def run_step(gate: str, drawn: Batch, **train) -> AuxiliaryLossStep:
    trainer = small_trainer({**SHORT, "sparse": sparse(gate)}, train=train)
    step = GradientStep(trainer.model.net, trainer.inputs, trainer.model.layout, True, trainer.objective)
    graph = ValueAndGradient(step).set_train()
    names = [p.name for p in trainer.model.net.trainable_params()]
    batches = trainer.plan(drawn)
    total = sum(float(b.mask.sum()) for b in batches)
    results = {"objective": 0.0, "loss": 0.0, "auxiliary": 0.0}
    gradients = {True: dict.fromkeys(names, 0.0), False: dict.fromkeys(names, 0.0)}
    for planned in batches:
        weights, share = trainer.objective.inputs(planned, None, 1.0, total, len(batches))
        for counts in (True, False):
            (objective, by_sample, auxiliary, _), (_, shared) = graph(
                *trainer.inputs.pack(planned, trainer.model.store, weights, share if counts else 0.0)
            )
            for name, gradient in zip(names, shared, strict=True):
                gradients[counts][name] = gradients[counts][name] + gradient.asnumpy().astype(np.float64)
            if counts:
                results["objective"] += float(objective.asnumpy())
                results["loss"] += float(by_sample.asnumpy().sum()) / total
                results["auxiliary"] += float(auxiliary.asnumpy()) / len(batches)
    return AuxiliaryLossStep(**results, gradients=gradients[True], without=gradients[False])


def twice(drawn: Batch) -> Batch:
    """Two micro-batches of the same text, for which gates draw the same noise."""
    tokens, domain = np.concatenate([drawn.tokens] * 2), np.concatenate([drawn.domain] * 2)
    return Batch(tokens, domain, np.concatenate([drawn.sample] * 2), drawn.step)


@pytest.fixture(scope="module")
def plain():
    """gate -> a step on a whole batch, made once."""
    steps: dict[str, AuxiliaryLossStep] = {}

    def get(gate: str) -> AuxiliaryLossStep:
        if gate not in steps:
            steps[gate] = run_step(gate, twice(batch(0, [0, 1])))
        return steps[gate]

    return get


def test_every_gate_with_an_auxiliary_loss_is_here():
    weighed = {n for n, spec in ROUTER_SPECS.items() if any(option.weighs_loss for option in spec.options)}
    assert {gate.split(",")[0] for gate in GATES} == weighed


@pytest.mark.parametrize("gate", GATES)
def test_the_objective_is_the_token_loss_and_the_auxiliary_loss_once(plain, gate):
    """What the auxiliary loss is, the oracles of `tests/rre/routers` and `tests/pangu_sigma/model` say."""
    step = plain(gate)
    assert step.auxiliary > 0.1
    assert step.objective == pytest.approx(step.loss + step.auxiliary, rel=1e-6)
    assert np.abs(step.gradients[GATE] - step.without[GATE]).max() > 1e-3


@pytest.mark.parametrize("gate", GATES)
def test_once_with_recomputed_activations_too(plain, gate):
    undivided, again = plain(gate), run_step(gate, twice(batch(0, [0, 1])), recompute=True)
    assert (again.objective, again.loss, again.auxiliary) == (undivided.objective, undivided.loss, undivided.auxiliary)
    for name, gradient in undivided.gradients.items():
        np.testing.assert_array_equal(again.gradients[name], gradient, err_msg=name)


@pytest.mark.parametrize("gate", GATES)
def test_once_over_micro_batches_too(plain, gate):
    """Of equal micro-batches, whose mean is the whole batch's auxiliary loss."""
    undivided, parts = plain(gate), run_step(gate, twice(batch(0, [0, 1])), gradient_accumulation_steps=2)
    assert parts.auxiliary == pytest.approx(undivided.auxiliary, rel=1e-5)
    assert parts.objective == pytest.approx(undivided.objective, rel=1e-5)
    for name, gradient in undivided.gradients.items():
        np.testing.assert_allclose(parts.gradients[name], gradient, rtol=1e-3, atol=1e-6, err_msg=name)
    # What the auxiliary loss adds to the gate's gradient, which a second helping would double.
    pull, pull_in_parts = (m.gradients[GATE] - m.without[GATE] for m in (undivided, parts))
    np.testing.assert_allclose(pull_in_parts, pull, atol=1e-3 * np.abs(pull).max())


def test_recomputation_changes_no_bit_of_trained_gates_in_several_layers():
    results = []
    for recompute in (False, True):
        trainer = small_trainer(
            {"layers": 2, "query_layer": "none", "sparse": {"layers": 2, **sparse("olmoe")}},
            train={"recompute": recompute},
        )
        steps = [step_on(trainer, step, batch(step, [0, 1, 2, 0])) for step in range(2)]
        results.append((steps, tensors_now(trainer)))
    assert results[0][0] == results[1][0]
    assert not changed_names(results[0][1], results[1][1])
