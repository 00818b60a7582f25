"""What may change between a run and its resumption."""

from __future__ import annotations

import pytest

from pangu_sigma.config import changed_keys, check_resume
from pangu_sigma.errors import UserError

ALLOWED = {
    "run.log_every=3",
    "run.tensorboard=false",
    "run.dir=elsewhere",
    "train.stop_at=5",
    "train.skip_budget=3",
    "evaluate.every=2",
    "evaluate.batches=1",
    "checkpoint.every=2",
    "checkpoint.keep=9",
    "data.prefetch=0",
}
REFUSED = {
    "run.seed=1",
    "model.hidden=256",
    "model.sparse.layers=1",
    "optimizer.learning_rate=0.1",
    "schedule.warmup_steps=3",
    "train.batch_size=8",
    "train.precision=float16",
    "data.sequence_length=64",
    "domains.docs.experts=8",
    "domains.docs.data=[other.jsonl]",
    "domains.docs.weight=9",
    "train.steps=20",
    "train.phases=[{}]",
}


def test_the_same_configuration_has_no_changes(small):
    assert changed_keys(small(), small()) == ((), ())


@pytest.mark.parametrize("override", sorted(ALLOWED))
def test_what_leaves_every_step_as_it_was_may_change(small, override):
    changes = check_resume(small(), small(override))
    assert override.split("=")[0] in changes.allowed and not changes.refused


@pytest.mark.parametrize("override", sorted(REFUSED))
def test_what_would_change_a_step_is_refused_by_name(small, override):
    with pytest.raises(UserError) as error:
        check_resume(small(), small(override))
    key = override.split("=")[0]
    assert ("schedule.decay_steps was 10 and is 20" if key == "train.steps" else key) in str(error.value)


def test_a_run_may_be_longer_if_its_schedule_stays(small):
    old, new = small("schedule.decay_steps=10"), small("schedule.decay_steps=10", "train.steps=20")
    assert check_resume(old, new).allowed == ("train.steps",)
    constant = "schedule.kind=constant"
    assert not changed_keys(small(constant), small(constant, "train.steps=20")).refused


def test_a_run_that_anneals_cannot_grow(small):
    constant = ["schedule.kind=constant", "schedule.anneal_steps=2"]
    assert "train.steps" in changed_keys(small(*constant), small(*constant, "train.steps=20")).refused


def test_the_last_phase_may_grow_with_the_run(small):
    phases = "train.phases=[{steps: 4, domains: [code]}, {}]"
    fixed = "schedule.decay_steps=10"
    assert changed_keys(small(phases, fixed), small(phases, fixed, "train.steps=20")) == (
        ("train.steps", "train.phases.1.steps"),
        (),
    )
    earlier = phases.replace("4", "5")
    assert changed_keys(small(phases), small(earlier)).refused == ("train.phases.0.steps",)


def test_the_order_of_the_domains_is_part_of_the_run(small, small_file):
    lines = small_file.read_text().splitlines()
    old = small()
    lines[4], lines[5] = lines[5], lines[4]
    small_file.write_text("\n".join(lines))
    assert changed_keys(old, small()).refused == ("domains",)


def test_many_refused_keys_are_shortened(small):
    with pytest.raises(UserError, match="and 2 more"):
        check_resume(small(), small("model.preset=350M", "data.sequence_length=64"))


def test_a_phase_with_a_decay_of_its_own_keeps_its_end(small):
    phases = "train.phases=[{steps: 4}, {restart: true}]"
    changes = changed_keys(small(phases), small(phases, "train.steps=20"))
    assert "train.phases.1.steps" in changes.refused
    constant = (phases, "schedule.kind=constant")
    assert "train.phases.1.steps" in changed_keys(small(*constant), small(*constant, "train.steps=20")).allowed
