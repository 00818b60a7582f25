"""Whole runs over expert stores: the store is no part of what a run computes, keeps or survives."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from pangu_sigma.checkpoint import CheckpointContents, Fingerprints, StoredTensors, open_checkpoint, save_checkpoint
from pangu_sigma.config import load_config
from pangu_sigma.model.state_dict import model_tensors, restore_model
from pangu_sigma.monitor.metrics_log import read_metrics
from pangu_sigma.training.job import open_run
from tests.pangu_sigma.training.small_trainer import EXPERTS, batch, small_trainer, step_on
from tests.pangu_sigma.training.training_process import (
    assert_equal_checkpoints,
    checkpoint,
    command,
    started,
    steps_logged,
    wait_until,
)

STEPS = 12
# Room for 4 of the 5 experts of the run's only sparse layer: a record of 16 KiB each.
DISK = ["experts.store=disk", f"experts.resident_gib={4.1 * 2**14 / 2**30}"]


@pytest.fixture(scope="module")
def hosted(small_yaml, tmp_path_factory):
    """The uninterrupted run with its experts in host memory."""
    folder = tmp_path_factory.mktemp("hosted")
    done = command(*arguments(small_yaml, folder / "run"), "experts.store=host", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def arguments(small_yaml, run) -> list:
    return ["train", small_yaml, f"run.dir={run}", "evaluate.every=6"]


def copied(run, step: int, folder):
    shutil.copytree(run, folder)
    for path in (folder / "checkpoints").iterdir():
        if path > checkpoint(folder, step):
            shutil.rmtree(path)
    return folder


def test_a_run_on_disk_killed_midway_ends_with_the_bytes_of_the_uninterrupted_run(small_yaml, hosted, tmp_path):
    run = tmp_path / "run"
    train_arguments = [*arguments(small_yaml, run), "checkpoint.every=4", *DISK]
    process = started(*train_arguments, cwd=tmp_path, log=tmp_path / "log")
    try:
        assert wait_until(lambda: steps_logged(run) >= 6, process), (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
    assert (run / "experts" / "blocks.0.table").stat().st_size == 5 * 2**14
    done = command(*train_arguments, "--resume", cwd=tmp_path)
    assert done.returncode == 0 and "resumed from" in done.stderr, done.stderr
    assert_equal_checkpoints(checkpoint(hosted, STEPS), checkpoint(run, STEPS))
    assert not (run / "experts").exists()

    records = [r for r in read_metrics(run) if r["kind"] == "train"]
    assert all(0.0 <= r["store"]["prefetch_hit_rate"] <= 1.0 for r in records)
    assert sum(r["store"]["bytes_read"] for r in records) > 0 < sum(r["store"]["bytes_written"] for r in records)


@pytest.mark.slow
def test_a_run_goes_on_under_a_store_whose_graph_takes_all_experts(small_yaml, hosted, tmp_path):
    run = copied(hosted, 6, tmp_path / "run")
    done = command(*arguments(small_yaml, run), "experts.store=device", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'no longer bit-equal to the run without a break: experts.store was "host" and is "device"' in " ".join(
        done.stderr.split()
    )
    first, second = checkpoint(hosted, STEPS), checkpoint(run, STEPS)
    for file in first.rglob("*.safetensors"):
        first_tensors, other = load_file(file), load_file(second / file.relative_to(first))
        for name, tensor in first_tensors.items():
            np.testing.assert_allclose(other[name], tensor, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_roll_back_on_disk_is_that_in_memory(small_yaml, hosted, tmp_path):
    ended = []
    for index, changes in enumerate((["experts.store=host"], DISK)):
        folder = copied(hosted, 4, tmp_path / str(index) / "run")
        config = load_config(small_yaml, [
            f"run.dir={folder}", "evaluate.every=0", "run.tensorboard=false", "train.nonfinite=rollback",
            "checkpoint.every=4", *changes,
        ])  # fmt: skip
        with open_run(config, resume=True) as run:
            run.model.store.table("blocks.0", "up.weight")[3:5] = 1e38
            run.train()
        assert any("rolled back to step 4" in r.get("message", "") for r in read_metrics(folder))
        ended.append(checkpoint(folder, STEPS))
    assert_equal_checkpoints(*ended)


def saved(trainer, folder) -> dict[str, str]:
    """Save the trainer's state; the hashes of all tensors by name."""
    contents = CheckpointContents(
        step=3, domains=list(EXPERTS), coverage={p: EXPERTS for p in trainer.config.model.sparse_prefixes},
        config_text=trainer.config.to_yaml(), tokenizer_files={"none": b"-"}, probe={}, state={},
        fingerprints=Fingerprints(tokenizer="-", corpora=dict.fromkeys(EXPERTS, "-")),
    )  # fmt: skip
    result = save_checkpoint(folder, contents, model_tensors(trainer.model, trainer.optimizer.moments()), keep=1)
    entries = open_checkpoint(result.path).manifest.tensors
    return {name: piece.sha256 for name, entry in entries.items() for piece in entry.slices}


def test_a_checkpoint_of_any_store_loads_under_any_other_and_is_saved_with_equal_hashes(tmp_path):
    def made(store: str, folder: str):
        return small_trainer(
            model={"domain_parameters": {"embedding": "own"}}, experts={"store": store, "resident_gib": 0.001},
            run={"dir": str(tmp_path / folder)},
        )  # fmt: skip

    stores = ("device", "host", "disk", "device")
    trainer = made(stores[0], "first-run")
    for step in range(3):
        step_on(trainer, step, batch(step, [0, 0, 1, 2]))
    hashes = saved(trainer, tmp_path / "saved-0")
    for index, store in enumerate(stores[1:]):
        stored = StoredTensors(open_checkpoint(checkpoint(tmp_path / f"saved-{index}", 3)))
        loaded = made(store, f"run-{index}")
        restore_model(loaded.model, stored, optimizer_state=True)
        loaded.optimizer.restore(stored, 3)
        assert saved(loaded, tmp_path / f"saved-{index + 1}") == hashes
        loaded.model.store.close()


@pytest.mark.slow
def test_a_run_killed_often_and_moved_between_host_and_disk_ends_with_the_same_bytes(small_yaml, hosted, tmp_path):
    run = tmp_path / "run"
    for index, step in enumerate((1, 3, 4, 6, 9)):
        changes = DISK if index % 2 == 0 else ["experts.store=host"]
        train_arguments = [*arguments(small_yaml, run), "checkpoint.every=1", *changes, "--resume"]
        process = started(*train_arguments, cwd=tmp_path, log=tmp_path / "log")
        try:
            wait_until(lambda step=step: steps_logged(run) >= step, process)
        finally:
            process.kill()
            process.wait()
    done = command(*arguments(small_yaml, run), *DISK, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_equal_checkpoints(checkpoint(hosted, STEPS), checkpoint(run, STEPS))
