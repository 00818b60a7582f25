"""What is said of a name or key that is not known."""

import pytest

from pangu_sigma.config.load_config import load_values
from pangu_sigma.errors import UserError, did_you_mean

FILE = {"schema_version": 2, "run": {"dir": "x"}, "domains": [{"name": "a", "data": "a.txt"}]}


def test_only_a_name_that_is_close_is_proposed():
    assert did_you_mean("pycod", ["pycode", "law"]) == "did you mean 'pycode'?"
    assert did_you_mean("zzz", ["pycode", "law"]) == "choose one of pycode, law"
    assert did_you_mean("zzz", map(str, range(11))).endswith("8, 9, …")


def refusal(**sections):
    with pytest.raises(UserError) as error:
        load_values({**FILE, **sections}, "f.yaml")
    return str(error.value)


def test_a_misspelt_key_is_told_before_what_is_missing_for_it():
    said = refusal(model={"preset": "tiny"}, train={"stps": 470})
    assert said.startswith("f.yaml: train.stps is not a known key: the nearest known key is train.steps")


def test_a_misspelt_preset_is_told_alone_with_the_nearest():
    said = refusal(model={"preset": "tyny"}, train={"steps": 470})
    assert "did you mean 'tiny'?" in said and "more problem" not in said
