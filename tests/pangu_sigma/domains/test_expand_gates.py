"""Lifelong-MoE: learned gates grow for a new domain; old experts and their gate columns keep every bit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from pangu_sigma.checkpoint import find_latest, open_checkpoint
from pangu_sigma.config import load_config
from pangu_sigma.config.domain_edits import FollowUpTraining
from pangu_sigma.domains.add_domain import NewDomain
from pangu_sigma.domains.expand_gates import expand_domain
from pangu_sigma.errors import UserError
from pangu_sigma.evaluation.evaluation_job import evaluate
from pangu_sigma.training.job import train
from tests.pangu_sigma.domains.conftest import digests, tensor_digests
from tests.pangu_sigma.training.training_process import checkpoint

GATED = ["model.sparse={layers: 1, router: switch}", "train.steps=4", "train.phases=[]", "evaluate.every=0",
         "checkpoint.every=0", "data.max_domains_per_batch=null"]  # fmt: skip
OLD, NEW = 5, 3  # experts of the run, and new ones
GATE = "blocks.0.router.weight"
HELD = {"output": 0.5}


@pytest.fixture(scope="module")
def gated(small_yaml, tmp_path_factory) -> Path:
    """A finished run of a switch model; treat it as read-only."""
    run = tmp_path_factory.mktemp("gated") / "run"
    train(load_config(small_yaml, [*GATED, f"run.dir={run}", f"data.cache={run.parent / 'cache'}"]))
    return run


@pytest.fixture
def run(gated, tmp_path) -> Path:
    return shutil.copytree(gated, tmp_path / "run")


def new_domain(medicine: Path, **changes) -> NewDomain:
    return NewDomain(**{"name": "medicine", "data": (str(medicine),), "experts": NEW, "init": "mean", **changes})


def follow_up(**changes) -> FollowUpTraining:
    return FollowUpTraining(**{"name": "medicine", "steps": 3, "shared": "regularised", "regularise": HELD, **changes})


@pytest.fixture(scope="module")
def expanded(gated, medicine, tmp_path_factory) -> tuple[dict, Path]:
    """(the tensors before, the run after it was expanded)."""
    run = shutil.copytree(gated, tmp_path_factory.mktemp("expanded") / "run")
    before = open_checkpoint(checkpoint(run, 4)).load()
    expand_domain(run, new_domain(medicine), follow_up())
    return before, run


@pytest.fixture(scope="module")
def learned(expanded, tmp_path_factory) -> Path:
    """The expanded run, trained to the end of its plan."""
    run = shutil.copytree(expanded[1], tmp_path_factory.mktemp("learned") / "run")
    train(load_config(run / "config.yaml", [f"run.dir={run}"]), resume=True)
    return run


def test_experts_and_columns_are_added_and_nothing_else_changes(expanded, gated):
    before, run = expanded
    found, messages = find_latest(run)
    assert not messages and found.domains == ("code", "law", "poems", "medicine")
    assert found.coverage["blocks.0"] == {"code": 2, "law": 1, "poems": 2, "medicine": NEW}
    found.verify()
    after = found.load()
    old_files, new_files = digests(checkpoint(gated, 4)), digests(checkpoint(run, 4))
    for name in old_files:
        if "domains/" in name:
            assert new_files[name] == old_files[name]
    gates = {name for name in after if ".router." in name}
    assert gates == {GATE, f"optimizer.m.{GATE}", f"optimizer.v.{GATE}"}
    for name, tensor in before.items():
        kept = after[name][:, :OLD] if name in gates else after[name]
        assert kept.tobytes() == tensor.tobytes(), name
    assert {name for name in after.keys() - before.keys()} == {
        name.replace("domains.code.", "domains.medicine.") for name in before if name.startswith("domains.code.")
    }
    assert not after[f"optimizer.m.{GATE}"][:, OLD:].any() and not after[f"optimizer.v.{GATE}"][:, OLD:].any()


def test_new_experts_and_columns_begin_as_documented(expanded, run, medicine):
    before, grown = expanded
    after = open_checkpoint(checkpoint(grown, 4)).load()
    up = "blocks.0.experts.up.weight"
    mean = np.concatenate([before[f"domains.{name}.{up}"] for name in ("code", "law", "poems")]).mean(0, dtype=float)
    for expert in after[f"domains.medicine.{up}"]:
        np.testing.assert_array_equal(expert, mean.astype(np.float32))
    old, new = after[GATE][:, :OLD], after[GATE][:, OLD:]
    standard = (new - old.mean(1, keepdims=True)) / np.maximum(old.std(1, keepdims=True), 0.02)
    assert new.shape == (16, NEW) and abs(standard.mean()) < 0.5 and 0.6 < standard.std() < 1.4

    expand_domain(run, new_domain(medicine, init="from:poems"), follow_up())
    copied = open_checkpoint(checkpoint(run, 4)).load()
    own = copied[f"domains.poems.{up}"]
    np.testing.assert_array_equal(copied[f"domains.medicine.{up}"], own[[0, 1, 0]])
    apart = copied[GATE][:, OLD:] - copied[GATE][:, [3, 4, 3]]
    assert 0 < abs(apart).max() < 0.1 * old.std()


def test_the_previous_model_is_the_one_before_it_grew(expanded, gated):
    _, run = expanded
    previous, before = open_checkpoint(run / "previous" / "step-00000004"), open_checkpoint(checkpoint(gated, 4))
    weights = set(before.names(optimizer=False))
    assert tensor_digests(previous) == {n: d for n, d in tensor_digests(before).items() if n in weights}
    # The same files, not copies of them.
    link = previous.path / "domains" / "code.safetensors"
    assert link.stat().st_ino == (checkpoint(run, 4) / "domains" / "code.safetensors").stat().st_ino
    phase = load_config(run / "config.yaml").train.phases[-1]
    assert (phase.shared, phase.domains, phase.regularise.output) == ("regularised", ("medicine",), 0.5)


def test_old_experts_and_columns_keep_every_bit_while_the_new_ones_learn(expanded, learned):
    before = open_checkpoint(checkpoint(expanded[1], 4)).load()
    after = open_checkpoint(checkpoint(learned, 7)).load()
    for name, tensor in before.items():
        if name.startswith("domains.") and not name.startswith("domains.medicine."):
            assert after[name].tobytes() == tensor.tobytes(), name
        if ".router." in name:
            assert after[name][:, :OLD].tobytes() == tensor[:, :OLD].tobytes(), name
            assert (after[name][:, OLD:] != tensor[:, OLD:]).any(), name
    assert (after["embedding.word"] != before["embedding.word"]).any()
    lines = [json.loads(line) for line in (learned / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train" and line["step"] > 4]
    # The model that grew is another function at once, so that it diverges from its first step on.
    assert len(steps) == 3 and all(line["figures"]["divergence"] > 0 for line in steps)
    assert {name for line in steps for name in line["losses"]} == {"medicine"}


def test_a_grown_model_is_measured_like_any_other(learned):
    result = evaluate(learned, 1)
    assert set(result.losses) == {"code", "law", "poems", "medicine"}
    # A learned gate does not ask for the domain.
    assert len({round(loss, 6) for loss in result.matrix["code"].values()}) == 1


def test_a_model_grows_again(learned, medicine, tmp_path):
    run = shutil.copytree(learned, tmp_path / "run")
    more = follow_up(name="surgery", regularise={"output": 0.5, "ewc": 2.0, "fisher_batches": 1}, steps=2)
    expand_domain(run, new_domain(medicine, name="surgery", experts=1), more)
    train(load_config(run / "config.yaml", [f"run.dir={run}"]), resume=True)
    before, after = (open_checkpoint(path).load() for path in (checkpoint(learned, 7), checkpoint(run, 9)))
    assert after[GATE].shape == (16, OLD + NEW + 1)
    assert after[GATE][:, : OLD + NEW].tobytes() == before[GATE].tobytes()
    changed = {n for n in before if n.startswith("domains.") and before[n].tobytes() != after[n].tobytes()}
    assert not changed
    assert [path.name for path in sorted((run / "previous").iterdir())] == [
        "step-00000004", "step-00000007", "step-00000007.fisher.safetensors"]  # fmt: skip


def test_unregularised_growth_is_the_same_without_the_previous_outputs(run, medicine):
    expand_domain(run, new_domain(medicine), follow_up(shared="train", regularise=None))
    phase = load_config(run / "config.yaml").train.phases[-1]
    assert (phase.shared, phase.domains, phase.regularise) == ("train", ("medicine",), None)


def test_what_cannot_grow_is_refused_and_nothing_changes(gated, run, finished_run, medicine, tmp_path):
    cases = [
        (run, new_domain(medicine, name="law"), "already has a domain law"),
        (run, new_domain(medicine, data=(str(tmp_path / "none.jsonl"),)), "does not exist"),
        (run, new_domain(medicine, init="from:opera"), "names no domain"),
        (run, new_domain(medicine, init="nothing"), "is not known: write from:DOMAIN"),
        (run, new_domain(medicine, init="nearest"), "behind a gate there are none"),
        (finished_run, new_domain(medicine), "has no gate to expand: use pangu-sigma domains add"),
        (tmp_path / "none", new_domain(medicine), "does not exist"),
    ]
    before = digests(run)
    for path, domain, message in cases:
        with pytest.raises(UserError, match=re.escape(message)):
            expand_domain(path, domain, follow_up(name=domain.name))
    for name, digest in before.items():
        assert digests(run)[name] == digest
    assert not (run / "previous").exists()
