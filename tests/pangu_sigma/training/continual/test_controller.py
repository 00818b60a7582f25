"""Runs whose second phase stays near the first one's model: kept with the run, resumed to the byte, or refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pangu_sigma.checkpoint import open_checkpoint
from pangu_sigma.config import load_config
from pangu_sigma.errors import UserError
from pangu_sigma.training.job import train
from tests.pangu_sigma.training import training_process

BY_ALL = "{output: 0.5, l2: 0.1, ewc: 5, fisher_batches: 2}"
HELD = f"{{steps: 4, weights: {{law: 1}}, shared: regularised, regularise: {BY_ALL}}}"
CHANGES = ["train.steps=8", f"train.phases=[{{steps: 4, weights: {{code: 1}}}}, {HELD}]", "evaluate.every=0",
           "checkpoint.every=0", "data.max_domains_per_batch=null"]  # fmt: skip
OUTPUT_ALONE = "{steps: 4, weights: {law: 1}, shared: regularised, domains: [law], regularise: {output: 0.5}}"


def trained(small_yaml, run: Path, *more: str, resume: bool = False) -> Path:
    train(load_config(small_yaml, [f"run.dir={run}", *CHANGES, *more]), resume=resume)
    return run


@pytest.fixture(scope="module")
def uninterrupted(small_yaml, tmp_path_factory) -> Path:
    return trained(small_yaml, tmp_path_factory.mktemp("held") / "run")


@pytest.fixture(scope="module")
def stopped(small_yaml, tmp_path_factory) -> Path:
    return trained(small_yaml, tmp_path_factory.mktemp("stopped") / "run", "train.stop_at=6")


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_previous_model_is_the_one_that_the_phase_began_with(uninterrupted, small_yaml, tmp_path):
    first = trained(small_yaml, tmp_path / "run", "train.stop_at=4")
    current, kept = (
        open_checkpoint(path)
        for path in (training_process.checkpoint(first, 4), uninterrupted / "previous/step-00000004")
    )
    names = current.names(optimizer=False)
    assert kept.names() == names
    for name in names:
        assert current.manifest.tensors[name].slices[0].sha256 == kept.manifest.tensors[name].slices[0].sha256
    figures = {r["step"]: r["figures"] for r in records(uninterrupted) if r["kind"] == "train"}
    assert all(not figures[step] for step in range(1, 5))
    # Both terms are 0 where the phase begins, and grow from there.
    assert abs(figures[5]["divergence"]) < 1e-3 and figures[5]["distance"] == 0.0
    assert figures[8]["divergence"] > abs(figures[5]["divergence"]) and figures[8]["distance"] > 0
    assert any("phase 1 stays near the model of step 4" in r.get("message", "") for r in records(uninterrupted))


def test_a_phase_resumed_in_its_middle_ends_with_the_same_bytes(uninterrupted, stopped, small_yaml, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    trained(small_yaml, run, resume=True)
    training_process.assert_equal_checkpoints(
        training_process.checkpoint(uninterrupted, 8), training_process.checkpoint(run, 8)
    )
    state = open_checkpoint(training_process.checkpoint(run, 8)).state["previous"]
    assert (state["phase"], state["step"]) == (1, 4) and state["fisher"]


@pytest.mark.parametrize("what", ["model", "fisher", "flipped", "gone"])
def test_a_previous_model_that_is_not_the_one_is_refused(stopped, small_yaml, tmp_path, what):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    folder, fisher = run / "previous/step-00000004", run / "previous/step-00000004.fisher.safetensors"
    error = "is not the one that the checkpoint names"
    if what == "model":
        manifest = json.loads((folder / "manifest.json").read_text())
        state = run / "checkpoints/step-00000006"
        shutil.rmtree(folder)
        shutil.copytree(state, folder)
        assert manifest
    elif what == "fisher":
        shutil.copy(folder / "shared.safetensors", fisher)
        error = "is not what the checkpoint names"
    elif what == "flipped":
        content = bytearray((folder / "shared.safetensors").read_bytes())
        content[-5] ^= 1
        (folder / "shared.safetensors").write_bytes(content)
        error = "shared.safetensors is damaged"
    else:
        shutil.rmtree(folder)
        error = "is missing or damaged"
    with pytest.raises(UserError, match=error):
        trained(small_yaml, run, resume=True)
    assert not training_process.checkpoint(run, 8).exists()


def test_the_old_domains_experts_keep_every_bit(small_yaml, tmp_path):
    run = tmp_path / "run"
    phases = f"train.phases=[{{steps: 4, weights: {{code: 1}}}}, {OUTPUT_ALONE}]"
    trained(small_yaml, run, phases, "checkpoint.every=4")
    before, after = (open_checkpoint(training_process.checkpoint(run, step)).load() for step in (4, 8))
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert not {name for name in moved if name.startswith(("domains.code.", "domains.poems."))}
    assert "embedding.word" in moved and any(name.startswith("domains.law.") for name in moved)


@pytest.mark.slow
def test_a_previous_model_that_nobody_names_goes(uninterrupted, small_yaml, tmp_path):
    run = tmp_path / "run"
    phases = f"train.phases=[{{steps: 2, weights: {{code: 1}}}}, {OUTPUT_ALONE.replace('4', '2')}, {{steps: 2}}]"
    trained(small_yaml, run, "train.steps=6", phases, "checkpoint.every=2", "checkpoint.keep=1")
    assert not list((run / "previous").iterdir())
    assert [path.name for path in (uninterrupted / "previous").iterdir() if path.is_dir()] == ["step-00000004"]
