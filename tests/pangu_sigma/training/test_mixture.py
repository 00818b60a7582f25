"""An adaptive mixture learns under both of its losses, is measured as it is trained, and writes what it learned."""

import numpy as np
import pytest

from pangu_sigma.model.scoring import Scorer
from tests.oracles.recomputing_decoder import RecomputingDecoder
from tests.pangu_sigma.training.small_trainer import LENGTH, VOCAB, batch, small_trainer, step_on

STEPS = 30


def text(step: int):
    """Rows that count on from a random token: learnable, of two kinds (upwards and downwards)."""
    drawn = batch(step, [0, 1, 2, 0])
    way = np.array([[1], [-1], [1], [-1]])
    drawn.tokens[...] = 3 + (drawn.tokens[:, :1] + way * np.arange(LENGTH + 1)) % (VOCAB - 3)
    return drawn


@pytest.mark.parametrize("loss", ["competitive", "cooperative"])
def test_training_lowers_the_loss_that_evaluation_measures_and_generation_uses(loss):
    trainer = small_trainer({"top_layer": "mixture", "mixture_loss": loss, "sparse": {"layers": 0}})
    losses = [step_on(trainer, step, text(step)).loss for step in range(STEPS)]
    assert losses[0] == pytest.approx(np.log(VOCAB), rel=0.05) and np.mean(losses[-3:]) < 0.75 * losses[0]
    figures = trainer.take_record()
    (load,) = figures["expert_load"].values()
    assert [rows for by in load.values() for rows in by] == [STEPS * 4 * LENGTH] * 6
    assert figures["auxiliary_loss"] == 0.0

    unseen = text(STEPS)
    scorer = Scorer(trainer.model, 4, domains=3)
    measured = scorer.losses(unseen.tokens, unseen.domain)
    ids = unseen.tokens[0]
    logits = RecomputingDecoder(trainer.model, 1).score(ids[:-1].tolist(), 0)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(-log_p[np.arange(LENGTH), ids[1:]], measured[0], rtol=1e-4, atol=1e-5)
    if loss == "competitive":
        np.testing.assert_allclose(logits, log_p, atol=1e-5)  # they are the mixture's log probabilities already
    assert step_on(trainer, STEPS, unseen).loss == pytest.approx(measured.mean(), rel=1e-5)
