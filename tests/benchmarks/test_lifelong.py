"""The lifelong benchmark: every system's stages can be planned, and the page says what the figures say."""

from __future__ import annotations

import argparse
import copy
import json
from xml.etree import ElementTree

import pytest

from benchmarks.lifelong import DOMAINS, EWC, OUTPUT, REPLAY, Run, collect, render
from benchmarks.lifelong_markdown import frozen_text, inference_table, page, panels, systems_table
from benchmarks.lifelong_systems import QUICK_SYSTEMS, missing_text, systems, write_stages
from pangu_sigma.config.parameter_counts import parameter_counts
from pangu_sigma.lifelong.stage_plan import load_plan

SYSTEMS = systems(REPLAY, EWC, OUTPUT)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Domain -> a file in the place of its text."""
    folder = tmp_path_factory.mktemp("text")
    paths = {name: folder / f"{name}.jsonl" for name in DOMAINS}
    for path in paths.values():
        path.write_text('{"text": "x"}\n')
    return paths


def planned(name: str, text, folder, steps: int = 50, small: bool = False):
    return load_plan(write_stages(SYSTEMS[name], folder / f"{name}-1", text, 1, steps, small))


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_learns_the_same_tokens_of_the_same_domains(name, text, tmp_path, small):
    plan = planned(name, text, tmp_path, small=small)
    assert plan.end(plan.stages[-1]) == 200
    assert plan.base.domain_names == DOMAINS
    assert set(plan.learned.values()) == ({0} if SYSTEMS[name].joint else set(range(4)))
    assert plan.grows == (name.startswith("rre") or name == "lifelong_moe")


def test_a_token_meets_as_much_in_every_system_of_one_expert(text, tmp_path):
    met = {}
    for name in SYSTEMS:
        config = planned(name, text, tmp_path).base
        met[name] = max(parameter_counts(config, 4096).activated_per_token.values())
    assert met["dense"] == met["rre_frozen"] == met["rre_trained"] == met["rre_own"] == met["dense_ewc"]
    assert 1.0 < met["switch"] / met["dense"] < 1.01  # the gate


def seed(losses: list[list[float]], stages: list[str], learned: dict, **measures) -> dict:
    """A finished measurement as `lifelong.json` has it, with the parts that the page reads."""
    def row(values: list[float]) -> dict:
        return {
            name: {"loss": value, "how": "own", "auto": value + 0.01, "tokens": 9, "accuracy": {"32": 0.5, "64": None}}
            for name, value in zip(DOMAINS, values, strict=True)
        }

    found = {name: {"mean": None, "by_domain": {}} for name in ("forgetting", "backward_transfer", "forward_transfer")}
    return {
        "complete": True,
        "domains": list(DOMAINS),
        "learned": learned,
        "stages": stages,
        "matrix": losses,
        "measures": found | {"final_loss": {"mean": sum(losses[-1]) / 4, "by_domain": {}}} | measures,
        "properties": [{"name": "Knowledge retention", "holds": "yes", "number": "forgetting +0.000"}],
        "untrained": row([8.0] * 4),
        "rows": [row(values) for values in losses],
        "costs": [{"tokens": 10, "seconds": 2.0, "parameters": {"total": 1000, "active": 500}} for _ in losses],
    }


LOSSES = [[2.0, 6, 6, 6], [2.0, 3, 6, 6], [2.0, 3, 4, 6], [2.0, 3, 4, 5]]
ORDER = {name: number for number, name in enumerate(DOMAINS)}
NOTHING = {"mean": 0.0, "by_domain": dict.fromkeys(DOMAINS[:3], 0.0)}


@pytest.fixture
def record() -> dict:
    frozen = seed(LOSSES, list(DOMAINS), ORDER, forgetting=NOTHING)
    trained = seed([[2.0, 6, 6, 6], [2.5, 3, 6, 6], [2.5, 3, 4, 6], [2.5, 3.5, 4, 2]], list(DOMAINS), ORDER,
                   forgetting={"mean": 0.25, "by_domain": {}})  # fmt: skip
    joint = seed([[1.0, 1, 1, 1]], ["all"], dict.fromkeys(DOMAINS, 0))
    return {
        "machine": {"cores": 2, "cpu": "a processor", "python": "3", "mindspore": "2", "date": "today"},
        "steps": 5, "seeds": 2, "jobs": 1, "small": False, "quick": False, "runs": 6, "finished": 4,
        "domains": list(DOMAINS),
        "systems": {
            "rre_frozen": {"title": "RRE, frozen", "joint": False, "seeds": {"1": frozen, "2": frozen}},
            "rre_trained": {"title": "RRE, trained", "joint": False, "seeds": {"1": trained}},
            "rre_joint": {"title": "RRE, joint", "joint": True, "seeds": {"1": joint}},
        },
    }  # fmt: skip


def test_the_page_tells_forgetting_and_its_price(record):
    text = page(record)
    assert "4 of 6 runs are finished" in text
    assert "Forgetting is exactly 0.000 on every earlier domain (6 figures of 2 runs)" in text
    assert "their loss is 4.000, +1.000 against 3.000 where the shared parameters train on, which forgets 0.250" in text
    rows = systems_table(record).splitlines()[2:]
    assert rows[0].startswith("| RRE, frozen | 1.0k | 500 | 3.500 ± 0.000 | 0.000 ± 0.000 |") and "| – |" in rows[2]
    assert "| code | 50.0 % | – | 2.000 | 2.010 | -0.010 |" in inference_table(
        record["systems"]["rre_frozen"], list(DOMAINS)
    )


def test_anything_forgotten_is_told_however_small(record):
    changed = copy.deepcopy(record)
    one = changed["systems"]["rre_frozen"]["seeds"]["2"]["measures"]["forgetting"]
    one["by_domain"]["math_en"] = -1e-6
    assert "Forgetting is not 0" in frozen_text(changed) and "-0.000001" in frozen_text(changed)


def test_the_heat_map_has_a_panel_for_every_system(record):
    drawn = panels(record)
    assert [panel.title for panel in drawn] == ["RRE, frozen", "RRE, trained", "RRE, joint"]
    assert drawn[0].losses.shape == (5, 4) and drawn[2].losses.shape == (2, 4)
    assert {tuple(panel.highest) for panel in drawn} == {(8.0,) * 4}


def test_what_is_finished_can_be_drawn_at_any_time(tmp_path):
    runs = [Run("rre_frozen", SYSTEMS["rre_frozen"], number, tmp_path / f"rre_frozen-{number}") for number in (1, 2)]
    given = argparse.Namespace(steps=5, seeds=2, jobs=1, small=True, quick=False, out=tmp_path / "out")
    assert "Nothing is finished yet" in render(runs, given) and collect(runs) == {}
    runs[0].folder.mkdir()
    (runs[0].folder / "lifelong.json").write_text(json.dumps(seed(LOSSES, list(DOMAINS), ORDER, forgetting=NOTHING)))
    text = render(runs, given)
    assert "1 of 2 runs are finished" in text and "compare nothing" in text
    assert (tmp_path / "out" / "lifelong.md").read_text() == text
    assert ElementTree.parse(tmp_path / "out" / "lifelong.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize("name", QUICK_SYSTEMS)
def test_the_quick_systems_learn_two_domains_after_a_base_of_two(name, text, tmp_path):
    plan = load_plan(write_stages(SYSTEMS[name], tmp_path / f"{name}-1", text, 1, 50, small=True, quick=True))
    assert plan.end(plan.stages[-1]) == 200 and plan.measure == "own"
    assert list(plan.learned.values()) == ([0] * 4 if SYSTEMS[name].joint else [0, 0, 1, 2])


def test_a_quick_page_has_floors_and_what_a_domain_adds(record):
    quick = copy.deepcopy(record) | {"quick": True}
    for entry in quick["systems"].values():
        for one in entry["seeds"].values():
            one["floors"] = [{"unigram": 5.5, "parameters": 2000, "bytes": 8000} for _ in DOMAINS]
            one["untrained"]["drama_en"]["loss"] = None
    quick["systems"]["rre_own"] = quick["systems"]["rre_trained"]
    text = page(quick)
    assert "| a count of each domain's tokens | 5.500 | 5.500 | 5.500 | 5.500 |" in text and "2.0k (8.0kB)" in text
    assert "code + math_en → drama_en → poetry_zh" in text and "With words of its own" in text
    assert "Inferring the domain" not in text and "lifelong_quick.json" in text and "](lifelong_quick.svg)" in text
    assert tuple(panels(quick)[0].highest) == (8.0, 8.0, 6.0, 8.0)


def test_text_that_is_missing_is_named():
    assert all(path.suffix == ".jsonl" for path in missing_text())
