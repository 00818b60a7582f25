"""Every key of a foreign config.json is used, known to change nothing, or refused by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import OlmoeConfig

from pangu_sigma.convert.olmoe_config import NEUTRAL, ONLY, USED, OlmoeConfigFile, read_config
from pangu_sigma.errors import UserError

CASES = Path(__file__).parents[4] / "shared" / "cases"
PLAIN = {"model_type": "olmoe", "hidden_size": 64, "num_attention_heads": 4}


@pytest.fixture
def written(tmp_path):
    def write(values):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(values))
        return path

    return write


def rope_theta(values, path):
    return OlmoeConfigFile(values, path, 100).rope_theta()


def test_no_key_is_in_two_lists():
    lists = [USED, frozenset(ONLY), *NEUTRAL.values()]
    assert sum(map(len, lists)) == len(frozenset().union(*lists))


def test_all_that_transformers_writes_is_known(written, tmp_path):
    everything = OlmoeConfig().to_dict()
    read_config(written(everything))
    OlmoeConfig(bos_token_id=3, num_labels=5).save_pretrained(tmp_path)
    read_config(tmp_path / "config.json")
    # Each default of transformers' is one that a list of ours allows.
    for key, allowed in ONLY.items():
        assert everything.get(key, allowed[0]) in allowed


@pytest.mark.parametrize("key", sorted(set().union(*NEUTRAL.values())))
def test_what_changes_nothing_may_hold_anything(written, key):
    read_config(written(PLAIN | {key: "anything"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, r'hidden_act = "gelu", which this model does not have: only "silu"'),
        ({"attention_bias": True}, "attention_bias = true"),
        ({"attention_bias": 0}, "attention_bias = 0"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"clip_qkv": 8}, "clip_qkv = 8"),
        ({"head_dim": 32}, "head_dim = 32, which this model does not have: only 16"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder = true"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"sliding_window": 4096}, "has sliding_window, of which nobody knows here"),
        ({"quantization_config": {"bits": 4}}, "has quantization_config"),
        ({"rope_tetha": 5.0}, "rope_tetha.*did you mean rope_theta"),
        ({"mlp_bias": False, "logit_scale": 2.0}, "has logit_scale, mlp_bias"),
    ],
)
def test_what_would_be_another_function_is_refused_by_its_name(written, change, message):
    with pytest.raises(UserError, match=message):
        read_config(written(PLAIN | change))


@pytest.mark.parametrize("change", [{"sliding_window": None}, {"head_dim": 16}, {"hidden_act": "swish"}])
def test_what_is_the_same_function_is_taken(written, change):
    read_config(written(PLAIN | change))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, 10000.0),
        ({"rope_theta": 500000}, 500000.0),
        ({"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}, 500000.0),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 7.0}, 7.0),
        ({"rope_scaling": {"rope_type": "default"}, "rope_theta": 7.0}, 7.0),
        ({"rope_scaling": {"type": "default", "factor": 1.0}}, 10000.0),
        ({"rope_scaling": None, "rope_parameters": None}, 10000.0),
        ({"rope_theta": 7, "rope_parameters": {"rope_theta": 7.0}}, 7.0),
    ],
)
def test_the_base_of_rope(tmp_path, values, expected):
    assert rope_theta(values, tmp_path) == expected


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}, {"type": "yarn", "factor": 4.0},
        {"rope_type": "default", "factor": 2.0}, {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"full_attention": {"rope_type": "default"}}, {"rope_type": "default", "beta_fast": 32}, "linear", [],
    ],
)  # fmt: skip
def test_another_rope_is_refused_wherever_it_stands(tmp_path, key, rope):
    with pytest.raises(UserError, match=f"says {key} = .*only rope_type default"):
        rope_theta({key: rope}, tmp_path)


def test_two_bases_that_contradict_each_other_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"rope_theta = 10000.0 and rope_parameters.rope_theta = 500000.0"):
        rope_theta({"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 500000.0}}, tmp_path)
    with pytest.raises(UserError, match=r'rope_parameters.rope_theta = "big", which is not a number'):
        rope_theta({"rope_parameters": {"rope_theta": "big"}}, tmp_path)


@pytest.mark.skipif(not CASES.is_dir(), reason="the small inputs that went wrong are not beside this checkout")
def test_the_file_of_transformers_5():
    path = CASES / "olmoe" / "config_rope_parameters.json"
    assert rope_theta(read_config(path), path) == 500000.0
