"""The head of a competitive mixture against NumPy: losses, mixed log probabilities, divergence, and their gradients."""

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from pangu_sigma.config.model_section import ModelConfig
from pangu_sigma.model.layers.heads import TiedHead
from pangu_sigma.model.layers.mixture_head import MixtureHead
from parallel.operator_layout import Layout
from tests.oracles.routers_numpy import competitive_loss, softmax

BATCH, LENGTH, EXPERTS, HIDDEN, VOCAB, DOMAINS = 2, 3, 4, 6, 11, 2
TOKENS = BATCH * LENGTH
CONFIG = {"layers": 2, "hidden": HIDDEN, "heads": 2, "ffn": 8, "positions": LENGTH}


class Sums(nn.Cell):
    """The losses' and divergences' weighted sum, and both beside it."""

    def __init__(self, head: nn.Cell) -> None:
        super().__init__()
        self.head = head

    def construct(self, rows, scores, table, labels, domain, previous, slopes):
        h = (rows, ops.LogSoftmax(-1)(scores))
        losses = self.head(h, labels, domain, table)
        losses_against, divergence = self.head.against(h, labels, domain, table, previous)
        return (losses * slopes).sum() + (divergence * slopes).sum(), losses, losses_against, divergence


def oracle(values: dict, labels: np.ndarray, domain: np.ndarray, previous: np.ndarray):
    """(losses, divergences [T], log probabilities [T, V]); `table` [V, D], or [domains, V, D]."""
    rows, shares = values["rows"].reshape(EXPERTS, TOKENS, HIDDEN), softmax(values["scores"])
    tables = values["table"][np.repeat(domain, LENGTH)] if values["table"].ndim == 3 else [values["table"]] * TOKENS
    own = softmax(np.stack([rows[:, t] @ tables[t].T for t in range(TOKENS)]))  # [T, E, V]
    mixed = np.log((shares[:, :, None] * own).sum(1))
    losses = competitive_loss(shares, -np.log(own[np.arange(TOKENS), :, labels.reshape(-1)]))
    q = softmax(previous.reshape(TOKENS, VOCAB))
    return losses, (q * (np.log(q) - mixed)).sum(1), mixed


@pytest.mark.parametrize("slots", ["shared", "own"])
def test_a_mixture_of_likelihoods_its_divergence_and_every_gradient(slots):
    draw = np.random.default_rng(0)
    shapes = {"rows": (EXPERTS * TOKENS, HIDDEN), "scores": (TOKENS, EXPERTS), "table": (VOCAB, HIDDEN)}
    if slots == "own":
        shapes["table"] = (DOMAINS, *shapes["table"])
    values = {name: draw.standard_normal(shape) for name, shape in shapes.items()}
    labels, domain = draw.integers(0, VOCAB, (BATCH, LENGTH)), np.array([1, 0])
    previous, slopes = draw.standard_normal((BATCH, LENGTH, VOCAB)), draw.standard_normal((BATCH, LENGTH))
    config = ModelConfig(**CONFIG, domain_parameters={"embedding": slots})
    head = MixtureHead(TiedHead(config, VOCAB, Layout()), EXPERTS, Layout())
    step = ops.value_and_grad(Sums(head), (0, 1, 2), has_aux=True)
    inputs = [Tensor(values[name].astype(np.float32)) for name in shapes]
    given = [Tensor(a.astype(t)) for a, t in
             ((labels, np.int32), (domain, np.int32), (previous, np.float32), (slopes, np.float32))]  # fmt: skip
    (_, losses, losses_against, divergence), gradients = step(*inputs, *given)
    expected = oracle(values, labels, domain, previous)
    for token_losses in (losses, losses_against):
        np.testing.assert_allclose(token_losses.asnumpy().reshape(-1), expected[0], rtol=1e-5)
    np.testing.assert_allclose(divergence.asnumpy().reshape(-1), expected[1], rtol=1e-4, atol=1e-6)

    def objective(moved: dict) -> float:
        losses, divergence, _ = oracle(moved, labels, domain, previous)
        return float(((losses + divergence) * slopes.reshape(-1)).sum())

    for name, gradient in zip(shapes, gradients, strict=True):
        for entry in list(np.ndindex(values[name].shape))[::7]:
            ends = []
            for move in (1e-6, -1e-6):
                changed = values[name].copy()
                changed[entry] += move
                ends.append(objective({**values, name: changed}))
            np.testing.assert_allclose(gradient.asnumpy()[entry], (ends[0] - ends[1]) / 2e-6, rtol=1e-3, atol=1e-5)


class LogProbabilities(nn.Cell):
    def __init__(self, head: nn.Cell, table: np.ndarray) -> None:
        super().__init__()
        self.head, self.table = head, Parameter(Tensor(table), name="word")

    def construct(self, rows, shares, domain):
        return self.head.logits((rows, shares), BATCH, domain, self.table)


def test_its_logits_are_log_probabilities_of_the_mixture_even_where_a_share_is_nothing():
    draw = np.random.default_rng(1)
    rows = draw.standard_normal((EXPERTS * TOKENS, HIDDEN)).astype(np.float32)
    scores = draw.standard_normal((TOKENS, EXPERTS)).astype(np.float32)
    scores[0] = [200.0, 0.0, 0.0, -200.0]  # softmax of the last is 0 in float32
    table = draw.standard_normal((VOCAB, HIDDEN)).astype(np.float32)
    head = MixtureHead(TiedHead(ModelConfig(**CONFIG), VOCAB, Layout()), EXPERTS, Layout())
    shares = ops.LogSoftmax(-1)(Tensor(scores))
    log_p = LogProbabilities(head, table)(Tensor(rows), shares, Tensor([0, 0])).asnumpy().reshape(TOKENS, VOCAB)
    given = {"rows": rows.astype(np.float64), "scores": scores.astype(np.float64), "table": table.astype(np.float64)}
    nothing = np.zeros((BATCH, LENGTH), int), np.zeros(2, int), np.zeros((BATCH, LENGTH, VOCAB))
    np.testing.assert_allclose(log_p, oracle(given, *nothing)[2], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.exp(log_p).sum(1), 1.0, rtol=1e-5)
