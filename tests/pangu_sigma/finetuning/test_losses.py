"""The losses of sft and dpo, and their gradients, are PyTorch's on the same logits."""

import numpy as np
import pytest

from pangu_sigma.data.mixture_sampler import Batch
from pangu_sigma.finetuning.dpo import Preference
from pangu_sigma.model.scoring import Scorer
from pangu_sigma.training.continual.teacher import Teacher
from pangu_sigma.training.objective import BatchLoss, TrainingObjective
from pangu_sigma.training.trainer import Trainer
from tests.pangu_sigma.training.small_trainer import (
    LENGTH,
    batch,
    changed_names,
    small_config,
    small_model,
    step_on,
    tensors_now,
)

torch = pytest.importorskip("torch")
PAIRS, BETA = 3, 0.2
WIDE = {"init_std": 0.3}  # logits far enough from flat
GATED = {**WIDE, "sparse": {"router": "olmoe", "top_k": 2, "aux_loss_weight": 0.5}}


def masked(domains) -> Batch:
    """Random text whose labels count from a random position to another one; the rest of a row is padding."""
    drawn = batch(3, domains)
    draw = np.random.default_rng(4)
    mask, padding = np.zeros((len(domains), LENGTH), np.float32), np.zeros((len(domains), LENGTH), bool)
    for row in range(len(domains)):
        first, last = sorted(draw.choice(np.arange(1, LENGTH - 1), 2, replace=False))
        mask[row, first : last + 1] = 1.0
        padding[row, last + 1 :] = True
    return Batch(drawn.tokens, drawn.domain, drawn.sample, 0, mask, padding)


def trainer_of(objective: TrainingObjective, rows: int, model=WIDE, accumulation=1) -> Trainer:
    size = rows // objective.rows_per_sample
    train = {"batch_size": size, "gradient_accumulation_steps": accumulation}
    return Trainer(small_model(small_config(model, optimizer={"max_grad_norm": 1e9}, train=train)), objective)


def token_losses(logits, drawn: Batch):
    """-log p of every label by PyTorch, float64 [B, S]."""
    rows = torch.log_softmax(logits.double(), -1)
    return -rows.gather(-1, torch.tensor(drawn.tokens[:, 1:]).long()[..., None])[..., 0]


def logits_of(model, drawn: Batch):
    scorer = Scorer(model, len(drawn.tokens), domains=3)
    return torch.tensor(scorer.logits(drawn.tokens, drawn.domain).asnumpy())


def gradients(trainer: Trainer, drawn: Batch) -> tuple[float, dict[str, np.ndarray]]:
    """Loss of one step, and its gradients as first moments, which are proportional to them."""
    result = step_on(trainer, 0, drawn)
    moments = {name: tensor for name, tensor in tensors_now(trainer).items() if "optimizer.m." in name}
    return result.loss, moments


class Weighted(TrainingObjective):
    """The sum of token losses times given weights: the gradient of any loss whose derivatives they are."""

    def __init__(self, weights: np.ndarray) -> None:
        super().__init__(auxiliary=False)
        self.given = weights.astype(np.float32)

    def inputs(self, batch, prepared, scale, total, micro_batches):
        from mindspore import Tensor

        return Tensor(self.given), self.auxiliary_weight(scale, micro_batches)

    def measure(self, batch, prepared, by_sample):
        return BatchLoss(by_sample, self.units(batch))


def assert_same_gradients(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys() and any(np.abs(gradient).max() > 1e-4 for gradient in one.values())
    for name, gradient in one.items():
        np.testing.assert_allclose(gradient, other[name], rtol=2e-3, atol=2e-7, err_msg=name)


def test_sft_is_pytorchs_cross_entropy_of_the_answers_alone():
    drawn = masked([0, 1, 2, 0])
    trainer = trainer_of(TrainingObjective(auxiliary=False), 4)
    logits = logits_of(trainer.model, drawn)
    labels = torch.tensor(np.where(drawn.mask > 0, drawn.tokens[:, 1:], -100)).long()
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]).double(), labels.reshape(-1))
    loss, _ = gradients(trainer, drawn)
    assert loss == pytest.approx(float(expected), rel=1e-5)


@pytest.fixture(scope="module")
def dpo():
    """(loss, gradients, figures) of a dpo step, and by PyTorch its loss, its derivatives by token loss, its rewards."""
    drawn = masked([0, 0, 1, 1, 2, 2])
    config = small_config(WIDE, run={"seed": 77})
    frozen = small_model(config)
    objective = Preference(BETA, lambda: Teacher(frozen, config, 2 * PAIRS))
    trainer = trainer_of(objective, 2 * PAIRS)
    mask = torch.tensor(drawn.mask).double()
    theirs = (token_losses(logits_of(frozen, drawn), drawn) * mask).sum(1)
    losses = token_losses(logits_of(trainer.model, drawn), drawn).requires_grad_()
    reward = BETA * (theirs - (losses * mask).sum(1)).reshape(-1, 2)
    expected = -torch.nn.functional.logsigmoid(reward[:, 0] - reward[:, 1]).mean()
    expected.backward()
    loss, moments = gradients(trainer, drawn)
    record, reward = trainer.take_record(), reward.detach().numpy()
    return drawn, loss, moments, record, float(expected.detach()), losses.grad.numpy(), reward


def test_dpo_is_pytorchs_loss_of_the_same_logits(dpo):
    _, loss, _, record, expected, _, _ = dpo
    assert loss == pytest.approx(expected, rel=1e-5) and record["loss"] == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(np.log(2), abs=0.01)  # the reference is another model


def test_dpos_gradients_are_those_of_pytorchs_derivatives(dpo):
    drawn, _, moments, _, _, derivatives, _ = dpo
    _, expected = gradients(trainer_of(Weighted(derivatives), 2 * PAIRS), drawn)
    assert_same_gradients(moments, expected)


def test_dpo_tells_rewards_margins_and_accuracy(dpo):
    *_, record, _, _, reward = dpo
    margin = reward[:, 0] - reward[:, 1]
    assert record["figures"]["preference_accuracy"] == pytest.approx(np.mean(margin > 0))
    assert record["figures"]["preference_margin"] == pytest.approx(margin.mean(), rel=1e-4)
    assert record["figures"]["chosen_reward"] == pytest.approx(reward[:, 0].mean(), rel=1e-4)
    assert record["figures"]["rejected_reward"] == pytest.approx(reward[:, 1].mean(), rel=1e-4)


def test_accumulation_gives_dpo_the_gradients_of_the_whole_batch():
    drawn = masked([0, 0, 2, 2])

    def step(accumulation):
        config = small_config(WIDE, run={"seed": 77})
        frozen = small_model(config)
        objective = Preference(BETA, lambda: Teacher(frozen, config, 4 // accumulation))
        return gradients(trainer_of(objective, 4, accumulation=accumulation), drawn)

    (whole, own), (parts, others) = step(1), step(2)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert_same_gradients(own, others)


def test_at_its_beginning_dpos_loss_is_log_2():
    drawn = masked([0, 0, 1, 1])
    config = small_config(WIDE)
    frozen = small_model(config)
    trainer = trainer_of(Preference(BETA, lambda: Teacher(frozen, config, 4)), 4)
    assert step_on(trainer, 0, drawn).loss == pytest.approx(np.log(2), abs=1e-4)


def test_auxiliary_losses_are_off_unless_asked_for():
    drawn = masked([0, 1, 2, 0])
    without = {**GATED, "sparse": {**GATED["sparse"], "aux_loss_weight": 0.0, "z_loss_weight": 0.0}}
    tensors = {}
    for name, auxiliary, model in (("off", False, GATED), ("zero", True, without), ("on", True, GATED)):
        _, tensors[name] = gradients(trainer_of(TrainingObjective(auxiliary), 4, model), drawn)
    assert not changed_names(tensors["off"], tensors["zero"])
    assert "optimizer.m.blocks.0.router.weight" in changed_names(tensors["off"], tensors["on"])
