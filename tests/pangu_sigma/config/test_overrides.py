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


TYPED = (
    "exp #2", "&a b", "*a", "!x", "!!bool x", "two\nlines", " x ", "[", "{a", "[a]", "{a: b}", "yes", "true", "~",
    "1e3", "007", "2024-01-01", "- x", "a: b", "'quoted'", '"', "%x", "@x", "`x", "| x", "> x", "? x", ",", "---", "\t",
)  # fmt: skip


@pytest.mark.parametrize("typed", [text for text in TYPED if text.strip()])
def test_a_text_key_takes_what_was_typed(small, small_file, typed):
    assert small(f"domains.code.text_field={typed}").domains[0].text_field == typed
    assert small(f"run.dir=/runs/{typed}").run.dir == f"/runs/{typed}"
    assert load_config(small_file, {"domains.code.text_field": typed}).domains[0].text_field == typed
    assert small(f"domains.code.data.0=/{typed}.txt").domains[0].data == (f"/{typed}.txt",)
    assert small(f"domains.code.data=/{typed}.txt").domains[0].data == (f"/{typed}.txt",)


def test_null_is_no_value_where_a_text_may_be_none(small):
    assert small("domains.code.filters=code", "domains.code.stars_field=null").domains[0].stars_field is None
    assert small("domains.code.filters=code", "domains.code.stars_field=~").domains[0].stars_field == "~"
    with pytest.raises(UserError, match="run.dir = null is not allowed: it must be a text"):
        small("run.dir=null")


def test_a_list_of_texts_is_one_in_brackets_and_else_one_text(small):
    assert small("domains.code.data=[/a.txt, '/b #1.txt']").domains[0].data == ("/a.txt", "/b #1.txt")
    assert small("domains.code.data=/[ab]*.txt").domains[0].data == ("/[ab]*.txt",)
    assert small("domains.code.data=[ab]/*.txt").domains[0].data[0].endswith("/[ab]/*.txt")


def test_other_keys_are_read_by_their_type(small):
    overrides = (
        "train.steps= 30", "optimizer.learning_rate=1e-4", "run.tensorboard=false", "model.sparse.router=hash",
        "parallel={workers: 1}", "train.phases=[{weights: {code: 1}}]", "run.profile={start: 1, steps: 2}",
    )  # fmt: skip
    config = small(*overrides)
    assert (config.train.steps, config.optimizer.learning_rate, config.run.tensorboard) == (30, 1e-4, False)
    assert config.model.router == "hash" and config.train.phases[0].weights == {"code": 1.0}
    assert small("train.steps=30", "run.profile=null").run.profile is None


def test_pairs_give_python_values_among_typed_texts(small_file):
    config = load_config(small_file, ["train.steps=7", ("domains.code.text_field", "null"), ("train.steps", 8)])
    assert config.train.steps == 8 and config.domains[0].text_field == "null"


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
        ("parallel={a", "is not YAML: write parallel=[a, b] or parallel={key: value}"),
        ("train.steps=100 # more", "train.steps = \"100 # more\" is not allowed"),
        ("train.steps=&a 100", "train.steps = \"&a 100\" is not allowed"),
        ("model.sparse.router=rre # the paper's", "is not allowed"),
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
