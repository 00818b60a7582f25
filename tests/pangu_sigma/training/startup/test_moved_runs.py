"""A copied or moved run is itself; what holds a model is never a run's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from extract.extraction_job import extract, plan
from pangu_sigma.checkpoint import find_latest
from pangu_sigma.checkpoint.folder_locks import lock_run_folder
from pangu_sigma.config import load_config
from pangu_sigma.config.resume_rules import changed_keys
from pangu_sigma.errors import UserError
from pangu_sigma.evaluation.evaluation_job import evaluate
from pangu_sigma.trained_model import stored_config
from pangu_sigma.training.job import train
from pangu_sigma.training.startup.starting_point import resume_from
from tests.pangu_sigma.training.training_process import command


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with its size and the time of its last change."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def sub_model(finished_run, tmp_path) -> Path:
    """A model folder."""
    return extract(plan(finished_run, ["code"], tmp_path / "a"), tmp_path / "a", check=False).model.path


def test_a_copied_run_goes_on_in_its_own_folder(finished_run, tmp_path):
    before = contents(finished_run)
    branch = shutil.copytree(finished_run, tmp_path / "deep/er/branch")
    done = command("train", "branch/config.yaml", "train.steps=13", "train.phases.1.steps=9", "--resume",
                   cwd=branch.parent)  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Its text lies elsewhere, seen from there: what it tokenised came along.
    assert "the text of domain code is not at" in done.stderr
    assert find_latest(branch)[0].step == 13 and contents(finished_run) == before


def test_a_moved_run_has_no_changed_keys(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    checkpoint, _ = find_latest(run)
    stored, own = stored_config(checkpoint), load_config(run / "config.yaml")
    assert own.run.dir == str(run) == stored.run.dir
    assert changed_keys(stored, own, checkpoint.step) == ((), ())
    assert resume_from(run, own, checkpoint).config == own


def test_a_run_resumes_with_its_text_at_another_place(finished_run, corpora, tmp_path):
    run, text = shutil.copytree(finished_run, tmp_path / "run"), shutil.copy(corpora / "code.jsonl", tmp_path)
    checkpoint, _ = find_latest(run)
    config = load_config(run / "config.yaml", [f"domains.code.data={text}"])
    start = resume_from(run, config, checkpoint)
    assert start.config.domains[0].data == (text,) and not start.messages


def test_a_run_whose_text_is_gone_is_measured_on_what_it_tokenised(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "deep/er/run")
    assert evaluate(run, batches=1).losses == evaluate(finished_run, batches=1).losses
    shutil.rmtree(run / "data")
    with pytest.raises(UserError, match=r"of domain code that is not here: put .*code.jsonl back"):
        evaluate(run, batches=1)


def test_no_run_is_written_into_a_model(sub_model, tmp_path):
    copy = shutil.copytree(sub_model, tmp_path / "b")
    before = contents(tmp_path)
    for overrides, message in (
        ({"run.init_from": copy}, "is run.dir itself: set run.dir to a new folder"),
        ({"run.init_from": sub_model}, "where a model lies .*: set run.dir to a new folder"),
        ({}, "where a model lies"),
        ({"run.dir": f"{copy}/"}, "where a model lies"),
        ({"run.dir": tmp_path / "b/run"}, "where a model lies"),
        ({"parallel.workers": 2, "parallel.data": 2}, "where a model lies"),
    ):
        with pytest.raises(UserError, match=message):
            train(load_config(copy / "config.yaml", overrides))
    assert contents(tmp_path) == before and sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_checkpoint_that_was_copied_out_of_its_run_is_a_model(finished_run, tmp_path):
    copy = shutil.copytree(find_latest(finished_run)[0].path, tmp_path / "taken")
    with pytest.raises(UserError, match="where a model lies"):
        train(load_config(copy / "config.yaml"))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "prompt.onnx", "x.MINDIR"])
def test_an_exported_model_is_one_and_a_run_with_one_beside_it_is_a_run(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"where a model lies .*{name}"), lock_run_folder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]
    (tmp_path / "checkpoints").mkdir()
    with lock_run_folder(tmp_path):
        assert (tmp_path / ".lock").exists()
