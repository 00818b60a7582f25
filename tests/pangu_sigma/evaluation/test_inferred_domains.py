"""Held-out loss with the domain inferred: the same losses where it is given, a whole table, refusals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from benchmarks.domain_inference import measure, page
from pangu_sigma.errors import UserError
from pangu_sigma.evaluation.evaluation_job import evaluate
from pangu_sigma.evaluation.inferred_domains import InferredDomainLoss, evaluate_inferred_domains
from tests.pangu_sigma.training import training_process

DOMAINS = ["code", "law", "poems"]


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    import shutil

    return shutil.copytree(finished_run, tmp_path_factory.mktemp("unknown") / "run")


@pytest.fixture(scope="module")
def uniform(run):
    return evaluate_inferred_domains(run)


def test_the_given_domains_losses_are_those_of_an_evaluation(run, uniform):
    losses = evaluate(run).losses
    assert {name: figures["given"] for name, figures in uniform["domains"].items()} == pytest.approx(losses, abs=1e-5)
    assert list(uniform["domains"]) == DOMAINS
    for figures in uniform["domains"].values():
        shares = figures["accuracy"]
        assert list(shares) == [8, 16] and all(0.0 <= share <= 1.0 for share in shares.values())


def test_other_priors_and_mixtures_are_other_measurements(run, uniform):
    mixed = evaluate_inferred_domains(run, top=3, prior="updating")
    cached = evaluate_inferred_domains(run, prior="cached")
    for name, figures in uniform["domains"].items():
        assert mixed["domains"][name]["auto"] != figures["auto"]
        assert mixed["domains"][name]["given"] == figures["given"]
        assert cached["domains"][name]["tokens"] < figures["tokens"]


def test_more_domains_than_there_are_cannot_be_mixed(run):
    with pytest.raises(UserError, match="more than the 3 domains"):
        evaluate_inferred_domains(run, top=4)


def test_generate_takes_the_domain_it_inferred(run, tmp_path):
    options = ["--prompt", "the court shall", "--max-tokens", 2, "--temperature", 0]
    auto = training_process.command("generate", run, "--domain", "auto", *options, "--json", cwd=tmp_path)
    assert auto.returncode == 0, auto.stderr
    record = json.loads(auto.stdout)
    assert record["domain"] in DOMAINS and record.pop("domains").keys() == {record["domain"]}
    given = training_process.command("generate", run, "--domain", record["domain"], *options, "--json", cwd=tmp_path)
    assert json.loads(given.stdout) == record


def test_generate_mixes_domains_with_a_prior_of_texts_like_the_prompts(run, corpora, tmp_path):
    lines = "".join(json.dumps({"prompt": text}) + "\n" for text in ("the court", "moon and star", ""))
    options = ["--jsonl", "--max-tokens", 2, "--top", 3, "--prior", "cached", "--prior-texts", corpora / "poems.jsonl"]
    done = training_process.command("generate", run, "--domain", "auto", *options, cwd=tmp_path, input=lines)
    assert done.returncode == 0, done.stderr
    for line in map(json.loads, done.stdout.splitlines()):
        assert set(line["domains"]) == set(DOMAINS) and sum(line["domains"].values()) == pytest.approx(1.0)
        assert line["domain"] == max(line["domains"], key=line["domains"].get)
    for options, sentence in (
        (["--domain", "law", "--top", 2], "add --domain auto"),
        (["--domain", "auto", "--top", 4], "more than the 3 domains"),
        (["--domain", "auto", "--prior", "cached"], "give both, or neither"),
        (["--domain", "auto", "--prior", "cached", "--prior-texts", "no.txt"], "no.txt does not exist"),
    ):
        refused = training_process.command("generate", run, "--prompt", "the", *options, cwd=tmp_path)
        training_process.assert_refused(refused, sentence)


def test_the_command_prints_a_table_and_refuses_what_has_no_use(run, tmp_path):
    printed = training_process.command("evaluate", run, "--domain", "auto", "--json", "--batches", 1, cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    assert list(json.loads(printed.stdout)["domains"]) == DOMAINS
    refused = training_process.command("evaluate", run, "--domain", "law", cwd=tmp_path)
    training_process.assert_refused(refused, "only auto is")
    training_process.assert_refused(
        training_process.command("evaluate", run, "--top", 2, cwd=tmp_path), "add --domain auto"
    )


def test_the_benchmark_of_hard_texts_has_the_same_shares(run, uniform):
    record = measure(run, batches=1000)
    assert list(record["short"]) == DOMAINS and len(record["mixed"]) == 6
    for own, name in enumerate(DOMAINS):
        shares = {length: figures["inferred"][own] for length, figures in record["short"][name].items()}
        assert shares == uniform["domains"][name]["accuracy"]
    text = page(record | {"machine": {"cores": 2, "cpu": "a processor", "date": "today"}})
    assert "| code | 8 |" in text and "| law → poems |" in text and "taken for poems" in text


def test_the_loss_of_inferred_domains_adds_up_sequence_by_sequence():
    sure = np.log(np.array([[0.2] * 4, [0.6] * 4]))
    text = InferredDomainLoss(2, own=1, kind="updating", top=1, after=(1, 4, 9))
    text.add(sure)
    assert text.prior[1] > 0.6
    text.add(sure[:, :2])
    result = text.result()
    assert result["accuracy"] == {1: 1.0, 4: 1.0, 9: None} and result["tokens"] == 6
    assert result["given"] == pytest.approx(-math.log(0.6))
    # The first token of all meets a uniform prior, where the earlier domain speaks.
    assert result["auto"] == pytest.approx(-(5 * math.log(0.6) + math.log(0.2)) / 6)
