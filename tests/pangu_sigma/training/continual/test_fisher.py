"""The Fisher information: its labels are the model's own draws, its value the expected squared gradient."""

from dataclasses import replace

import numpy as np
import pytest

from pangu_sigma.model.scoring import Scorer
from pangu_sigma.training.continual.fisher import SharedGradient, draw_labels, estimate_fisher
from tests.pangu_sigma.training.small_trainer import LENGTH, batch, small_config, small_model


def test_labels_are_drawn_by_the_models_probabilities():
    logits = np.log(np.array([[[0.5, 0.25, 0.125, 0.125]]], np.float32)).repeat(20000, 1)
    first = np.zeros(1, int)
    counts = np.bincount(draw_labels(logits, 5, first)[0], minlength=4)
    np.testing.assert_allclose(counts / 20000, [0.5, 0.25, 0.125, 0.125], atol=0.012)
    same, other = draw_labels(logits, 5, first), draw_labels(logits, 6, first)
    assert draw_labels(logits, 5, first).tobytes() == same.tobytes() != other.tobytes()
    # A process that has the second row alone draws what one that has both does.
    two = draw_labels(logits.repeat(2, 0), 5, np.arange(2))
    assert two[1:].tobytes() == draw_labels(logits, 5, first + 1).tobytes() != two[:1].tobytes()


def test_the_fisher_information_is_the_expected_squared_gradient():
    """Against its definition, label by label, for the last norm of a model that sees one sequence again and again."""
    config = small_config({"vocab_size": 12, "init_std": 0.3})
    model = small_model(config)
    sequence = batch(3, [0], range(3, 12)).tokens
    estimate = estimate_fisher(model, (("code", sequence) for _ in range(1500)), seed=1, rows=1)
    name = "query_layer.norm2.gamma"
    assert name in estimate
    exact = exact_fisher(model, sequence, name)
    # 1,500 draws: about 1/sqrt(1500/2) of relative error each.
    np.testing.assert_allclose(estimate[name], exact, rtol=0.25)
    assert estimate[name].sum() == pytest.approx(exact.sum(), rel=0.07)


def exact_fisher(model, sequence: np.ndarray, name: str) -> np.ndarray:
    scorer = Scorer(model, 1)
    graph = SharedGradient(scorer).set_train(False)
    planned = scorer.plan(sequence, [0])
    index = [p.name for p in model.net.trainable_params()].index(name)
    p = np.exp(token_log_probabilities_of_all(scorer.logits(sequence, [0]).asnumpy()[0]))
    total = 0.0
    for t in range(LENGTH):
        weights = np.zeros((1, LENGTH), np.float32)
        weights[0, t] = 1.0
        for label in range(p.shape[1]):
            labels = np.full((1, LENGTH), label, np.int32)
            gradients = graph(*scorer.pack(replace(planned, labels=labels, mask=weights)))
            total = total + p[t, label] * gradients[index].asnumpy().astype(np.float64) ** 2
    return total / LENGTH


def token_log_probabilities_of_all(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))
