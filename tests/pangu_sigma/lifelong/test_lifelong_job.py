"""A whole measurement: what is kept is kept to the bit, nothing is done twice, an interruption changes no figure."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from pangu_sigma.checkpoint import find_latest
from pangu_sigma.domains.list_domains import list_domains
from pangu_sigma.errors import INTERRUPTED, UserError
from pangu_sigma.evaluation.evaluation_job import evaluate
from pangu_sigma.lifelong.lifelong_job import run_lifelong
from pangu_sigma.lifelong.stage_plan import load_plan
from pangu_sigma.trained_model import stored_config, stored_corpus, stored_tokenizer
from tests.pangu_sigma.domains.conftest import digests, tensor_digests
from tests.pangu_sigma.lifelong.conftest import STAGES, write_stages
from tests.pangu_sigma.training import training_process

DOMAINS = ["code", "law", "poems"]


def results(run: Path) -> dict:
    return json.loads((run / "lifelong.json").read_text(encoding="utf-8"))


def stage(run: Path, name: str) -> Path:
    return run / "stages" / name


@pytest.fixture
def copied(finished_stages, base_yaml, tmp_path) -> Path:
    """The finished measurement's folder once more, with a `stages.yaml` beside it that names it."""
    shutil.copytree(finished_stages, tmp_path / "run")
    # The copy's plan is the same but for where it lies.
    path = tmp_path / "run" / "plan.json"
    path.write_text(path.read_text().replace(str(finished_stages), str(tmp_path / "run")))
    write_stages(tmp_path, base_yaml)
    return tmp_path / "run"


def again(run: Path, *overrides: str):
    return run_lifelong(load_plan(run.parent / "stages.yaml", overrides), say=lambda text: None)


def test_what_frozen_stages_did_not_learn_is_exactly_what_it_was(finished_stages):
    measured = results(finished_stages)
    matrix = {name: [row[name]["loss"] for row in measured["rows"]] for name in DOMAINS}
    assert (
        measured["complete"]
        and measured["domains"] == DOMAINS
        and measured["stages"] == ["code", "law+poems", "code-2"]
    )
    assert matrix["code"][0] == matrix["code"][1] != matrix["code"][2]
    assert matrix["law"][1] == matrix["law"][2] and matrix["poems"][1] == matrix["poems"][2]
    assert [[row[name]["how"] for name in DOMAINS] for row in measured["rows"]] == [
        ["own", "auto", "auto"], ["own"] * 3, ["own"] * 3]  # fmt: skip
    forgetting = measured["measures"]["forgetting"]["by_domain"]
    assert forgetting["law"] == 0.0 == forgetting["poems"] and forgetting["code"] < 0
    after, before = (find_latest(stage(finished_stages, name))[0] for name in ("03-code-2", "02-law+poems"))
    own = before.names(domains=["law", "poems"])
    assert {n: tensor_digests(after)[n] for n in own} == {n: tensor_digests(before)[n] for n in own}


def test_a_row_is_what_evaluate_finds(copied):
    measured, last = results(copied), stage(copied, "03-code-2")
    evaluated = evaluate(last, batches=4)
    assert {name: measured["rows"][-1][name]["loss"] for name in DOMAINS} == pytest.approx(evaluated.losses, abs=1e-5)
    assert {floor["name"]: floor["unigram"] for floor in measured["floors"]} == pytest.approx(evaluated.unigram)


def test_every_domain_stands_beside_its_unigram_model(finished_stages):
    measured, checkpoint = results(finished_stages), find_latest(stage(finished_stages, "03-code-2"))[0]
    corpus = stored_corpus(checkpoint, stored_config(checkpoint), stored_tokenizer(checkpoint))
    own = {facts.name: facts for facts in list_domains(stage(finished_stages, "03-code-2"))}
    for floor in measured["floors"]:
        name, texts = floor["name"], corpus.heldout()[floor["name"]]
        row = measured["rows"][-1][name]
        labels = [int(i) for n in range(len(texts)) for i in texts.sequence(n)[0][1:]][: row["tokens"]]
        size = len(corpus.tokenizer.decode(labels).encode())
        # The space that a document may begin with is counted, or not.
        expected = row["loss"] * row["tokens"] / math.log(2) / size
        assert floor["end_bits_per_byte"] == pytest.approx(expected, rel=0.02)
        assert (floor["parameters"], floor["bytes"]) == (own[name].parameters, own[name].bytes)
        assert floor["end"] == row["loss"] and floor["learned"] == measured["rows"][name != "code"][name]["loss"]
        assert any(f"{name} ends at" in sentence for sentence in measured["warnings"]) == (
            floor["end"] > floor["unigram"]
        )
    page = (finished_stages / "report.html").read_text(encoding="utf-8")
    output = (finished_stages.parent / "said.txt").read_text(encoding="utf-8")
    for sentence in measured["warnings"]:
        assert f"Warning: {sentence}" in output and sentence in page
    assert "Unigram bits/byte" in page and "unigram bits/byte" in output


def test_less_can_be_measured_and_gives_the_same_losses(copied, base_yaml):
    before = results(copied)
    write_stages(copied.parent, base_yaml, measure="new")
    measured = again(copied).to_dict()
    assert [[row[name]["how"] for name in DOMAINS] for row in measured["rows"]] == [
        ["own", "skipped", "skipped"], ["unchanged", "own", "own"], ["own", "unchanged", "unchanged"]]  # fmt: skip
    assert measured["matrix"] == [[before["matrix"][0][0], None, None], *before["matrix"][1:]]
    for name in ("forgetting", "backward_transfer", "final_loss"):
        assert measured["measures"][name] == before["measures"][name]
    assert measured["measures"]["forward_transfer"]["mean"] is None
    assert results(copied) == json.loads(json.dumps(measured, allow_nan=False))
    write_stages(copied.parent, base_yaml, measure="own", measure_batches=1)
    rows = again(copied).rows
    how = [[row[name]["how"] for name in DOMAINS] for row in rows]
    assert how == [["own", "skipped", "skipped"], ["own"] * 3, ["own"] * 3]
    assert {row["code"]["tokens"] for row in rows} == {4 * 16}


def test_costs_tell_what_came_in(finished_stages):
    first, second, third = results(finished_stages)["costs"]
    assert [cost["steps"] for cost in (first, second, third)] == [6, 4, 3]
    assert [cost["tokens"] for cost in (first, second, third)] == [steps * 4 * 16 for steps in (6, 4, 3)]
    assert all(cost["seconds"] > 0 for cost in (first, second, third))
    expert = 16 * 32 + 32 + 32 * 16 + 16
    assert [cost["parameters"]["new"] - cost["parameters"]["total"] for cost in (first,)] == [0]
    assert second["parameters"]["new"] == second["parameters"]["trained"] == 3 * expert
    assert (third["parameters"]["new"], third["parameters"]["trained"]) == (0, 2 * expert)
    assert third["parameters"]["active"] == first["parameters"]["active"]
    assert third["bytes"]["model"] == second["bytes"]["model"] > first["bytes"]["model"]
    # Weights and two moments of what trained, and the probe; the other files are those of the stage before.
    assert 3 * 4 * 2 * expert < third["bytes"]["written"] < second["bytes"]["with_optimizer"] / 2


def test_a_text_is_read_on_where_the_stage_before_left_it(finished_stages):
    one, _, two = results(finished_stages)["learning"]
    assert two["code"]["passes"] == pytest.approx(one["code"]["passes"] * 9 / 6)
    assert one["code"]["online_loss"] > two["code"]["online_loss"] > 0


def test_everything_is_written_in_every_form(finished_stages):
    measured = results(finished_stages)
    with open(finished_stages / "matrix.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3
    for row in rows:
        where = measured["untrained"] if row["stage"] == "0" else measured["rows"][int(row["stage"]) - 1]
        assert float(row["loss"]) == where[row["domain"]]["loss"]
    svg = ElementTree.parse(finished_stages / "matrix.svg").getroot()
    assert svg.tag.endswith("svg") and "+0.000" in "".join(svg.itertext())
    page = (finished_stages / "report.html").read_text(encoding="utf-8")
    HTMLParser().feed(page)
    output = (finished_stages.parent / "said.txt").read_text(encoding="utf-8")
    assert len(measured["properties"]) == 6
    for line in measured["properties"]:
        assert line["name"] in page and line["number"] in output
    assert str(finished_stages / "report.html") in output


def test_a_finished_measurement_is_not_repeated(copied):
    again(copied)  # writes the results with the copy's paths in them
    before = digests(copied)
    assert again(copied).complete and digests(copied) == before


def test_what_was_interrupted_goes_on_to_the_same_figures(copied):
    uninterrupted = results(copied)
    # As a kill leaves it that came when the second stage was being measured, or the third one prepared.
    shutil.rmtree(stage(copied, "03-code-2"))
    (stage(copied, "02-law+poems") / "measured.json").unlink()
    (copied / "lifelong.json").unlink()
    (copied / "stages" / f".tmp-03-code-2-{os.getpid()}").mkdir()
    trained = [digests(stage(copied, name) / "checkpoints") for name in ("01-code", "02-law+poems")]
    output = []
    measured = run_lifelong(load_plan(copied.parent / "stages.yaml"), say=output.append)
    assert output == ["Stage 3 of 3: code-2"]
    assert measured.complete and results(copied)["rows"] == uninterrupted["rows"]
    assert [digests(stage(copied, name) / "checkpoints") for name in ("01-code", "02-law+poems")] == trained
    assert not list((copied / "stages").glob(".*"))


def test_a_stage_that_was_begun_does_not_change_and_a_new_one_may_come(copied, base_yaml):
    before = digests(copied)
    for changes, sentence in (
        ({"stages": [STAGES[0], {**STAGES[1], "steps": 5}, STAGES[2]]}, "stage 2 \\(law\\+poems\\) of .* was begun"),
        ({"stages": STAGES[:2]}, "stage 3 .* was begun"),
        ({"policy": {"shared": "train"}}, "stage 2 .* was begun with other values"),
    ):
        write_stages(copied.parent, base_yaml, **changes)
        with pytest.raises(UserError, match=sentence):
            again(copied)
    write_stages(copied.parent, base_yaml)
    with pytest.raises(UserError, match="optimizer.learning_rate was 0.003 and is 0.1"):
        again(copied, "optimizer.learning_rate=0.1")
    assert digests(copied) == before
    write_stages(copied.parent, base_yaml, stages=[*STAGES, {"domains": ["law"], "steps": 1}])
    measured = again(copied)
    assert measured.stages[-1] == "law" and len(measured.rows) == 4 and measured.learned["law"] == 1


def test_text_that_is_not_there_leaves_no_folder(stages_yaml, tmp_path):
    plan = load_plan(stages_yaml(), ["domains.law.data=[nowhere.jsonl]"])
    with pytest.raises(UserError, match="nowhere.jsonl"):
        run_lifelong(plan)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_dense_model_learns_and_forgets_with_replay(stages_yaml, tmp_path):
    path = stages_yaml(stages=[STAGES[0], {"domains": ["poems"], "steps": 2}], policy={"replay": 0.25})
    measured = run_lifelong(load_plan(path, ["model.sparse.layers=0", "model.sparse.resample=false"]), say=str)
    assert measured.complete and {row["how"] for row in measured.rows[-1].values()} == {"any"}
    assert measured.costs[1]["parameters"]["new"] == 0 and measured.measures["backward_transfer"].by_domain[0] != 0.0
    read = find_latest(stage(tmp_path / "run", "02-poems"))[0].state["sampler"]["domains"]
    assert read["poems"]["cursor"] == 6 and read["code"]["cursor"] == 24 + 2 and read["law"]["cursor"] == 0


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(finished_stages, base_yaml, tmp_path):
    path = write_stages(tmp_path, base_yaml)
    running = training_process.started("lifelong", path, cwd=tmp_path, log=tmp_path / "log")
    second = stage(tmp_path / "run", "02-law+poems")
    training_process.wait_until(lambda: second.is_dir() and training_process.steps_logged(second) >= 7, running)
    running.send_signal(signal.SIGINT)
    assert running.wait(120) == INTERRUPTED
    output = (tmp_path / "log").read_text()
    assert "stopped in stage 2 (law+poems) of 3; the same command continues" in output
    assert f"The measurement is in run. Next:\n  pangu-sigma lifelong {path}" in output
    partly = results(tmp_path / "run")
    assert not partly["complete"] and len(partly["rows"]) == 1
    done = training_process.command("lifelong", path, "--json", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["rows"] == results(finished_stages)["rows"]
    assert yaml.safe_load((second / "config.yaml").read_text())["run"]["dir"] == "."
