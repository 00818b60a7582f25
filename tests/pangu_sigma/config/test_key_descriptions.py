"""The schema explains itself."""

from __future__ import annotations

import pytest

from pangu_sigma.config import load_config
from pangu_sigma.config.config_text import description, json_text, yaml_text
from pangu_sigma.config.key_descriptions import keys
from pangu_sigma.config.yaml_text import parse_yaml


def test_every_key_has_a_one_line_meaning():
    for key in keys():
        assert key.description.endswith(".") and "\n" not in key.description and len(key.description) < 110, key.path


def test_every_key_says_what_is_allowed_and_its_default():
    described = {key.path: key for key in keys()}
    assert described["train.steps"][1:3] == ("a whole number of at least 1", "required")
    routers = "rre, hash, switch, gshard, glam, noisy_top_k, olmoe or expert_choice"
    assert described["model.sparse.router"][1:3] == (routers, "rre")
    assert described["data.cache"][1:3] == ("a text that is not empty, or null", "null")
    assert described["domains[].weight"][1:3] == ("a number of at least 0", "1.0")
    assert all(path in description() for path in described)


def test_the_printed_configuration_is_a_configuration_with_counts_as_comments(small, small_file):
    text = yaml_text(small("model.sparse.layers=1"), 4096, {})
    small_file.write_text(text, encoding="utf-8")
    assert load_config(small_file) == small_file_config(small, text)
    assert "activated per token" in text and "routing tables" in text


def small_file_config(small, text):
    return small("run.dir=" + parse_yaml(text)["run"]["dir"])


def test_json_holds_configuration_vocabulary_and_counts(small):
    printed = parse_yaml(json_text(small("model.sparse.layers=1"), 4096))
    assert set(printed) == {"config", "vocabulary", "parameters"}
    assert set(printed["parameters"]) == {"total", "shared", "per_domain", "activated_per_token", "routing_entries"}


@pytest.mark.parametrize("text", ["1e-4", "no", "010", "null", "", "2024-01-01", "a: b", "é\n", "- x", "~", "1_000"])
def test_any_text_survives_yaml(small, small_file, text):
    config = small()
    changed = config.model_copy(update={"run": config.run.model_copy(update={"dir": text})})
    assert parse_yaml(changed.to_yaml())["run"]["dir"] == text
