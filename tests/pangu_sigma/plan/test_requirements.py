"""What a run needs is compared with what the machine has, before anything is built."""

from __future__ import annotations

import math
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest

import pangu_sigma as ps
from pangu_sigma.checkpoint.disk_space import human_bytes
from pangu_sigma.config import load_config, tensor_shapes
from pangu_sigma.errors import UserError, disk_errors_explained
from pangu_sigma.plan import requirements
from pangu_sigma.plan.compile_plan import compile_plan
from pangu_sigma.plan.hardware import GIB
from pangu_sigma.plan.machine_limits import memory_limit
from pangu_sigma.plan.requirements import (
    check_caches,
    check_group,
    check_loading,
    check_training,
    checkpoint_bytes,
    training_memory,
)
from pangu_sigma.training.job import train
from pangu_sigma.workers import launch

CONFIGS = Path(__file__).parents[3] / "configs"
SMALL_MACHINE = ("quickstart.yaml", "two_stage.yaml", "glam_tiny.yaml", "olmoe_tiny.yaml")
ABSURD = {
    "model.layers": ["model.layers=1000000000"],
    "model.hidden": ["model.hidden=10000000", "model.heads=1"],
    "model.ffn": ["model.ffn=1000000000"],
    "model.vocab_size": ["model.vocab_size=2000000000"],
    "data.tokenizer.vocab_size": ["data.tokenizer.vocab_size=2000000000"],
    "model.positions": ["model.positions=100000000000"],
    "data.sequence_length": ["model.positions=1000000", "data.sequence_length=1000000"],
    "train.batch_size": ["train.batch_size=1000000000"],
    "evaluate.batch_size": ["evaluate.batch_size=1000000000"],
    "data.prefetch": ["data.prefetch=1000000000", "train.steps=1000000000"],
    "domains.code.experts": ["model.vocab_size=1000000000", "domains.code.experts=100000000"],
    "parallel.workers": [
        f"{key}=100000"
        for key in ("parallel.workers", "parallel.data", "train.batch_size", "evaluate.batch_size")
    ],
}


@pytest.fixture
def machine(monkeypatch):
    """A machine of 32 GiB of memory and as much free disk space, or with what is set."""
    limits = {"memory": 32 * GIB, "disk": 32 * GIB}
    monkeypatch.setattr(requirements, "memory_limit", lambda: limits["memory"])
    monkeypatch.setattr(requirements, "free_disk", lambda folder: limits["disk"])
    return limits


@pytest.fixture
def quick(tmp_path):
    return lambda *overrides: load_config(CONFIGS / "quickstart.yaml", [f"run.dir={tmp_path / 'run'}", *overrides])


@pytest.mark.parametrize("key", ABSURD)
def test_an_absurd_size_is_refused_at_once_with_both_numbers_and_its_key(machine, quick, key, tmp_path):
    config = quick(*ABSURD[key])
    started = perf_counter()
    with pytest.raises(UserError) as refusal:
        train(config)
    assert perf_counter() - started < 30
    message = str(refusal.value)
    assert message.startswith(f"{key} = ") and f"lower {key}" in message
    needed = sum(training_memory(config, config.model.vocab_size or config.data.tokenizer.vocab_size).values())
    assert human_bytes(needed) in message and "this machine has 32.0 GiB" in message
    assert not (tmp_path / "run").exists()


def test_a_first_checkpoint_that_does_not_fit_on_the_disk_is_refused(machine, quick):
    config = quick()
    parts = checkpoint_bytes(config, 4096)
    shapes = tensor_shapes(config, 4096).items()
    values = sum(math.prod(shape) * (4 if name.endswith("routing") else 12) for name, shape in shapes)
    assert sum(parts.values()) == values
    machine["disk"] = values
    check_training(config)
    machine["disk"] = values - 1
    with pytest.raises(UserError, match="of disk space .* has free"):
        check_training(config)
    check_training(config, is_new=False)
    on_disk = quick("experts.store=disk")
    assert sum(checkpoint_bytes(on_disk, 4096).values()) > 1.5 * values


@pytest.mark.parametrize("name", SMALL_MACHINE)
def test_shipped_configurations_for_one_machine_fit_in_four_gib(machine, name):
    machine["memory"] = machine["disk"] = 4 * GIB
    check_training(load_config(CONFIGS / name))


def test_a_trained_model_that_does_not_fit_is_refused_before_it_is_read(machine, quick, tmp_path):
    config = quick("model.layers=100000000", "model.vocab_size=4096")
    with pytest.raises(UserError, match="needs .* of memory .* and this machine has 32.0 GiB: extract one of its"):
        check_loading(config, tmp_path)
    check_loading(quick("model.vocab_size=4096"), tmp_path)


def test_caches_that_do_not_fit_are_refused(machine, quick):
    check_caches(quick(), 1024, 256)
    with pytest.raises(UserError, match="1000000 texts of 256 tokens .* lower slots"):
        check_caches(quick(), 1_000_000, 256)


def test_a_machine_has_what_its_control_groups_leave(tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 1048576 kB\nMemFree: 5 kB\nSwapTotal: 1024 kB\n")
    assert memory_limit(proc, groups) == (1 << 30) + (1 << 20)
    (groups / "job" / "step").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/job/step\n")
    (groups / "memory.max").write_text("max\n")
    (groups / "job" / "memory.max").write_text("1000000\n")
    (groups / "job" / "step" / "memory.max").write_text("max\n")
    assert memory_limit(proc, groups) == 1_000_000 + (1 << 20)
    (proc / "self" / "cgroup").write_text("12:cpu:/a\n9:memory:/docker/x\n")
    (groups / "memory").mkdir()
    (groups / "memory" / "memory.limit_in_bytes").write_text("2000000\n")
    assert memory_limit(proc, groups) == 2_000_000 + (1 << 20)


def test_processes_that_do_not_fit_are_not_started(machine, tmp_path):
    with pytest.raises(UserError, match="workers=100000 starts processes that need 9.1 TiB .* has 32.0 GiB"):
        launch(["evaluate", str(tmp_path)], 100_000, tmp_path / "workers")
    assert not (tmp_path / "workers").exists()


def test_a_network_that_no_compiler_holds_is_refused(machine):
    config = load_config(CONFIGS / "eight_devices_dense.yaml", ["model.layers=50000"])
    with pytest.raises(UserError, match=r"model.layers = 50000 .* and this machine has 4.0 GiB"):
        machine["memory"] = 4 * GIB
        compile_plan(config)
    with pytest.raises(UserError, match="tensors, and"):
        compile_plan(load_config(CONFIGS / "eight_devices_dense.yaml", ["model.layers=1000000000"]))


def test_an_expert_group_that_does_not_fit_on_the_disk_is_refused(machine, quick, tmp_path):
    config = quick("model.vocab_size=4096")
    expert = 2 * 192 * 768 + 192 + 768
    machine["disk"] = 2 * 2 * 100 * expert  # two bytes a value, two sparse layers
    check_group(config, 100, tmp_path)
    with pytest.raises(UserError, match=r"a group of 101 experts needs .* of disk space, .* lower experts"):
        check_group(config, 101, tmp_path)


def test_memory_that_is_not_enough_is_a_sentence():
    with pytest.raises(UserError, match="not enough memory"), disk_errors_explained():
        np.zeros(2**55)


def test_more_texts_at_a_time_than_a_server_has_are_refused(tmp_path):
    with pytest.raises(UserError, match="slots is 1000000000000: give 1 to 1024"):
        ps.load(tmp_path, slots=10**12)
