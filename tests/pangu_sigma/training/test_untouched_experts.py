"""What does not train keeps every bit: other domains' experts, idle experts, frozen parts; moments and counts too."""

import numpy as np
import pytest

from pangu_sigma.training.schedule import scheduled_step
from tests.pangu_sigma.training.small_trainer import batch, changed_names, small_trainer, step_on, tensors_now
from tests.pangu_sigma.training.training_process import checkpoint

CODE, LAW, POEMS = 0, 1, 2
PHASES = [
    {"steps": 3},
    {"steps": 2, "weights": {"code": 1.0}},
    {"steps": 2, "domains": ["code"]},
    {"steps": 2, "shared": False, "domains": ["law"]},
    {"steps": 1, "domains": []},
    {},
]


def owner(name: str) -> str:
    return name.split(".")[1] if name.startswith("domains.") else "shared"


@pytest.fixture(scope="module")
def warm():
    """A trainer after three steps on everything, so that all parts have moments, which must not drift."""
    trainer = small_trainer(train={"phases": PHASES})
    for step in range(3):
        assert step_on(trainer, step, batch(step, [CODE, LAW, POEMS, CODE])).finite
    return trainer


def owners_of_changes(trainer, steps, domains) -> set[str]:
    before = tensors_now(trainer)
    for step in steps:
        assert step_on(trainer, step, batch(step, domains)).finite
    return {owner(name) for name in changed_names(before, tensors_now(trainer))}


def test_training_on_one_domain_leaves_the_others_as_they_are(warm):
    assert owners_of_changes(warm, (3, 4), [CODE] * 4) == {"shared", "code"}


def test_a_domain_outside_the_phases_domains_keeps_every_bit_though_its_text_is_read(warm):
    assert owners_of_changes(warm, (5, 6), [CODE, LAW, POEMS, LAW]) == {"shared", "code"}


def test_frozen_shared_parameters_and_their_moments_keep_every_bit(warm):
    steps = warm.optimizer.shared_steps
    assert owners_of_changes(warm, (7, 8), [CODE, LAW, POEMS, LAW]) == {"law"}
    assert warm.optimizer.shared_steps == steps
    # A batch without the one domain that trains changes nothing, and is no mistake.
    assert owners_of_changes(warm, (8,), [CODE] * 4) == set()


def test_without_any_domain_only_shared_parameters_train(warm):
    assert owners_of_changes(warm, (9,), [CODE, LAW, POEMS, LAW]) == {"shared"}


def test_after_skipped_steps_a_batch_still_trains_what_its_own_phase_trains(warm):
    before = tensors_now(warm)
    warm.step(
        scheduled_step(warm.config, 4, 7), warm.plan(batch(7, [CODE, LAW, POEMS, LAW]))
    )  # step 4's phase trains code, the batch's trains law
    assert {owner(name) for name in changed_names(before, tensors_now(warm))} == {"law"}


def test_an_expert_whose_tokens_do_not_occur_keeps_every_bit(warm):
    table = warm.model.tables["blocks.0"]["poems"]
    idle = int(table[0])
    before = tensors_now(warm)
    ids = np.flatnonzero(table != idle)
    for step in (10, 11):
        warm.step(scheduled_step(warm.config, step), warm.plan(batch(step, [POEMS, POEMS, CODE, POEMS], ids)))
    after = tensors_now(warm)
    names = [name for name in after if name.startswith("domains.poems.") and "routing" not in name]
    assert len(names) == 3 * 4 + 1
    for name in names:
        for expert in range(3):
            same = before[name][expert].tobytes() == after[name][expert].tobytes()
            assert same == (expert == idle), (name, expert)
    name = "domains.poems.optimizer.steps.blocks.0"
    assert (after[name] - before[name]).tolist() == [0 if expert == idle else 2 for expert in range(3)]


def test_another_domains_embedding_slot_keeps_every_bit():
    trainer = small_trainer({"domain_parameters": {"embedding": "own"}})
    step_on(trainer, 0, batch(0, [CODE, LAW, POEMS, CODE]))
    assert owners_of_changes(trainer, (1, 2), [LAW] * 4) == {"shared", "law"}
    assert trainer.model.store.steps["embedding"].tolist() == [1, 3, 1]


def test_dropped_rows_give_no_gradient():
    trainer = small_trainer({"sparse": {"dispatch": "capacity", "capacity_factor": 0.2}})
    planned = trainer.plan(batch(0, [LAW] * 4))
    # One expert takes ceil(0.2 * 16) = 4 rows of each sample, the other twelve take the residual.
    assert planned[0].plans[0].counts.tolist() == [0, 0, 16, 0, 0, 0] and planned[0].dropped.tolist() == [[0, 48, 0]]
    before = tensors_now(trainer)
    trainer.step(scheduled_step(trainer.config, 0), planned)
    assert {owner(name) for name in changed_names(before, tensors_now(trainer))} == {"shared", "law"}


def test_a_runs_untouched_domain_is_one_file_on_disk(finished_run):
    """The first phase of the run draws code only: the other domains' files are linked, not written again."""
    for domain in ("law", "poems"):
        first, second, later = (checkpoint(finished_run, s) / f"domains/{domain}.safetensors" for s in (2, 4, 12))
        assert first.stat().st_ino == second.stat().st_ino
        assert first.read_bytes() != later.read_bytes()
    code = [(checkpoint(finished_run, s) / "domains/code.safetensors").read_bytes() for s in (2, 4)]
    assert code[0] != code[1]
