"""A loss that is really not finite: raise, skip with a budget, roll back."""

import json

import numpy as np
import pytest

from pangu_sigma.checkpoint import open_checkpoint
from pangu_sigma.config import load_config
from pangu_sigma.monitor.metrics_log import read_metrics
from pangu_sigma.training.checkpointing import RunProgress
from pangu_sigma.training.job import open_run
from pangu_sigma.training.nonfinite import TrainingError
from rre.store import ExpertStore
from tests.pangu_sigma.training.training_process import assert_refused, checkpoint, command

POEMS = slice(3, 5)  # its experts among those of code, law and poems


def resume_poisoned(small_yaml, folder, *changes: str) -> tuple[RunProgress, ExpertStore]:
    """Resume the run with weights for poems that overflow float32; a step draws two of the three domains."""
    config = load_config(small_yaml, [f"run.dir={folder}", "evaluate.every=0", "run.tensorboard=false", *changes])
    with open_run(config, resume=True) as run:
        run.model.store.table("blocks.0", "up.weight")[POEMS] = 1e38
        return run.train(), run.model.store


def events(run) -> list[str]:
    return [record["message"] for record in read_metrics(run) if record["kind"] == "event"]


def state(run, step: int) -> dict:
    return json.loads((checkpoint(run, step) / "state.json").read_text())


def test_a_run_that_explodes_ends_with_a_sentence(small_yaml, tmp_path):
    done = command("train", small_yaml, f"run.dir={tmp_path / 'run'}", "evaluate.every=0",
                   "optimizer.learning_rate=1e30", "model.dropout=0", "model.attention.dropout=0",
                   cwd=tmp_path)  # fmt: skip
    assert_refused(done, "step 2: the loss is nan; lower optimizer.learning_rate, or set train.nonfinite=skip")


def test_bad_steps_are_skipped_counted_kept_and_limited(small_yaml, copied_run):
    folder = copied_run(4)
    resume_poisoned(small_yaml, folder, "train.nonfinite=skip", "train.skip_budget=50", "train.stop_at=8")
    skipped = [message for message in events(folder) if "batch skipped" in message]
    count = len(skipped)
    assert count > 0 and skipped[-1].endswith(f"the loss is nan; batch skipped ({count} so far)")
    saved = state(folder, 8)
    assert saved["skipped"] == count
    # A skipped batch is not tried again: the data goes on.
    assert saved["sampler"]["step"] == 8 + count
    before, after = open_checkpoint(checkpoint(folder, 4)), open_checkpoint(checkpoint(folder, 8))
    counts = "domains.poems.optimizer.steps.blocks.0"
    np.testing.assert_array_equal(after.load([counts])[counts], before.load([counts])[counts])

    # The count goes on where it stood, so the budget holds for the whole run.
    with pytest.raises(TrainingError, match=rf"the loss is nan, and train\.skip_budget={count} is used up"):
        resume_poisoned(small_yaml, folder, "train.nonfinite=skip", f"train.skip_budget={count}")


def test_a_roll_back_restores_the_last_checkpoint_and_goes_on_with_other_data(small_yaml, copied_run):
    folder = copied_run(4)
    progress, store = resume_poisoned(small_yaml, folder, "train.nonfinite=rollback", "checkpoint.every=4")
    messages = [message for message in events(folder) if "rolled back" in message]
    assert len(messages) == 1 and messages[0].endswith("the loss is nan; rolled back to step 4 (1 so far)")
    failed = int(messages[0].split()[1].rstrip(":"))
    saved = state(folder, 12)
    assert saved["skipped"] == 1 and progress.step == 12
    assert saved["sampler"]["step"] == 12 + failed - 4  # from the failed step's batch on, nothing is read again
    assert np.abs(store.table("blocks.0", "up.weight")).max() < 10


@pytest.mark.slow
def test_without_a_checkpoint_there_is_nothing_to_roll_back_to(small_yaml, tmp_path):
    done = command("train", small_yaml, f"run.dir={tmp_path / 'run'}", "evaluate.every=0", "checkpoint.every=9",
                   "optimizer.learning_rate=1e30", "train.nonfinite=rollback", cwd=tmp_path)  # fmt: skip
    assert_refused(done, "step 2: the loss is nan and there is no checkpoint to roll back to; set checkpoint.every")
