"""MindFormers' own Trainer trains our model as our trainer does, and its checkpoint comes back whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pangu_sigma.checkpoint import resolve
from pangu_sigma.config.parameter_counts import tensor_shapes
from pangu_sigma.doctor.check_processes import MSRUN
from pangu_sigma.errors import UserError
from pangu_sigma.integrations.mindformers.import_mindformers import SKIPPED, checkpoint_file, import_mindformers
from pangu_sigma.trained_model import stored_config
from parallel.comm.launch import free_port
from tests.pangu_sigma.integrations.mindformers.conftest import STEPS, json_lines, run_formers
from tests.pangu_sigma.training import training_process


def test_the_losses_are_our_own_trainers(both_trained):
    assert len(both_trained.formers_losses) == len(both_trained.our_losses) == STEPS
    assert both_trained.formers_losses[-1] < both_trained.formers_losses[0] - 0.05
    difference = np.abs(np.subtract(both_trained.formers_losses, both_trained.our_losses))
    assert difference.max() < 2e-6, difference


def test_the_weights_are_our_own_trainers_and_an_expert_without_tokens_keeps_every_bit(both_trained):
    theirs = load_file(checkpoint_file(both_trained.formers))
    ours = resolve(both_trained.ours)
    for name, tensor in ours.load(ours.names(optimizer=False)).items():
        if name.startswith("domains.poems.") or name.endswith(".routing"):
            assert theirs[name].tobytes() == tensor.tobytes(), name
        else:
            np.testing.assert_allclose(theirs[name], tensor, atol=2e-5, err_msg=name)
            assert theirs[f"adam_m.{name}"].any(), name
    assert not theirs["adam_m.domains.poems.blocks.0.experts.up.weight"].any()
    # Experts of code, law and poems, by the number of their updates.
    counts = ours.load(["domains.code.optimizer.steps.blocks.0", "domains.law.optimizer.steps.blocks.0"])
    assert theirs["adam_steps.blocks.0"].tolist() == [*np.concatenate(list(counts.values())), 0, 0]


def test_its_checkpoint_comes_back_whole(both_trained, tmp_path):
    done = training_process.command("import", "mindformers", both_trained.formers, "--out", "model", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "adam_m.*" in done.stdout and "each assigned once" in done.stdout
    model = resolve(tmp_path / "model")
    theirs = load_file(checkpoint_file(both_trained.formers))
    config = stored_config(model)
    tensors = model.load(model.names())
    assert set(tensors) == set(tensor_shapes(config, config.model.vocab_size))
    for name, tensor in tensors.items():
        assert tensor.tobytes() == theirs[name].tobytes(), name
    assert model.step == STEPS and set(model.probe()) == {"code", "law", "poems"}
    said = training_process.command("evaluate", "model", "--batches", "1", "--json", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert set(json.loads(said.stdout)["losses"]) == {"code", "law", "poems"}


def test_our_export_holds_what_its_network_does(both_trained, tmp_path):
    done = training_process.command(
        "export", both_trained.ours, "--format", "mindformers", "--out", "export", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    exported = load_file(tmp_path / "export" / "pangu_sigma.safetensors")
    theirs = load_file(checkpoint_file(both_trained.formers))
    used = {n: t.shape for n, t in theirs.items() if SKIPPED.rule(n) is None}
    assert {n: t.shape for n, t in exported.items()} == used
    ours = resolve(both_trained.ours)
    for name, tensor in ours.load(ours.names(optimizer=False)).items():
        assert exported[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.0.norm1.gamma"), "lacks what these tensors need: blocks.0.norm1.gamma"),
        (lambda t: t.update(other=np.zeros(1, np.float32)), "has tensors that the model does not: other"),
        (lambda t: t.update({"norm.beta": np.zeros(3, np.float32)}), "has tensors of another shape: norm.beta"),
        (lambda t: t["domains.law.blocks.0.routing"].fill(1), "experts outside its group of 1"),
        (lambda t: t.update({"norm.beta": t["norm.beta"].astype(np.float16)}), "norm.beta as float16"),
    ],
    ids=["missing", "foreign", "shape", "table", "type"],
)
def test_a_checkpoint_that_is_not_whole_is_refused_by_name(both_trained, tmp_path, change, message):
    tensors = load_file(checkpoint_file(both_trained.formers))
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    with pytest.raises(UserError) as caught:
        import_mindformers(tmp_path / "changed.safetensors", tmp_path / "model", both_trained.formers)
    assert message in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_a_cut_off_file_and_a_lost_companion_are_refused(both_trained, tmp_path):
    whole = checkpoint_file(both_trained.formers).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="cut.safetensors is no whole safetensors file"):
        import_mindformers(tmp_path / "cut.safetensors", tmp_path / "model", both_trained.formers)
    (tmp_path / "alone.safetensors").write_bytes(whole)
    with pytest.raises(UserError, match="give the run's output_dir as run"):
        import_mindformers(tmp_path / "alone.safetensors", tmp_path / "model")
    with pytest.raises(UserError, match="holds no checkpoint of MindFormers"):
        checkpoint_file(tmp_path / "..")
    (tmp_path / "old.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="checkpoint_format: safetensors"):
        checkpoint_file(tmp_path / "old.ckpt")


@pytest.mark.slow
def test_our_model_goes_on_there_and_foreign_tables_are_refused(both_trained, tmp_path):
    done = training_process.command(
        "export", both_trained.ours, "--format", "mindformers", "--out", "export", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    sections = "model.model_config.pangu_sigma.run"
    overrides = [f"callbacks.3.path={tmp_path}/losses.jsonl", "train_dataset.data_loader.steps=4"]
    load = f"load_checkpoint={tmp_path}/export/pangu_sigma.safetensors"
    start = f"{sections}.init_from={both_trained.ours}"
    for number, given in enumerate([[load, start], [start]]):
        done = run_formers(both_trained.file, tmp_path, *overrides, *given, f"output_dir={tmp_path}/{number}")
        assert done.returncode == 0, done.stderr[-4000:]
    losses = json_lines(tmp_path / "losses.jsonl")
    assert losses[:4] == losses[4:]
    assert losses[0] < both_trained.formers_losses[0] - 0.05
    done = run_formers(
        both_trained.file, tmp_path, *overrides, load, f"{sections}.seed=7", f"output_dir={tmp_path}/other"
    )
    assert done.returncode != 0 and "brought another routing table" in done.stderr


@pytest.mark.slow
def test_two_processes_train_as_one_does(both_trained, tmp_path):
    path = os.pathsep.join([str(training_process.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [sys.executable, "-c", MSRUN, "--worker_num=2", "--local_worker_num=2", f"--master_port={free_port()}"]
    words += [f"--log_dir={tmp_path}/logs", "--join=True", "--cluster_time_out=120", "python", "-m"]
    words += ["tests.pangu_sigma.integrations.mindformers.loss_recorder", str(both_trained.file), "use_parallel=true"]
    words += ["parallel.parallel_mode=0", "parallel.gradients_mean=true", "runner_config.batch_size=2"]
    words += [f"callbacks.3.path={tmp_path}/losses", f"output_dir={tmp_path}/output"]
    environment = os.environ | {"PYTHONPATH": path, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
    # Each process's loss is of its own half of the batch.
    halves = [json_lines(tmp_path / f"losses.{rank}") for rank in range(2)]
    np.testing.assert_allclose(np.mean(halves, axis=0), both_trained.our_losses, atol=1e-5)
    model = import_mindformers(tmp_path / "output", tmp_path / "model").checkpoint
    ours = resolve(both_trained.ours)
    for name, tensor in ours.load(ours.names(optimizer=False)).items():
        np.testing.assert_allclose(model.load([name])[name], tensor, atol=5e-5, err_msg=name)
