"""A frozen model beside the training one gives what it would give alone, and never changes."""

import numpy as np
import pytest

from pangu_sigma.data.mixture_sampler import Batch
from pangu_sigma.errors import UserError
from pangu_sigma.evaluation.domain_evaluation import Evaluator
from pangu_sigma.generation.domain_inference import token_log_probabilities
from pangu_sigma.training.continual.teacher import Teacher
from tests.pangu_sigma.training.small_trainer import (
    EXPERTS,
    batch,
    changed_names,
    small_config,
    small_model,
    small_trainer,
    step_on,
)

ROWS = 4


@pytest.fixture(scope="module")
def trainer():
    return small_trainer()


@pytest.fixture(scope="module")
def reference():
    config = small_config()
    return Teacher(small_model(config), config, ROWS)


class OneBatch:
    """A batch as the evaluator reads held-out text."""

    def __init__(self, drawn: Batch, row: int) -> None:
        self.tokens_row, self.sequence_length = drawn.tokens[row], drawn.tokens.shape[1] - 1

    def __len__(self) -> int:
        return 1

    def batch(self, start: int, count: int):
        mask = np.zeros((count, self.sequence_length), np.float32)
        mask[0] = 1.0
        return self.tokens_row[None].repeat(count, 0), mask


def test_its_losses_are_the_evaluations_and_its_logits_agree(trainer, reference):
    drawn = batch(0, [0, 1, 2, 0])
    (planned,) = trainer.plan(drawn)
    losses = reference.token_losses(planned)
    evaluator = Evaluator(reference.model, ROWS)
    for row in range(ROWS):
        alone, _ = evaluator.loss(OneBatch(drawn, row), list(EXPERTS)[drawn.domain[row]])
        assert losses[row].mean(dtype=np.float64) == pytest.approx(alone, rel=1e-6)
    logits = reference.logits(planned).asnumpy()
    np.testing.assert_allclose(-token_log_probabilities(logits, planned.labels), losses, atol=1e-5)


def test_training_beside_it_changes_no_bit_of_it(trainer, reference):
    (planned,) = trainer.plan(batch(1, [0, 1, 2, 2]))
    weights = {p.name: p.asnumpy().copy() for p in reference.model.net.get_parameters()}
    before = reference.token_losses(planned)
    for step in range(2):
        step_on(trainer, step, batch(step, [0, 1, 2, 2]))
    assert reference.token_losses(planned).tobytes() == before.tobytes()
    assert not changed_names(weights, {p.name: p.asnumpy() for p in reference.model.net.get_parameters()})


def test_a_stand_in_reads_the_text_of_a_domain_that_the_reference_lacks(trainer):
    config = small_config()
    names = list(EXPERTS)
    as_law = Teacher(small_model(config), config, ROWS, {"code": "law"})
    tokens = batch(2, [0, 0, 1, 1])
    both = Batch(np.concatenate([tokens.tokens[:2]] * 2), np.array([0, 0, 1, 1], np.int32), tokens.sample, 0)
    (planned,) = trainer.plan(both)
    losses = as_law.token_losses(planned)
    assert names[:2] == ["code", "law"] and losses[:2].tobytes() == losses[2:].tobytes()


def test_a_reference_of_other_domains_or_another_vocabulary_is_refused():
    config = small_config()
    with pytest.raises(UserError, match="the reference model has no domain music: its domains are code, law, poems"):
        Teacher(small_model(config), config, ROWS, {"law": "music"})
    with pytest.raises(UserError, match="has a vocabulary of 48 ids and the run one of 64"):
        Teacher(small_model(config), small_config({"vocab_size": 64}), ROWS)
