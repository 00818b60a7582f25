"""What a run leaves besides its checkpoints, and that it leaves nothing elsewhere."""

import json
import math

import pytest

from pangu_sigma.monitor.metrics_log import read_metrics
from tests.pangu_sigma.training.small_trainer import batch, small_trainer, step_on

TOKENS = 4 * 16
DOMAINS = {"code": 2, "law": 1, "poems": 2}


@pytest.fixture(scope="module")
def records(finished_run):
    return read_metrics(finished_run)


@pytest.fixture(scope="module")
def steps(records):
    return [record for record in records if record["kind"] == "train"]


def test_every_step_is_recorded(steps):
    assert [record["step"] for record in steps] == list(range(1, 13))
    for record in steps:
        assert math.isfinite(record["loss"]) and record["gradient_norm"] > 0 and record["learning_rate"] > 0
        assert record["tokens_per_second"] > 0 and record["flops_per_second"] > record["tokens_per_second"]
        assert record["seconds"] > 0 and record["skipped_steps"] == 0 and record["loss_scale"] is None


def test_tokens_and_losses_are_given_by_domain(steps):
    for record in steps:
        assert sum(record["tokens"].values()) == TOKENS
        assert record["losses"].keys() == record["tokens"].keys() <= DOMAINS.keys()
        mean = sum(record["losses"][d] * record["tokens"][d] for d in record["tokens"]) / TOKENS
        assert record["loss"] == pytest.approx(mean)
    assert all(record["tokens"] == {"code": TOKENS} for record in steps[:4])  # the first phase
    assert set().union(*(record["tokens"] for record in steps[4:])) == DOMAINS.keys()


def test_every_token_is_one_row_of_an_expert_of_its_domain(steps):
    for record in steps:
        assert record["expert_load"].keys() == {"blocks.0"}
        load = record["expert_load"]["blocks.0"]
        assert {domain: len(rows) for domain, rows in load.items()} == DOMAINS
        assert {d: sum(rows) for d, rows in load.items() if sum(rows)} == record["tokens"]
        assert record["dropped_share"] == {"blocks.0": dict.fromkeys(record["tokens"], 0.0)}
        assert record["auxiliary_loss"] == 0.0


def test_the_loss_falls(records):
    evaluations = [record for record in records if record["kind"] == "evaluate"]
    assert [record["step"] for record in evaluations] == [0, 6, 12]
    for record in evaluations:
        assert record["losses"].keys() == record["unigram"].keys() == DOMAINS.keys()
        assert all(tokens > 0 for tokens in record["tokens"].values())
    assert all(evaluations[2]["losses"][d] < evaluations[0]["losses"][d] for d in DOMAINS)


def test_every_checkpoint_is_recorded(finished_run, records):
    saved = [record for record in records if record["kind"] == "checkpoint"]
    assert [record["step"] for record in saved] == [2, 4, 6, 8, 10, 12]
    assert saved[1]["bytes_linked"] > 0 and all(record["bytes_written"] > 0 for record in saved)


def test_the_run_folder_holds_what_it_should(finished_run):
    assert any((finished_run / "tensorboard").glob("events.*"))
    assert json.loads((finished_run / "summary.json").read_text())["parameters"]["total"] > 0
    assert (finished_run / "config.yaml").read_text().startswith("schema_version: 2")


def test_nothing_is_dropped_into_the_current_folder(finished_run):
    assert list((finished_run.parent / "cwd").iterdir()) == []


@pytest.mark.parametrize(
    ("sparse", "shares"),
    [
        # A group of E experts takes E * ceil(0.5 * 16 / E) of a sample's 16 rows: code 8 of 2 experts, law 8 of 1.
        ({"router": "rre", "dispatch": "capacity", "capacity_factor": 0.5}, {"code": 0.5, "law": 0.5}),
        ({"router": "switch"}, {"code": 0.0, "law": 0.0}),
        ({"router": "hash", "dispatch": "capacity", "capacity_factor": 0.5}, {"code": 0.25, "law": 0.25}),
    ],
    ids=["rre with capacity", "switch", "hash with capacity"],
)
def test_loads_and_drops_add_up_to_the_tokens(sparse, shares):
    trainer = small_trainer({"sparse": sparse})
    step_on(trainer, 0, batch(0, [0, 1, 1, 0]))
    figures = trainer.take_record()
    load, dropped = figures["expert_load"]["blocks.0"], figures["dropped_share"]["blocks.0"]
    assert figures["tokens"] == {"code": 32, "law": 32}
    if sparse["router"] == "switch":
        # One gate over all experts: rows are counted by the expert's owner, not by the text's domain.
        assert sum(map(sum, load.values())) == 64 and figures["auxiliary_loss"] > 0
    elif sparse["router"] == "hash":
        assert sum(map(sum, load.values())) + round(32 * (dropped["code"] + dropped["law"])) == 64
    else:
        for domain, tokens in figures["tokens"].items():
            assert sum(load[domain]) + round(dropped[domain] * tokens) == tokens
    assert all(dropped[domain] >= share for domain, share in shares.items())
    assert trainer.take_record()["tokens"] == {}
