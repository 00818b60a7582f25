"""Distillation from a frozen teacher: the objective's value and gradient, the pass under an old domain's experts."""

import gc

import numpy as np
import pytest
from mindspore import Tensor

from pangu_sigma.config.training_sections import RegulariseConfig
from pangu_sigma.data.mixture_sampler import Batch
from pangu_sigma.errors import UserError
from pangu_sigma.model.scoring import Scorer
from pangu_sigma.training.continual.controller import ContinualController
from pangu_sigma.training.continual.distillation import DistillationObjective
from pangu_sigma.training.continual.teacher import Teacher
from pangu_sigma.training.objective import TrainingObjective
from pangu_sigma.training.schedule import Phase, scheduled_step
from pangu_sigma.training.trainer import Regulariser
from tests.pangu_sigma.training.small_trainer import (
    EXPERTS,
    LENGTH,
    batch,
    first_step_gradients,
    small_config,
    small_model,
    small_trainer,
    step_on,
    tensors_now,
)

torch = pytest.importorskip("torch", reason="PyTorch is the reference")
# Gradients are not clipped, so that they can be compared.
LINEAR = {"max_grad_norm": 1e9}


@pytest.fixture(scope="module")
def other():
    """A frozen model of another seed."""
    config = small_config({"init_std": 0.3}, run={"seed": 7})
    return Teacher(small_model(config), config, 4)


def distilling_gradients(output: float, teacher: Teacher, drawn: Batch, **train) -> dict[str, np.ndarray]:
    trainer = small_trainer({"init_std": 0.3}, optimizer=LINEAR, train=train)
    return first_step_gradients(trainer, drawn, Regulariser(DistillationObjective(teacher, output)))


def test_the_objectives_gradient_is_that_of_loss_and_divergence(other):
    """Of a parameter that every row depends on, along its gradient: against a central difference in float64 sums."""
    drawn = batch(0, [0, 1, 2, 0])
    trainer = small_trainer({"init_std": 0.3}, optimizer=LINEAR)
    (planned,) = trainer.plan(drawn)
    tokens = np.concatenate([planned.tokens, planned.labels[:, -1:]], 1)
    scorer = Scorer(trainer.model, 4, domains=3)
    q = torch.log_softmax(torch.tensor(other.logits(planned).asnumpy(), dtype=torch.float64), -1)

    def objective() -> tuple[float, float]:
        log_p = torch.log_softmax(torch.tensor(scorer.logits(tokens, drawn.domain).asnumpy(), dtype=torch.float64), -1)
        losses = torch.nn.functional.nll_loss(log_p.reshape(-1, log_p.shape[-1]),
                                              torch.tensor(planned.labels.reshape(-1), dtype=torch.long))  # fmt: skip
        kl = torch.nn.functional.kl_div(log_p, q, reduction="none", log_target=True).sum(-1).mean()
        return float(losses), float(kl)

    parameter = next(p for p in trainer.model.net.trainable_params() if p.name == "query_layer.feed_forward.up.weight")
    start = parameter.asnumpy().copy()
    loss, kl = objective()
    outcome = trainer.step(scheduled_step(trainer.config, 0), [planned], Regulariser(DistillationObjective(other, 0.7)))
    record = trainer.take_record()
    assert outcome.loss == pytest.approx(loss, rel=1e-5)
    assert record["figures"]["divergence"] == pytest.approx(kl, rel=1e-5) and kl > 0.01
    gradient = tensors_now(trainer)[f"optimizer.m.{parameter.name}"] / 0.1
    for p, value in trainer_start(trainer):
        p.set_data(Tensor(value))
    direction = gradient / np.linalg.norm(gradient)
    values = []
    for sign in (1, -1):
        parameter.set_data(Tensor(start + np.float32(sign * 0.02) * direction))
        loss, kl = objective()
        values.append(loss + 0.7 * kl)
    assert (values[0] - values[1]) / 0.04 == pytest.approx(np.linalg.norm(gradient), rel=5e-3)


def trainer_start(trainer):
    """Every parameter with the value that the model began with."""
    fresh = small_trainer({"init_std": 0.3})
    values = {p.name: p.asnumpy() for p in fresh.model.net.get_parameters()}
    for layer_name, name, table in ((p, n, t) for k, p, n, t in fresh.model.store.tables() if k == "weight"):
        trainer.model.store.table(layer_name, name)[...] = table
    return [(p, values[p.name]) for p in trainer.model.net.get_parameters()]


def test_a_model_that_is_its_own_teacher_has_the_plain_gradient():
    """The divergence has no gradient where both distributions are the same."""
    drawn = batch(0, [0, 1, 2, 0])
    config = small_config({"init_std": 0.3})
    itself = Teacher(small_model(config), config, 4)
    plain = first_step_gradients(small_trainer({"init_std": 0.3}, optimizer=LINEAR), drawn)
    distilled = distilling_gradients(5.0, itself, drawn)
    for name, gradient in plain.items():
        np.testing.assert_allclose(distilled[name], gradient, rtol=1e-3, atol=2e-5, err_msg=name)


def test_micro_batches_of_a_distilled_step_add_up(other):
    drawn = batch(0, [0, 1, 2, 0])
    config = small_config({"init_std": 0.3}, run={"seed": 7})
    half = Teacher(other.model, config, 2)
    one = distilling_gradients(0.7, other, drawn)
    two = distilling_gradients(0.7, half, drawn, gradient_accumulation_steps=2)
    for name, gradient in one.items():
        np.testing.assert_allclose(two[name], gradient, rtol=1e-3, atol=2e-6, err_msg=name)


def test_slots_of_their_own_have_the_same_divergence(other):
    model = {"init_std": 0.3, "domain_parameters": {"embedding": "own"}}
    config = small_config(model, run={"seed": 7})
    teacher = Teacher(small_model(config), config, 4)
    trainer = small_trainer(model, optimizer=LINEAR)
    drawn = batch(0, [0, 1, 2, 0])
    (planned,) = trainer.plan(drawn)
    now = Scorer(trainer.model, 4, domains=3).logits(planned.sequences, drawn.domain).asnumpy()
    log_p, log_q = (torch.log_softmax(torch.tensor(x, dtype=torch.float64), -1)
                    for x in (now, teacher.logits(planned).asnumpy()))  # fmt: skip
    expected = torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).mean()
    trainer.step(scheduled_step(trainer.config, 0), [planned], Regulariser(DistillationObjective(teacher, 0.5)))
    assert trainer.take_record()["figures"]["divergence"] == pytest.approx(float(expected), rel=1e-4)


def test_new_text_is_compared_under_an_old_domains_experts(other):
    """The loss is the text's own, the divergence that of both models under the old domain, whose experts feel it."""
    drawn = batch(0, [2, 2, 2, 2])
    law = list(EXPERTS).index("law")
    for objective in (None, DistillationObjective(other, 0.7, through=[law])):
        trainer = small_trainer({"init_std": 0.3}, optimizer=LINEAR)
        (planned,) = trainer.plan(drawn)
        logits = [Scorer(model, 4).logits(planned.sequences, [law] * 4).asnumpy().copy()
                  for model in (trainer.model, other.model)]  # fmt: skip
        outcome = trainer.step(scheduled_step(trainer.config, 0), [planned], Regulariser(objective))
        if objective is None:
            expected_loss, plain = outcome.loss, tensors_now(trainer)
    log_p, log_q = (torch.log_softmax(torch.tensor(x, dtype=torch.float64), -1) for x in logits)
    kl = torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).mean()
    record = trainer.take_record()
    assert outcome.loss == pytest.approx(expected_loss, rel=1e-5) and record["tokens"] == {"poems": 4 * LENGTH}
    assert record["figures"]["divergence"] == pytest.approx(float(kl), rel=1e-4)
    distilled = tensors_now(trainer)
    up = "blocks.0.experts.up.weight"
    assert distilled[f"domains.law.optimizer.m.{up}"].any() and not plain[f"domains.law.optimizer.m.{up}"].any()
    np.testing.assert_allclose(
        distilled[f"domains.poems.optimizer.m.{up}"], plain[f"domains.poems.optimizer.m.{up}"], rtol=1e-3, atol=1e-7
    )
    assert not np.allclose(distilled["optimizer.m.embedding.word"], plain["optimizer.m.embedding.word"], atol=1e-4)


def test_an_old_domain_is_drawn_for_every_micro_batch_the_same_way(other):
    objective = DistillationObjective(other, 0.7, through=[0, 1], seed=3)
    trainer = small_trainer({"init_std": 0.3})
    drawn = []
    for step in range(12):
        planned = trainer.plan(batch(step, [2, 2, 2, 2]))
        extra = objective.extra_batches(planned, trainer.planner)
        assert not extra[0].mask.any() and extra[0].compared.all() and (extra[0].tokens == planned[0].tokens).all()
        again = objective.extra_batches(planned, trainer.planner)
        assert (again[0].domain == extra[0].domain).all() and len(set(extra[0].domain.tolist())) == 1
        drawn.append(int(extra[0].domain[0]))
    assert set(drawn) == {0, 1}


def test_another_objective_than_the_mean_token_loss_is_not_distilled(other, tmp_path):
    class Another(TrainingObjective):
        pass

    phase = Phase(0, True, frozenset(EXPERTS), RegulariseConfig(output=1.0))
    controller = ContinualController(tmp_path, small_model(small_config()), Another(), None, None)
    with pytest.raises(UserError, match=r"regularise\.output holds training on text"):
        controller._distillation(phase, None)


def test_a_phase_without_its_own_objective_returns_to_the_graphs_of_the_runs(other):
    """Graphs are kept by objective: a distilled step leaves those of the run's own, and its own go with its phase."""
    drawn = batch(0, [0, 1, 2, 0])
    trainer = small_trainer()
    objective = DistillationObjective(other, 0.7)
    accumulation = trainer.forward_backward
    own = accumulation.compiled_step(True, trainer.objective)
    step_on(trainer, 0, drawn, Regulariser(objective))
    assert accumulation.compiled_step(True, objective) is not own
    assert accumulation.compiled_step(True, trainer.objective) is own
    del objective
    gc.collect()
    assert list(accumulation._steps) == [trainer.objective]
