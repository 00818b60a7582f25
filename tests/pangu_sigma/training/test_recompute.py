"""Recomputed activations change memory and time, not one number."""

from tests.pangu_sigma.training.small_trainer import batch, changed_names, small_trainer, step_on, tensors_now


def train(recompute: bool):
    model = {"dropout": 0.1, "attention": {"dropout": 0.1}}
    trainer = small_trainer(model, train={"recompute": recompute})
    results = [step_on(trainer, step, batch(step, [0, 1, 2, 0])) for step in range(3)]
    return results, tensors_now(trainer)


def test_recomputation_gives_the_same_losses_and_bits():
    (plain, before), (recomputed, after) = train(False), train(True)
    assert recomputed == plain
    assert not changed_names(before, after)
