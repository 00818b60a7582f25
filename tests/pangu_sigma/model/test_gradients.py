"""The gradients that a training step gets, against finite differences of the float64 reference."""

import numpy as np
import pytest

from tests.pangu_sigma.model.conftest import CASES

STEP = 1e-5
ENTRIES = 3


def difference(model, batch, name, direction, noise) -> float:
    """Central difference of the reference's objective along `direction` (shape of the tensor)."""
    changed = {n: np.asarray(a, np.float64) for n, a in model.tensors.items()}
    values = []
    for sign in (1, -1):
        changed[name] = model.tensors[name].astype(np.float64) + sign * STEP * direction
        values.append(model.oracle_objective(batch, changed, noise, 0.7))
    return (values[0] - values[1]) / (2 * STEP)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_gets_the_gradient_of_the_reference(driven, noise, case):
    """Along one random direction, which weighs every entry, and for the largest and some random entries."""
    model, batch = driven(case)
    noise = noise if "switch_capacity" in case else None
    gradients = model.train(batch, scale=0.7, noise=noise)[4]
    assert set(gradients) == {n for n in model.tensors if not n.endswith(".routing")}
    draw = np.random.default_rng(9)
    # The gradient of a key's bias is zero in truth, as softmax ignores what all scores have in common.
    floor = 1e-6 * max(np.linalg.norm(g) for g in gradients.values())
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all(), name
        size = np.linalg.norm(gradient)
        direction = draw.standard_normal(gradient.shape)
        slope = float((gradient * direction).sum())
        expected = difference(model, batch, name, direction, noise)
        assert abs(slope - expected) <= 2e-5 * size + floor, (name, slope, expected, size)
        if "chunks" in case:
            continue
        entries = [int(np.abs(gradient).argmax()), *draw.integers(0, gradient.size, ENTRIES)]
        for entry in entries:
            one = np.zeros(gradient.shape)
            one.reshape(-1)[entry] = 1.0
            expected = difference(model, batch, name, one, noise)
            assert abs(gradient.reshape(-1)[entry] - expected) <= 1e-5 * size + floor, (name, entry, expected, size)
