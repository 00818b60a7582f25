"""How values and names read in sentences, and what is said of a name or key that is not known."""

import json

import pytest

from pangu_sigma.config.load_config import load_values
from pangu_sigma.convert.conversion_coverage import check_coverage
from pangu_sigma.convert.olmoe_config import read_config
from pangu_sigma.errors import UserError
from pangu_sigma.wording import bare, did_you_mean, listed, natural_order, nearest, shown

FILE = {"schema_version": 2, "run": {"dir": "x"}, "domains": [{"name": "a", "data": "a.txt"}]}


def test_values_are_written_as_in_yaml_and_json():
    assert [shown(value) for value in (None, True, False, "x", [None], {"a": True})] == [
        "null", "true", "false", '"x"', "[null]", '{"a": true}'
    ]  # fmt: skip
    assert shown("x" * 100) == '"' + "x" * 56 + "..." and [bare("x"), bare(None)] == ["x", "null"]


def test_numbers_in_names_are_counted_not_spelled():
    shards = [f"shard{rank}.ckpt" for rank in (10, 100, 9, 101, 1)]
    assert listed(shards, 4) == "shard1.ckpt, shard9.ckpt, shard10.ckpt, shard100.ckpt and 1 more"
    assert listed(["b", "a10", "a9", "10", "9", ""]) == ", 9, 10, a9, a10, b"
    assert listed([f"t{i:02}" for i in range(14)], 3) == "t00, t01, t02 and 11 more"
    # More digits than Python makes a number of, and digits of other scripts.
    assert sorted(["x" + "9" * 5000, "x10", "x\u0663"], key=natural_order)[2].endswith("999")


def test_missing_tensors_are_listed_by_their_layers():
    targets = {f"layers.{layer}.w": (1,) for layer in range(12)}
    with pytest.raises(UserError, match=r"layers\.8\.w, layers\.9\.w, layers\.10\.w, layers\.11\.w$"):
        check_coverage("the source", targets, [], [])


def test_only_a_name_that_is_close_is_proposed():
    assert did_you_mean("pycod", ["pycode", "law"]) == "did you mean 'pycode'?"
    assert did_you_mean("zzz", ["pycode", "law"]) == "choose one of pycode, law"
    assert did_you_mean("zzz", map(str, range(11))).endswith("8, 9, …")


@pytest.mark.parametrize(
    ("name", "known"),
    [("lwa", "law"), ("poem", "poems"), ("tyny", "tiny"), ("max_token", "max_tokens"), ("temprature", "temperature"),
     ("num_layers", "layers"), ("batch", "batch_size"), ("LAW", "law"), ("d1", "d10")],
)  # fmt: skip
def test_slips_and_shared_words_are_close(name, known):
    assert nearest(name, ["zzzzz", known]) == known


@pytest.mark.parametrize(
    ("name", "known"),
    [("german", "roman"), ("english", "danish"), ("functions", "options"), ("medicine", "machine"), ("zh", "hi"),
     ("eod_id", "pad_id"), ("", "a"), ("...", "law"), ("l2", "lr")],
)  # fmt: skip
def test_other_names_are_not(name, known):
    assert nearest(name, [known]) is None


def refusal(**sections):
    with pytest.raises(UserError) as error:
        load_values({**FILE, **sections}, "f.yaml")
    return str(error.value)


def test_a_misspelt_key_is_told_before_what_is_missing_for_it():
    said = refusal(model={"preset": "tiny"}, train={"stps": 470})
    assert said.startswith("f.yaml: train.stps is not a known key: the nearest known key is train.steps")


def test_a_key_like_no_other_is_told_what_there_is():
    said = refusal(model={"preset": "tiny"}, train={"steps": 1}, serving={"port": 1})
    assert "serving is not a known key: the configuration has schema_version, " in said and "nearest" not in said


def test_a_misspelt_preset_is_told_alone_with_the_nearest():
    said = refusal(model={"preset": "tyny"}, train={"steps": 470})
    assert "did you mean 'tiny'?" in said and "more problem" not in said


def test_a_foreign_option_is_refused_as_its_file_writes_it(tmp_path):
    values = {"model_type": "olmoe", "num_attention_heads": 2, "attention_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="says attention_bias = true, .* only false is taken over"):
        read_config(tmp_path / "config.json")
