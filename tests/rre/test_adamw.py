"""AdamW by hand, in the terms of the fused operator, against torch.optim.AdamW."""

import numpy as np
import pytest

from rre.adamw import AdamWHyper, decays


def test_corrected_terms_are_torchs_adamw():
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(0)
    start = draw.standard_normal(50)
    hyper = AdamWHyper(learning_rate=3e-3, beta1=0.9, beta2=0.95, epsilon=1e-3, weight_decay=0.2)
    theirs = torch.nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.AdamW([theirs], lr=3e-3, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.2)
    w, m, v = start.copy(), np.zeros(50), np.zeros(50)
    for step in range(1, 21):
        gradient = draw.standard_normal(50) * 10.0 ** draw.uniform(-4, 1)
        theirs.grad = torch.tensor(gradient)
        optimizer.step()
        # What the operator is documented to do, in float64.
        rate, epsilon, decay = hyper.corrected(step)
        m = 0.9 * m + 0.1 * gradient
        v = 0.95 * v + 0.05 * gradient**2
        w = w - rate * (m / (np.sqrt(v) + epsilon) + decay * w)
        np.testing.assert_allclose(w, theirs.detach().numpy(), rtol=0, atol=1e-12)


def test_a_learning_rate_of_zero_changes_nothing():
    assert AdamWHyper(0.0, 0.9, 0.95, 1e-8, 0.1).corrected(1)[::2] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.0.attention.query.weight", True), ("embedding.word", True), (".down.weight", True), (".word", True),
        ("blocks.1.router.weight", True), ("blocks.0.attention.query.bias", False), ("norm.gamma", False),
        ("blocks.0.norm1.beta", False), (".up.bias", False),
    ],
)  # fmt: skip
def test_biases_and_norms_do_not_decay(name, expected):
    assert decays(name) is expected
