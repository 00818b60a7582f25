"""What the stages say becomes phases of runs; a mistake is one sentence and leaves no folder behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from pangu_sigma.config.phase_domains import drawn_weights
from pangu_sigma.errors import UserError
from pangu_sigma.lifelong.stage_plan import load_plan
from pangu_sigma.lifelong.train_stage import new_domain

SHIPPED = sorted((Path(__file__).parents[3] / "configs" / "lifelong").glob("*.yaml"))
DENSE = ["model.sparse.layers=0", "model.sparse.resample=false"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_sequence_loads(path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[3])
    assert len(load_plan(path).stages) > 1


def test_domains_come_in_with_the_stage_that_names_them_first(stages_yaml):
    plan = load_plan(stages_yaml())
    assert plan.grows and plan.learned == {"code": 0, "law": 1, "poems": 1}
    assert [stage.new for stage in plan.stages] == [("code",), ("law", "poems"), ()]
    assert [plan.config(stage).domain_names for stage in plan.stages][:2] == [("code",), ("code", "law", "poems")]
    assert [stage.folder for stage in plan.stages] == ["01-code", "02-law+poems", "03-code-2"]
    assert [plan.end(stage) for stage in plan.stages] == [6, 10, 13]


def test_a_domain_comes_in_with_every_key_of_its_configuration(stages_yaml, tmp_path):
    keys = {"filters": "code", "stars_field": "stars", "text_field": "body", "weight": 2.5, "experts": 5}
    changes = [f"run.dir={tmp_path / 'run'}", *(f"domains.law.{key}={value}" for key, value in keys.items())]
    plan = load_plan(stages_yaml(changes=changes))
    written = next(domain for domain in plan.base.domains if domain.name == "law").model_dump(mode="json")
    assert keys.items() <= written.items()
    assert new_domain(plan, plan.stages[1], "law").entry() == written


def test_a_frozen_stage_trains_its_own_experts_only(stages_yaml):
    plan = load_plan(stages_yaml())
    first, second, third = (plan.phase(stage) for stage in plan.stages)
    assert (first["shared"], first["domains"], first["restart"]) == ("train", None, True)
    assert (second["shared"], second["domains"]) == ("frozen", ["law", "poems"])
    assert second["weights"] == {"law": 1.0, "poems": 1.0} and third["weights"] == {"code": 1.0}


def test_replay_draws_the_domains_of_earlier_stages(stages_yaml):
    plan = load_plan(stages_yaml(policy={"shared": "train", "replay": 0.2}))
    assert [plan.drawn(stage) for stage in plan.stages] == [
        ("code",), ("law", "poems", "code"), ("code", "law", "poems")]  # fmt: skip
    weights = [drawn_weights(plan.config(plan.stages[-1]), index) for index in range(3)]
    assert weights[0] == {"code": 1.0}
    assert weights[1] == pytest.approx({"law": 0.4, "poems": 0.4, "code": 0.2})
    assert weights[2] == pytest.approx({"code": 0.8, "law": 0.1, "poems": 0.1})


def test_a_regularised_stage_is_held_by_what_the_policy_says(stages_yaml):
    held = {"shared": "regularised", "regularise": {"ewc": 50.0}}
    plan = load_plan(stages_yaml(policy=held))
    phase = plan.config(plan.stages[1]).train.phases[1]
    assert (phase.shared, phase.regularise.ewc, phase.regularise.output, phase.old) == ("regularised", 50, 0, ("code",))
    assert plan.config(plan.stages[1]).train.phases[0].shared == "train"


def test_a_stage_changes_the_common_policy_key_by_key(stages_yaml):
    stages = [{"domains": ["code"], "steps": 2}, {"domains": ["law"], "steps": 2, "policy": {"init": "from:code"}}]
    plan = load_plan(stages_yaml(stages=stages, policy={"shared": "train", "replay": 0.5}))
    policy = plan.stages[1].policy
    assert (policy.shared, policy.replay, policy.init) == ("train", 0.5, "from:code")


def test_a_dense_model_has_all_domains_from_the_beginning(stages_yaml):
    plan = load_plan(stages_yaml(), DENSE)
    assert not plan.grows and {plan.domains_after(stage) for stage in plan.stages} == {("code", "law", "poems")}
    assert {plan.phase(stage)["shared"] for stage in plan.stages} == {"train"}


CODE, LAW = {"domains": ["code"], "steps": 2}, {"domains": ["law"], "steps": 2}
def test_a_warm_up_that_nobody_wrote_fits_the_stages(stages_yaml):
    plan = load_plan(stages_yaml(), ["schedule.warmup_steps=null", "optimizer.learning_rate=null", "train.steps=800"])
    schedules = [plan.config(stage).schedule for stage in plan.stages]
    assert plan.base.schedule.warmup_steps == 80
    assert {schedule.warmup_steps for schedule in schedules} == {plan.stages[0].steps}
    assert {schedule.restart_warmup_ratio for schedule in schedules} == {0.05}


MISTAKES = {
    "an unknown domain": ({"stages": [CODE, {"domains": ["sport"], "steps": 2}]}, (), "stage 2 names the domain sport"),
    "a domain twice": ({"stages": [{"domains": ["code", "code"], "steps": 2}]}, (), "names a domain twice"),
    "no domain": ({"stages": [{"domains": [], "steps": 2}]}, (), "stages.0.domains = [] is not allowed"),
    "no stages": ({"stages": None}, (), "stages is missing"),
    "steps below 1": ({"stages": [{"domains": ["code"], "steps": 0}]}, (), "a whole number of at least 1"),
    "a key that is not known": ({"stages": [{**CODE, "step": 2}]}, (), "the nearest known key is stages.0.steps"),
    "two stages of one name": ({"stages": [CODE, {**LAW, "name": "code"}]}, (), "is called code like"),
    "a policy before anything": ({"stages": [{**CODE, "policy": {"replay": 0.1}}]}, (), "stage 1 is the first"),
    "replay of the frozen": ({"policy": {"replay": 0.1}}, (), "where nothing of theirs can change"),
    "replay of nobody": (
        {"stages": [CODE, CODE | {"name": "more"}], "policy": {"replay": 0.1, "shared": "train"}}, (), "learns all of"
    ),
    "a beginning that is not there": ({"policy": {"init": "from:poems"}}, (), "before it only code"),
    "held by nothing": ({"policy": {"shared": "regularised"}}, (), "nothing says by what"),
    "held in vain": ({"stages": [CODE, {**LAW, "policy": {"regularise": {"l2": 1.0}}}]}, (), "leave it out"),
    "a dense model frozen": ({"policy": {"shared": "frozen"}}, DENSE, "a dense model has no others"),
    "a dense model's new experts": ({"policy": {"init": "random"}}, DENSE, "no expert group comes in"),
    "phases in the base": ({}, ["train.phases=[{}]"], "train.phases is set"),
    "a wrong override": ({}, ["train.batch=4"], "train.batch is not a known key"),
    "a base that is not there": ({"base": "no.yaml"}, (), "no.yaml does not exist"),
    "a warm-up that is too long": ({}, ["schedule.warmup_steps=50"], "warmup"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_changes_nothing(stages_yaml, tmp_path, mistake):
    changes, overrides, sentence = MISTAKES[mistake]
    path = stages_yaml(**changes)
    with pytest.raises(UserError) as raised:
        load_plan(path, overrides)
    assert sentence in str(raised.value) and "\n" not in str(raised.value)
    assert [found.name for found in tmp_path.iterdir()] == ["stages.yaml"]
