"""What may change between a run and its resumption: what the fields say, and how phases and schedules are compared."""

from __future__ import annotations

import pytest

from pangu_sigma.config import changed_keys, check_resume, load_config, with_kept_keys
from pangu_sigma.config.key_descriptions import keys
from pangu_sigma.config.section import INIT_FROM, RESUME
from pangu_sigma.errors import UserError
from pangu_sigma.workers import with_workers

STEP = 4  # steps that the run has done
FREE = (
    "run.log_every=3", "run.tensorboard=false", "run.dir=elsewhere", "train.stop_at=5", "train.skip_budget=3",
    "train.recompute=true", "evaluate.every=2", "evaluate.batches=1", "checkpoint.every=2", "checkpoint.keep=9",
    "checkpoint.probe_sequences=1", "data.prefetch=0", "experts.resident_gib=1",
    "domains.docs.data=[other.jsonl]",
)  # fmt: skip
ROUNDING = ("train.gradient_accumulation_steps=2", "run.kernels=composed", "experts.store=host", "parallel.data=2")
SCHEDULE = ("train.steps=20", "train.steps=8", "schedule.decay_steps=9", "schedule.anneal_steps=2")
REFUSED = (
    "run.seed=1", "model.hidden=256", "model.sparse.layers=1", "optimizer.learning_rate=0.1", "schedule.kind=linear",
    "schedule.warmup_steps=3", "train.batch_size=8", "train.precision=float16", "data.sequence_length=64",
    "domains.docs.experts=8", "domains.docs.weight=9",
    "train.phases=[{shared: frozen}]",
)  # fmt: skip
EXPECTED = {
    **dict.fromkeys(FREE, "free"), **dict.fromkeys(ROUNDING, "rounding"), **dict.fromkeys(SCHEDULE, "schedule"),
}  # fmt: skip


def allowed(*changes) -> list[str]:
    """The keys that a run resumes with, none refused."""
    return [change.key for change in check_resume(*changes, STEP).allowed]


def test_every_key_has_a_decision():
    for key in keys():
        assert key.resume in RESUME and key.init_from in INIT_FROM, key.path


def test_a_key_of_a_section_that_has_a_name_is_named_once(small):
    changes = changed_keys(small(), small("optimizer.learning_rate=0.1"), STEP)
    assert [change.key for change in changes.refused] == ["optimizer.learning_rate"]


def test_the_same_configuration_has_no_changes(small):
    assert changed_keys(small(), small(), STEP) == ((), ())


@pytest.mark.parametrize("override", EXPECTED)
def test_what_may_change_is_as_its_field_says(small, override):
    changes = {change.key: change.resume for change in check_resume(small(), small(override), STEP).allowed}
    assert changes.pop(override.split("=")[0]) == EXPECTED[override]
    # The cache lies in the run's folder, and a mesh is not measured between steps unless a file says so.
    assert changes in ({}, {"data.cache": "free"}, {"evaluate.every": "free"})


@pytest.mark.parametrize("override", REFUSED)
def test_what_would_change_a_step_is_refused_by_name(small, override):
    with pytest.raises(UserError, match=override.split("=")[0]):
        check_resume(small(), small(override), STEP)


def test_a_longer_run_names_no_key_that_nobody_wrote(small):
    assert allowed(small(), small("train.steps=20")) == ["train.steps"]
    own = "schedule.decay_steps=8"
    assert allowed(small(own), small("train.steps=20")) == ["schedule.decay_steps", "train.steps"]


def test_phases_grow_and_change_ahead_of_the_steps_done(small):
    phases = "train.phases=[{steps: 4, domains: [code]}, {}]"
    assert allowed(small(phases), small(phases, "train.steps=20")) == ["train.steps", "train.phases.1.steps"]
    ahead = "train.phases=[{steps: 4, domains: [code]}, {steps: 3, weights: {code: 1}}, {restart: true}]"
    assert "train.phases.2.restart" in allowed(small(phases), small(ahead))
    assert allowed(small(), small("train.phases=[{}]"))  # one phase that trains everything is none
    assert changed_keys(small(phases), small(ahead.replace("code]", "docs]")), STEP).refused[0].key.startswith("train.")


def test_a_phase_that_has_begun_stays_and_may_end_later(small):
    phases = "train.phases=[{steps: 6, domains: [code]}, {}]"
    assert allowed(small(phases), small(phases.replace("6", "7"))) == ["train.phases.0.steps", "train.phases.1.steps"]
    for change in (phases.replace("6", "3"), phases.replace("code", "docs")):
        with pytest.raises(UserError, match=r"train\.phases\.0\."):
            check_resume(small(phases), small(change), STEP)


def test_the_order_of_the_domains_is_part_of_the_run(small, small_file):
    lines = small_file.read_text().splitlines()
    old = small()
    lines[4], lines[5] = lines[5], lines[4]
    small_file.write_text("\n".join(lines))
    assert [change.key for change in changed_keys(old, small(), STEP).refused] == ["domains"]


def test_many_refused_keys_are_shortened(small):
    with pytest.raises(UserError, match="and 2 more"):
        check_resume(small(), small("model.preset=350M", "data.sequence_length=64"), STEP)


EIGHT_LINES = {
    "schema_version": 2, "run": {"dir": "run"}, "model": {"preset": "tiny"}, "train": {"steps": 100},
    "domains": [{"name": "code", "data": ["code.jsonl"]}],
}  # fmt: skip


def test_a_run_keeps_what_nobody_wrote_whatever_that_would_follow_now():
    written = load_config(EIGHT_LINES)
    stored = with_workers(written, 3)
    assert stored.train.batch_size == 18 and written.train.batch_size == 16
    stored = load_config(stored.to_dict(), {"optimizer.learning_rate": 0.0042})  # of another version of the program
    for workers in (1, 2):
        resumed, messages = with_kept_keys(with_workers(written, workers), stored, STEP)
        assert (resumed.train.batch_size, resumed.optimizer.learning_rate) == (18, 0.0042)
        assert not changed_keys(stored, resumed, STEP).refused and resumed.parallel.workers == workers
        assert "train.batch_size = 18" in messages[0] and "optimizer.learning_rate = 0.0042" in messages[0]
    assert with_kept_keys(stored, stored, STEP) == (stored, [])
    with pytest.raises(UserError, match="keeps its values: train.batch_size = 18 .* 4 ranks"):
        with_kept_keys(with_workers(written, 4), stored, STEP)
    # What is written is refused by its name, as ever.
    other = load_config(EIGHT_LINES, {"train.batch_size": 16})
    with pytest.raises(UserError, match="train.batch_size was 18 and is 16"):
        check_resume(stored, with_kept_keys(other, stored, STEP)[0], STEP)
