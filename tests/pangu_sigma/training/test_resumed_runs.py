"""N steps in one go = k steps, a new process and N - k steps, byte for byte."""

import pytest

from pangu_sigma.monitor.metrics_log import read_metrics
from tests.pangu_sigma.training.training_process import assert_equal_checkpoints, assert_refused, checkpoint, command

N, K = 12, 5


@pytest.fixture(scope="module")
def resumed(small_yaml, tmp_path_factory):
    """(run folder, first process, second process): stopped after K steps and profiled, then resumed."""
    folder = tmp_path_factory.mktemp("resumed")
    run, cwd = folder / "run", folder / "cwd"
    cwd.mkdir()
    arguments = ["train", small_yaml, f"run.dir={run}", "evaluate.every=0"]
    first = command(*arguments, f"train.stop_at={K}", "run.profile.start=2", "run.profile.steps=1", cwd=cwd)
    second = command(*arguments, "--resume", cwd=cwd)
    return run, first, second


def test_a_resumed_run_ends_with_the_same_bytes(finished_run, resumed):
    run, first, second = resumed
    assert first.returncode == 0 and second.returncode == 0, second.stderr
    assert_equal_checkpoints(checkpoint(finished_run, N), checkpoint(run, N))


def test_it_says_where_it_stopped_and_from_what_it_went_on(resumed):
    _, first, second = resumed
    assert f"stopped at step {K} as train.stop_at says; continue with --resume" in first.stderr
    assert f"resumed from step-0000000{K} (step {K})" in second.stderr


def test_metrics_go_on_without_a_gap(finished_run, resumed):
    def curve(run):
        return [(r["step"], r["loss"], r["losses"]) for r in read_metrics(run) if r["kind"] == "train"]

    assert curve(resumed[0]) == curve(finished_run)


def test_the_profiler_writes_into_the_runs_folder(resumed):
    assert any(path.is_file() for path in (resumed[0] / "profile").rglob("*"))
    assert list((resumed[0].parent / "cwd").iterdir()) == []


# Keys that change no result, as their fields say.
FREE = [
    "train.recompute=true", "data.prefetch=0", "evaluate.every=0", "checkpoint.every=3", "checkpoint.keep=9",
    "run.log_every=2", "run.tensorboard=false", "train.nonfinite=skip", "train.skip_budget=3",
]  # fmt: skip


def test_keys_that_change_no_result_leave_every_byte(finished_run, small_yaml, copied_run, tmp_path):
    run = copied_run(4)
    done = command("train", small_yaml, f"run.dir={run}", "data.cache=null", *FREE, "--resume", cwd=tmp_path)
    assert done.returncode == 0 and "bit-equal" not in done.stderr, done.stderr
    assert_equal_checkpoints(checkpoint(finished_run, N), checkpoint(run, N))


def test_a_resume_with_other_rounding_and_a_longer_schedule_says_so(small_yaml, copied_run, tmp_path):
    run = copied_run(4)
    done = command("train", small_yaml, f"run.dir={run}", "data.cache=null", "train.gradient_accumulation_steps=1",
                   "train.steps=20", "train.stop_at=6", "--resume", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        "no longer bit-equal to the run without a break: train.gradient_accumulation_steps was 2 and is 1; "
        "train.steps was 12 and is 20"
    ) in " ".join(done.stderr.split())


@pytest.mark.slow
def test_with_other_phases_ahead_it_is_the_run_that_always_had_them(small_yaml, copied_run, tmp_path):
    phases = "[{steps: 4, weights: {code: 1.0}}, {steps: 2}, {weights: {law: 1.0}, shared: frozen, restart: true}]"
    run, arguments = copied_run(4), ["train", small_yaml, "data.cache=null", f"train.phases={phases}"]
    done = command(*arguments, f"run.dir={run}", "--resume", cwd=tmp_path)
    assert done.returncode == 0 and "bit-equal" not in done.stderr, done.stderr
    assert command(*arguments, f"run.dir={tmp_path / 'whole'}", cwd=tmp_path).returncode == 0
    assert_equal_checkpoints(checkpoint(tmp_path / "whole", N), checkpoint(run, N))


def test_without_a_checkpoint_a_resume_begins_at_step_0_and_says_so(small_yaml, tmp_path):
    done = command("train", small_yaml, f"run.dir={tmp_path / 'run'}", "evaluate.every=0", "train.stop_at=1",
                   "model.dropout=0", "model.attention.dropout=0", "--resume", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0
    assert "no complete checkpoint to resume from: beginning at step 0" in done.stderr
    assert checkpoint(tmp_path / "run", 1).is_dir()


def test_a_run_is_not_begun_again_in_its_folder(finished_run, small_yaml, tmp_path):
    done = command("train", small_yaml, f"run.dir={finished_run}", cwd=tmp_path)
    assert_refused(done, f"{finished_run} already holds a run at step {N}", "add --resume or set run.dir")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ["model.layers=3", "model.sparse.layers=2", "model.sparse.include_query_layer=true"],
        ["model.sparse.router=switch", "model.sparse.resample=false", "model.sparse.jitter=0.1"],
        ["model.sparse.dispatch=capacity", "model.sparse.capacity_factor=0.6", "model.domain_parameters.embedding=own"],
        ["train.precision=float16", "train.loss_scale.initial=1e9", "train.loss_scale.window=3"],
    ],
    ids=["sparse query layer", "switch", "capacity and slots", "float16"],
)
def test_other_models_resume_to_the_same_bytes(small_yaml, tmp_path, changes):
    def train(run, *more):
        done = command("train", small_yaml, f"run.dir={tmp_path / run}", "evaluate.every=0", *changes, *more,
                       cwd=tmp_path)  # fmt: skip
        assert done.returncode == 0, done.stderr

    train("whole")
    train("parts", f"train.stop_at={K}")
    train("parts", "train.stop_at=8", "--resume")
    train("parts", "--resume")
    assert_equal_checkpoints(checkpoint(tmp_path / "whole", N), checkpoint(tmp_path / "parts", N))
