"""Edits of a configuration: a mesh that no longer holds the domains, training that follows a new one."""

from __future__ import annotations

import re

import pytest

from pangu_sigma.config.domain_edits import checked, plan_follow_up
from pangu_sigma.errors import UserError

VALUES = {
    "schema_version": 2,
    "run": {"dir": "run"},
    "model": {"layers": 2, "hidden": 16, "heads": 2, "ffn": 32, "positions": 16, "sparse": {"layers": 1}},
    "domains": [{"name": n, "data": ["unread.jsonl"], "experts": 2} for n in ("a", "b", "c", "d")],
    "data": {"sequence_length": 16, "tokenizer": {"kind": "train", "vocab_size": 384}},
    "optimizer": {"learning_rate": 1e-3},
    "schedule": {"kind": "constant"},
    "train": {"steps": 10, "batch_size": 4},
    "parallel": {"expert": 2, "placement": "domain", "placement_groups": 2},
}  # fmt: skip


def test_a_mesh_that_holds_the_changed_domains_stays():
    values = {**VALUES, "domains": VALUES["domains"][:2]}
    assert checked(values, "a change").parallel.placement_groups == 2
    assert values["parallel"] == VALUES["parallel"]


def test_a_mesh_that_does_not_is_left_out():
    values = {**VALUES, "domains": VALUES["domains"][:3]}
    assert checked(values, "a change").parallel.mesh.size == 1
    assert values["parallel"] == {}


@pytest.mark.parametrize("parallel", [{}, VALUES["parallel"]])
def test_what_else_is_wrong_is_said(parallel):
    values = {**VALUES, "model": {**VALUES["model"], "heads": 3}, "parallel": parallel}
    with pytest.raises(UserError, match="heads"):
        checked(values, "a change")
    assert values["parallel"] == parallel


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"regularise": {"l2": -0.1}}, "regularise.l2 = -0.1 is not allowed: it must be a number of at least 0"),
        ({"regularise": {"l2": 1.0, "through": "olds"}}, 'through = "olds" is not allowed: it must be own or old'),
        ({"regularise": {"l3": 1.0}}, "regularise.l3 is not a known key: "),
        ({"steps": 0}, "steps = 0 is not allowed"),
        ({"shared": "train", "replay": 1.5}, "replay = 1.5 is not allowed"),
        ({"shared": "thawed"}, 'shared = "thawed" is not allowed'),
        ({"regularise": {"l2": 1.0}}, "set shared to regularised"),
        ({"steps": None, "replay": 0.5, "shared": "train"}, "for how long with steps"),
    ],
)
def test_follow_up_training_out_of_range_is_told_in_a_sentence(settings, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        plan_follow_up("new", **{"steps": 3, "shared": "frozen", "replay": 0.0, "regularise": None} | settings)
