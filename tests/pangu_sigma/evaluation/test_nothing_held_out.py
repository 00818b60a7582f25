"""A run that keeps no text from training (data.heldout_fraction = 0): it trains, and what needs such text says so."""

from __future__ import annotations

import pytest

from pangu_sigma.checkpoint import open_checkpoint
from pangu_sigma.data.domain_store import open_store
from pangu_sigma.domains.add_domain import NewDomain, add_domain
from pangu_sigma.domains.group_size_advice import advise
from pangu_sigma.report import write_report
from tests.pangu_sigma.conftest import EXPERTS
from tests.pangu_sigma.training.training_process import assert_refused, checkpoint, command

NOTHING = ["data.heldout_fraction=0", "evaluate.every=0", "checkpoint.probe_sequences=0"]


@pytest.fixture(scope="module")
def run(small_yaml, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nothing")
    size = ["train.steps=2", "train.phases=[]", "schedule.warmup_steps=1", "checkpoint.every=0"]
    done = command("train", small_yaml, f"run.dir={folder / 'run'}", "data.cache=null", *NOTHING, *size, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_all_documents_are_trained_on(run):
    for domain in EXPERTS:
        (folder,) = (run / "data").glob(f"{domain}-*")
        store = open_store(folder, 384)
        assert store.documents["heldout"] == 0 and store.documents["train"] > 60
    assert open_checkpoint(checkpoint(run, 2)).probe() == {}
    assert write_report(run).is_file()


@pytest.mark.parametrize("options", [(), ("--domain", "auto")])
def test_measuring_is_refused_with_the_reason(run, tmp_path, options):
    assert_refused(command("evaluate", run, *options, cwd=tmp_path), "data.heldout_fraction is 0, so no text was kept")


def test_a_domain_is_cut_out_unverified_only(run, tmp_path):
    words = ("extract", run, "--domain", "law", "--out", "law")
    assert_refused(command(*words, cwd=tmp_path), "holds no probe sequences of domain law", "--no-verify")
    done = command(*words, "--no-verify", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_quickstart_is_refused_before_it_trains(small_yaml, tmp_path):
    done = command("quickstart", small_yaml, f"run.dir={tmp_path / 'run'}", *NOTHING, cwd=tmp_path)
    assert_refused(done, "the quickstart measures on held-out text")
    assert not (tmp_path / "run").exists()


def test_domains_come_and_are_advised_on(run, corpora, tmp_path):
    new = NewDomain("more", (str(corpora / "law.jsonl"),), experts=1)
    changed = add_domain(run, new, out=tmp_path / "more")
    assert changed.checkpoint.domains[-1] == "more" and changed.checkpoint.probe() == {}
    assert {advice.name for advice in advise(run)} == set(EXPERTS)
