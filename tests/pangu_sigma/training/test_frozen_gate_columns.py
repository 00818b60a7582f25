"""Gate columns of experts that a phase freezes keep every bit, the other columns train."""

import pytest

from tests.pangu_sigma.training.small_trainer import EXPERTS, batch, changed_names, small_trainer, step_on, tensors_now


@pytest.mark.parametrize("router", ["switch", "noisy_top_k"])
def test_the_gate_columns_of_frozen_experts_keep_every_bit(router):
    phases = [{"domains": ["poems"]}]
    sparse = {"router": router, **({"top_k": 2} if router == "noisy_top_k" else {})}
    trainer = small_trainer({"sparse": sparse}, train={"phases": phases})
    before = tensors_now(trainer)
    old = EXPERTS["code"] + EXPERTS["law"]
    for step in range(3):
        step_on(trainer, step, batch(step, [2, 2, 2, 2]))
    after = tensors_now(trainer)
    gates = [name for name in after if ".router." in name]
    assert len(gates) == (3 if router == "switch" else 6)
    for name in gates:
        assert before[name][:, :old].tobytes() == after[name][:, :old].tobytes(), name
    assert (before["blocks.0.router.weight"][:, old:] != after["blocks.0.router.weight"][:, old:]).any()
    moved = changed_names(before, after)
    assert "embedding.word" in moved
    assert not {name for name in moved if name.startswith(("domains.code.", "domains.law."))}
