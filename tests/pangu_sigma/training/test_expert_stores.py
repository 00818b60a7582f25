"""Training gives the same model whichever store holds the experts, for any pattern of activation."""

import numpy as np
import pytest

from pangu_sigma.config import config_from_dict
from pangu_sigma.errors import UserError
from tests.pangu_sigma.training.small_trainer import batch, small_config, small_trainer, step_on, tensors_now

# The three domains have 2, 1 and 3 experts; micro-batches of a step activate different ones.
STEPS = [[0, 0, 1, 1], [2, 2, 0, 1], [1, 1, 1, 1], [0, 2, 2, 2], [2, 2, 0, 0], [0, 1, 0, 2]]


def trained(store: str, tmp_path, train: dict | None = None, **sections) -> dict[str, np.ndarray]:
    trainer = small_trainer(
        train={"gradient_accumulation_steps": 2, **(train or {})}, run={"dir": str(tmp_path / store)},
        experts={"store": store, "resident_gib": 0.001}, data={"max_domains_per_batch": 3}, **sections,
    )  # fmt: skip
    # Few ids of the vocabulary, so that some experts of an active domain get no token.
    for step, domains in enumerate(STEPS):
        assert step_on(trainer, step, batch(step, domains, range(3, 9))).finite
    tensors = tensors_now(trainer)
    trainer.model.store.close()
    return tensors


VARIANTS = {
    "plain": (dict(), 1e-5, 1e-7),
    "clipped, with embedding slots and an epsilon of the experts' own": (
        dict(
            model={"domain_parameters": {"embedding": "own"}},
            optimizer={"max_grad_norm": 0.05, "expert_epsilon": 1e-3},
        ),
        1e-5,
        1e-7,
    ),
    # Products in float16 from float32 masters: slots of other sizes round differently there.
    "float16": (dict(train={"precision": "float16", "loss_scale": {"initial": 8.0}}), 1e-2, 2e-2),
}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.slow if name == "float16" else ()) for name in VARIANTS]
)
def test_host_device_and_disk_give_the_same_weights_moments_and_counts(variant, tmp_path):
    sections, rtol, atol = VARIANTS[variant]
    by_store = {store: trained(store, tmp_path, **sections) for store in ("device", "host", "disk")}
    for other in ("host", "disk"):
        assert by_store[other].keys() == by_store["device"].keys()
        for name, tensor in by_store["device"].items():
            assert by_store[other][name].dtype == tensor.dtype and tensor.dtype != np.float16
            np.testing.assert_allclose(by_store[other][name], tensor, rtol=rtol, atol=atol, err_msg=name)
    # The two that take the activated experts only compute in the same graph: they agree to the bit.
    assert all(np.array_equal(by_store["host"][name], tensor) for name, tensor in by_store["disk"].items())
    counts = by_store["host"]["domains.law.optimizer.steps.blocks.0"]
    assert counts.tolist() == [sum(1 in domains for domains in STEPS)]


def test_a_host_stores_graph_has_as_many_slots_as_a_micro_batch_can_activate(tmp_path):
    slots = {}
    for limit, store in ((1, "host"), (2, "host"), (None, "host"), (1, "device")):
        trainer = small_trainer(experts={"store": store}, data={"max_domains_per_batch": limit})
        slots[limit, store] = trainer.inputs.layers[0].slots
    assert slots == {(1, "host"): 3, (2, "host"): 5, (None, "host"): 6, (1, "device"): 6}


def test_a_step_that_activates_more_than_may_be_resident_says_what_to_change(tmp_path):
    trainer = small_trainer(experts={"store": "disk", "resident_gib": 1e-5}, run={"dir": str(tmp_path)})
    with pytest.raises(UserError, match=r"step 1: .*experts\.resident_gib.*data\.max_domains_per_batch"):
        step_on(trainer, 0, batch(0, [0, 1, 2, 0]))
    trainer.model.store.close()


def test_a_learned_gate_keeps_its_experts_on_the_device():
    values = small_config().to_dict()
    values["model"]["sparse"]["router"] = "switch"
    values["experts"]["store"] = "host"
    with pytest.raises(UserError, match=r"experts\.store = host.*set experts\.store to device"):
        config_from_dict(values)
