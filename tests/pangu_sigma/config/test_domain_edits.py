"""What a change of domains does to a configuration that names a mesh."""

from __future__ import annotations

import pytest

from pangu_sigma.config.domain_edits import checked
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
