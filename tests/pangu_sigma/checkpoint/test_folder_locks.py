"""A run's lock: one job at a time, never through a link, and nothing is left of a job that was refused."""

import os

import pytest

from pangu_sigma.checkpoint import folder_locks
from pangu_sigma.checkpoint.folder_locks import LOCK, lock_run_folder
from pangu_sigma.errors import UserError


def refused(folder, *made: str, **how) -> None:
    with pytest.raises(UserError, match="^refused$"), lock_run_folder(folder, **how):
        for name in made:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("x")
        raise UserError("refused")


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_a_lock_that_is_no_plain_file_is_refused_and_its_target_keeps_its_bytes(tmp_path, kind):
    run, target = tmp_path / "run", tmp_path / "target"
    run.mkdir()
    target.write_text("keep")
    (run / LOCK).symlink_to(target) if kind == "link" else os.mkfifo(run / LOCK)
    with pytest.raises(UserError, match=r"cannot be written \(.*\.lock: a link.*: remove it"), lock_run_folder(run):
        pass
    assert target.read_text() == "keep"


def test_a_refused_job_leaves_no_folder(tmp_path):
    refused(tmp_path / "a/b/run", "data/code/train.bin", "mindspore/rank_0/x")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_job_leaves_a_folder_as_it_was(tmp_path):
    run = tmp_path / "run"
    (run / "data").mkdir(parents=True)
    (run / "data/kept").write_text("x")
    refused(run, "mine.txt", "mindspore/x")
    assert sorted(path.name for path in run.iterdir()) == ["data", "mine.txt"]


@pytest.mark.parametrize("begun", ["config.yaml", "metrics.jsonl", "checkpoints/x", "stages/x"])
def test_a_run_that_has_begun_stays(tmp_path, begun):
    refused(tmp_path / "run", begun, "data/x")
    assert (tmp_path / "run" / begun).exists() and (tmp_path / "run/data/x").exists()


def test_text_that_took_long_to_tokenise_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_locks, "_KEPT_BYTES", 0)
    refused(tmp_path / "run", "data/code/train.bin")
    assert (tmp_path / "run/data/code/train.bin").exists()


def test_logs_that_the_error_names_stay(tmp_path):
    folder = tmp_path / "run/workers"
    with pytest.raises(UserError), lock_run_folder(folder, run_dir=tmp_path / "run", prepared=None):
        (folder / "rank-1.log").write_text("x")
        raise UserError(f"rank 1 failed: see {folder}/rank-1.log")
    assert (folder / "rank-1.log").exists()
    (tmp_path / "other").mkdir()
    folder = tmp_path / "other/run/workers"
    with pytest.raises(UserError), lock_run_folder(folder, run_dir=tmp_path / "other/run", prepared=None):
        (folder / "rank-1.log").write_text("x")
        raise UserError("refused")
    assert list((tmp_path / "other").iterdir()) == []


def test_a_second_job_waits_and_removes_nothing(tmp_path):
    with lock_run_folder(tmp_path / "run"):
        (tmp_path / "run/data").mkdir()
        with pytest.raises(UserError, match="another process is training in"), lock_run_folder(tmp_path / "run"):
            pass
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [LOCK, "data"]


def test_what_refused_workers_made_in_the_runs_folder_goes_too(tmp_path):
    run = tmp_path / "runs/new"
    with pytest.raises(UserError), lock_run_folder(run / "workers", run_dir=run, prepared=None):
        (run / "mindspore").mkdir()
        (run / "workers/rank-1.log").write_text("x")
        raise UserError("refused")
    assert list(tmp_path.iterdir()) == []
