"""Auxiliary losses of gates reach the objective exactly once: as computed by the reference in tests/pangu_sigma/model
(without recomputation and accumulation), and here the same with them."""

import numpy as np
import pytest

from pangu_sigma.data.sampler import Batch
from tests.pangu_sigma.train.small import batch, changed_names, small_trainer, tensors_now

GATES = {
    "olmoe": {"router": "olmoe", "top_k": 2, "aux_loss_weight": 0.5, "z_loss_weight": 0.1, "shared_expert": True},
    "noisy_top_k": {"router": "noisy_top_k", "top_k": 2, "importance_loss_weight": 0.5, "load_loss_weight": 0.5},
    "gshard": {"router": "gshard", "aux_loss_weight": 0.5, "dispatch": "capacity", "capacity_factor": 0.8},
}
LINEAR = {"clip_norm": 1e9}


def one_step(sparse: dict, drawn: Batch, **train):
    """Gradients by name (as first moments, which are proportional) and the auxiliary loss of one step."""
    trainer = small_trainer({"init_std": 0.3, "sparse": sparse}, optimizer=LINEAR, train=train)
    trainer.step(0, trainer.plan(drawn))
    found = {n: t.copy() for n, t in trainer.optimizer.moments().items() if n.startswith("optimizer.m.")}
    return found, trainer.accounting.take()["auxiliary_loss"]


def twice(drawn: Batch) -> Batch:
    """Two micro-batches of the same text."""
    tokens, domain = np.concatenate([drawn.tokens] * 2), np.concatenate([drawn.domain] * 2)
    return Batch(tokens, domain, np.arange(domain.size), drawn.step)


@pytest.mark.parametrize("gate", GATES)
def test_recomputation_changes_no_bit_of_a_gated_model(gate):
    results = []
    for recompute in (False, True):
        trainer = small_trainer({"sparse": GATES[gate]}, train={"recompute": recompute})
        steps = [trainer.step(step, trainer.plan(batch(step, [0, 1, 2, 0]))) for step in range(2)]
        results.append((steps, tensors_now(trainer)))
    assert results[0][0] == results[1][0]
    assert not changed_names(results[0][1], results[1][1])


def test_accumulation_gives_the_gradients_and_the_loss_of_the_whole_batch():
    drawn = twice(batch(0, [0, 1]))
    whole, loss = one_step(GATES["olmoe"], drawn)
    in_parts, loss_in_parts = one_step(GATES["olmoe"], drawn, accumulation=2)
    assert loss > 0.5
    np.testing.assert_allclose(loss_in_parts, loss, rtol=1e-5)
    for name, gradient in whole.items():
        np.testing.assert_allclose(in_parts[name], gradient, rtol=1e-3, atol=1e-6, err_msg=name)
    without, _ = one_step(GATES["olmoe"] | {"aux_loss_weight": 0.0, "z_loss_weight": 0.0}, drawn)
    gate = "optimizer.m.blocks.0.router.weight"
    assert np.abs(whole[gate] - without[gate]).max() > 100 * np.abs(whole[gate] - in_parts[gate]).max()
