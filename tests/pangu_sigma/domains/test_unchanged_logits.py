"""Domains that come, train and go: what the other domains compute stays the same to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from extract.extraction_plan import ExtractionPlan
from extract.verify_sub_model import verify
from pangu_sigma.checkpoint import Checkpoint, find_latest
from pangu_sigma.config.domain_edits import FollowUpTraining
from pangu_sigma.domains.add_domain import NewDomain, add_domain
from pangu_sigma.domains.list_domains import list_domains
from pangu_sigma.domains.merge_models import merge_models
from pangu_sigma.domains.remove_domain import remove_domain
from tests.pangu_sigma.domains.conftest import tensor_digests
from tests.pangu_sigma.training import training_process

STEPS = 3


def trained_with(parent: Path, name: str, text: Path, folder: Path) -> Path:
    """A run of the parent and a new domain, which trained `STEPS` steps with the shared parameters frozen."""
    follow_up = FollowUpTraining(name, STEPS, shared="frozen", replay=0.0)
    add_domain(parent, NewDomain(name, (str(text),), experts=2, init="random"), follow_up=follow_up, out=folder / name)
    done = training_process.command("train", folder / name / "config.yaml", "--resume", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("apart")


@pytest.fixture(scope="module")
def parent(finished_run, folder) -> Path:
    shutil.copytree(finished_run, folder / "parent")
    return folder / "parent"


@pytest.fixture(scope="module")
def with_medicine(parent, folder, medicine) -> Path:
    return trained_with(parent, "medicine", medicine, folder)


@pytest.fixture(scope="module")
def with_verse(parent, folder, corpora) -> Path:
    """The text of another domain once more, under a name of its own."""
    return trained_with(parent, "verse", corpora / "poems.jsonl", folder)


def assert_same_function(larger: Checkpoint, smaller: Checkpoint) -> None:
    """The domains of `smaller` give the same logits, bit for bit, in batches that mix all domains of `larger`."""
    verification = verify(larger, smaller, ExtractionPlan(larger, smaller.domains))
    assert (
        verification.largest_logit_difference == 0.0 < verification.largest_logit and not verification.different_tensors
    )
    assert verification.domains_mixed == len(larger.domains)


def test_training_a_new_domain_leaves_the_others_logits(parent, with_medicine):
    before, after = find_latest(parent)[0], find_latest(with_medicine)[0]
    assert after.step == before.step + STEPS
    assert_same_function(after, before)
    new = list_domains(with_medicine)[-1]
    assert new.name == "medicine" and new.tokens == STEPS * 4 * 16 and new.loss is not None
    weight = "domains.medicine.blocks.0.experts.up.weight"
    began = find_latest(with_medicine)[0].load([weight.replace("medicine.", "medicine.optimizer.m.")])
    assert all(moment.any() for moment in began.values())


def test_add_train_remove_gives_parameters_and_moments_back(parent, with_medicine, tmp_path):
    removed = remove_domain(with_medicine, "medicine", out=tmp_path / "removed").checkpoint
    before = find_latest(parent)[0]
    assert tensor_digests(removed) == tensor_digests(before)
    assert removed.state["shared_steps"] == before.state["shared_steps"]


def test_merged_domains_are_what_they_were_apart(with_medicine, with_verse, tmp_path):
    merged = merge_models([with_medicine, with_verse], tmp_path / "merged").checkpoint
    assert merged.domains == ("code", "law", "poems", "medicine", "verse")
    for run in (with_medicine, with_verse):
        assert_same_function(merged, find_latest(run)[0])
