"""What belongs to training alone acts in training, also after an evaluation of the same network, and only there."""

import numpy as np

from pangu_sigma.evaluation.domain_evaluation import Evaluator
from pangu_sigma.training.schedule import scheduled_step
from tests.pangu_sigma.training.small_trainer import LENGTH, batch, small_trainer, step_on


class OneSequence:
    """Held-out text of one batch, as `HeldoutSequences` gives it."""

    tokens = 4 * LENGTH
    sequence_length = LENGTH

    def __len__(self) -> int:
        return 4

    def batch(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        return batch(5, [0] * count).tokens, np.ones((count, LENGTH), np.float32)


def first_losses(model: dict) -> list[float]:
    """Losses of a batch of domain 0: of an evaluation, of a training step, of an evaluation that stands between two
    steps with learning rate 0, of the second step."""
    trainer = small_trainer(model, optimizer={"learning_rate": 1e-30, "weight_decay": 0.0})
    evaluator = Evaluator(trainer.model, 4)
    planned = trainer.plan(batch(5, [0, 0, 0, 0]))
    return [
        evaluator.loss(OneSequence(), "code")[0],
        trainer.step(scheduled_step(trainer.config, 0), planned).loss,
        evaluator.loss(OneSequence(), "code")[0],
        trainer.step(scheduled_step(trainer.config, 1), planned).loss,
    ]


def test_dropout_acts_in_training_and_never_in_evaluation():
    plain = first_losses({"init_std": 0.3})
    dropped = first_losses({"init_std": 0.3, "dropout": 0.5})
    np.testing.assert_allclose(plain, plain[0], rtol=1e-5)
    np.testing.assert_allclose(dropped[0::2], plain[0], rtol=1e-5)
    assert abs(dropped[1] - plain[0]) > 1e-2
    assert dropped[3] == dropped[1]


def test_attention_dropout_acts_in_training_alone():
    plain = first_losses({"init_std": 0.3})
    dropped = first_losses({"init_std": 0.3, "attention": {"dropout": 0.5}})
    np.testing.assert_allclose(dropped[0::2], plain[0], rtol=1e-5)
    assert abs(dropped[1] - plain[0]) > 1e-3


def test_a_learned_gate_drops_what_overflows_and_the_share_is_a_metric():
    sparse = {"router": "switch", "dispatch": "capacity", "capacity_factor": 0.5}
    trainer = small_trainer({"sparse": sparse})
    step_on(trainer, 0, batch(5, [0, 1, 2, 0]))
    figures = trainer.take_record()
    kept = sum(sum(rows) for rows in figures["expert_load"]["blocks.0"].values())
    shares = figures["dropped_share"]["blocks.0"]
    lost = sum(shares[name] * figures["tokens"][name] for name in shares)
    # 6 experts take ceil(0.5 * 16 / 6) = 2 rows of a sample each: at most 12 of 16 find a place.
    assert 0.25 <= lost / (4 * LENGTH) < 1.0
    assert kept + lost == 4 * LENGTH
