"""AdamW by hand, in the terms of the fused operator, against torch.optim.AdamW."""

import numpy as np
import pytest

from rre.adamw import BLOCK, AdamWHyperparameters, has_weight_decay, square_sum, update_in_place


def test_corrected_terms_are_torchs_adamw():
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(0)
    start = draw.standard_normal(50)
    hyper = AdamWHyperparameters(learning_rate=3e-3, beta1=0.9, beta2=0.95, epsilon=1e-3, weight_decay=0.2)
    theirs = torch.nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.AdamW([theirs], lr=3e-3, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.2)
    w, m, v = start.copy(), np.zeros(50), np.zeros(50)
    for step in range(1, 21):
        gradient = draw.standard_normal(50) * 10.0 ** draw.uniform(-4, 1)
        theirs.grad = torch.tensor(gradient)
        optimizer.step()
        # What the operator is documented to do, in float64.
        rate, epsilon, decay = hyper.correct_bias(step)
        m = 0.9 * m + 0.1 * gradient
        v = 0.95 * v + 0.05 * gradient**2
        w = w - rate * (m / (np.sqrt(v) + epsilon) + decay * w)
        np.testing.assert_allclose(w, theirs.detach().numpy(), rtol=0, atol=1e-12)


def test_a_learning_rate_of_zero_changes_nothing():
    assert AdamWHyperparameters(0.0, 0.9, 0.95, 1e-8, 0.1).correct_bias(1)[::2] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.0.attention.query.weight", True), ("embedding.word", True), (".down.weight", True), (".word", True),
        ("blocks.1.router.weight", True), ("blocks.0.attention.query.bias", False), ("norm.gamma", False),
        ("blocks.0.norm1.beta", False), (".up.bias", False),
    ],
)  # fmt: skip
def test_biases_and_norms_do_not_decay(name, expected):
    assert has_weight_decay(name) is expected


@pytest.mark.parametrize("decayed", [True, False])
def test_the_update_on_the_host_is_the_formula_also_across_blocks(decayed):
    draw = np.random.default_rng(2)
    hyper = AdamWHyperparameters(learning_rate=3e-3, beta1=0.9, beta2=0.95, epsilon=1e-3, weight_decay=0.2)
    w, m, gradient = (draw.standard_normal(BLOCK + 7).astype(np.float32) for _ in range(3))
    v = m * m
    rate, epsilon, decay = hyper.correct_bias(5)
    wanted_m = 0.9 * m.astype(np.float64) + 0.1 * 0.5 * gradient
    wanted_v = 0.95 * v.astype(np.float64) + 0.05 * (0.5 * gradient) ** 2
    wanted_w = w - rate * (wanted_m / (np.sqrt(wanted_v) + epsilon) + (decay * w if decayed else 0.0))
    update_in_place(w, m, v, gradient, hyper, step=5, scale=0.5, decayed=decayed)
    for updated, expected in ((w, wanted_w), (m, wanted_m), (v, wanted_v)):
        np.testing.assert_allclose(updated, expected, rtol=1e-6, atol=1e-7)


def test_a_square_sum_covers_every_block_and_tells_what_is_not_finite():
    values = np.random.default_rng(3).standard_normal((129, 257)).astype(np.float32)
    assert square_sum(values) == pytest.approx((values.astype(np.float64) ** 2).sum(), rel=1e-6)
    values[128, 256] = np.inf
    assert square_sum(values) == np.inf
