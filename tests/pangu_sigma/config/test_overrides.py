"""`section.key=value`: where an override leads and what it says when it leads nowhere."""

from __future__ import annotations

import pytest

from pangu_sigma.config import load_config
from pangu_sigma.errors import UserError


def test_an_override_reaches_lists_by_index_and_by_name(small):
    config = small("domains.0.experts=7", "domains.docs.weight=0.5", "model.sparse.layers=2")
    assert config.domains[0].experts == 7
    assert config.domains[1].weight == 0.5
    assert config.model.sparse.layers == 2


def test_an_override_makes_missing_sections_and_the_last_one_counts(small):
    config = small("evaluate.every=5", "evaluate.every=6", "run.profile.start=1", "run.profile.steps=2")
    assert config.evaluate.every == 6
    assert config.run.profile.steps == 2


def test_an_override_reaches_into_a_phase(small):
    config = small("train.phases=[{}]", "train.phases.0.weights.code=2", "train.phases.0.domains=[code]")
    assert config.train.phases[0].weights == {"code": 2.0}
    assert config.train.phases[0].domains == ("code",)


def test_values_may_hold_equals_signs_and_spaces(small):
    assert small("run.dir=a=b c").run.dir.endswith("/a=b c")


def test_an_override_of_an_anchor_changes_only_its_own_place(small_file):
    text = (
        small_file.read_text().replace("data: [code.jsonl]", "data: &files [x.txt]").replace("[docs.jsonl]", "*files")
    )
    small_file.write_text(text)
    config = load_config(small_file, ["domains.code.data.0=y.txt"])
    assert config.domains[0].data[0].endswith("y.txt") and config.domains[1].data[0].endswith("x.txt")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "write section.key=value"),
        ("=3", "write section.key=value"),
        ("train..steps=3", "write section.key=value"),
        ("train.steps=", "has no value: write train.steps=null"),
        ("run.dir={a", "is not YAML: put it in quotes"),
        ("domains.law.experts=3", "leads to no item: there are 2 (counted from 0), named code, docs"),
        ("domains.2.experts=3", "leads to no item"),
        ("train.steps.x=3", "inside a single value"),
        ("train.phases.0.steps=3", "there is no such list"),
        ("runn.x.y=3", "the nearest known key is run"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(small, override, message):
    with pytest.raises(UserError) as error:
        small(override)
    assert override in str(error.value) and message in str(error.value)
