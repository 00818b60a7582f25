"""Loading: what is read, what is filled in, and the sentence for every kind of mistake in a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from pangu_sigma.config import config_from_dict, effective, load_config
from pangu_sigma.config.schema_versions import CHANGED_KEYS
from pangu_sigma.errors import UserError


def test_loading_imports_no_framework(small_file):
    code = (
        f"import sys; from pangu_sigma.config import load_config; load_config({str(small_file)!r}); "
        "heavy = {'mindspore', 'numpy', 'sentencepiece', 'rich'} & set(sys.modules); sys.exit(bool(heavy))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})


def test_relative_paths_become_absolute_from_the_current_folder(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = small("domains.docs.data=['a/*.txt', /b.txt]", "data.tokenizer={kind: sentencepiece, path: m.model}")
    assert config.run.dir == str(tmp_path / "runs/small")
    assert config.data.cache == str(tmp_path / "runs/small/data")
    assert config.domains[1].data == (str(tmp_path / "a/*.txt"), "/b.txt")
    assert config.data.tokenizer.path == str(tmp_path / "m.model")


def test_an_effective_configuration_has_nothing_left_to_look_up(small):
    config = small("train.phases=[{steps: 4}, {domains: [docs]}]")
    assert config.schedule.decay_steps == 10
    assert [phase.steps for phase in config.train.phases] == [4, 6]
    assert effective(config) == config


def test_a_stored_configuration_is_read_back_equal(small, small_file):
    config = small("train.phases=[{steps: 4, weights: {code: 1}}, {domains: []}]", "run.dir=1e-4")
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    small_file.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(small_file) == config
    assert load_config(small_file).to_yaml() == config.to_yaml()


def test_a_preset_gives_sizes_and_written_keys_override_it(small):
    model = small("model.preset=2.6B", "model.layers=3", "model.vocab_size=50000").model
    assert (model.layers, model.hidden, model.heads, model.ffn) == (3, 2560, 32, 10240)
    assert (model.positions, model.vocab_size, model.blocks) == (1024, 50000, 2)


def test_exponents_are_numbers_and_words_are_words(small_file):
    text = small_file.read_text().replace("1e-3", "5E-4").replace("name: code", "name: no").replace("docs", "2024")
    small_file.write_text(text.replace("name: 2024", "name: '2024'"))
    config = load_config(small_file, ["train.phases=[{weights: {2024: 1, no: 1e+0}}]"])
    assert config.optimizer.learning_rate == 5e-4
    assert config.train.phases[0].weights == {"2024": 1.0, "no": 1.0}


def test_a_configuration_cannot_be_changed(small):
    with pytest.raises(ValidationError, match="frozen"):
        small().train.steps = 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: copy one of the shipped configurations"),
        ("# only a comment\n", "is empty"),
        ("- a\n", 'holds ["a"], not a mapping'),
        ("just words\n", "not a mapping of sections"),
        ("run: {dir: x\nmodel: 3\n", "not valid YAML"),
        ("a: 1\n\tb: 2\n", "line 2: not valid YAML"),
        ("run:\n  dir: a\n  seed: 1\n  dir: b\n", "line 4: the key 'dir' is written twice: mend that line"),
        ("run: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("[a, b]: 1\n", "a key must be a plain, short text"),
        ("a: &x [*x]\n", "not valid YAML"),
        ("a: 1\n---\nb: 1\n", "not valid YAML"),
        ("run: {dir: x}\n", "schema_version is missing: add the line 'schema_version: 2'"),
        (
            "schema_version: 3\n",
            "schema_version = 3 cannot be read: this version of pangu-sigma reads schema_version 2",
        ),
        ("schema_version: '1'\n", 'schema_version = "1" cannot be read'),
        ("schema_version: true\n", "schema_version = true cannot be read"),
        ("schema_version: !!int x\n", "line 1: not valid YAML ('x' is no int that can be read)"),
        ("\x00", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_with_its_name(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(path) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_version_1_is_refused_with_the_keys_that_changed(small_file):
    small_file.write_text(small_file.read_text().replace("schema_version: 2", "schema_version: 1") + "unknown: 1\n")
    with pytest.raises(UserError) as error:
        load_config(small_file, ["unknown.key=1"])
    message = str(error.value)
    assert message.startswith(f"{small_file}: schema_version = 1 cannot be read: set it to 2 and rename the keys")
    assert all(f"{before} -> {after}" in message for before, after in CHANGED_KEYS) and "\n" not in message
    assert "train.accumulation -> train.gradient_accumulation_steps" in message and "unknown" not in message


def test_a_stored_configuration_of_version_1_names_the_last_version_that_reads_it(small):
    stored = small().to_dict() | {"schema_version": 1, "unknown": 1}
    with pytest.raises(UserError) as error:
        config_from_dict(stored, "runs/old/config.yaml")
    assert str(error.value) == (
        "runs/old/config.yaml: schema_version = 1 cannot be read: 0.1.0 is the last version of pangu-sigma that reads "
        "this folder"
    )


def test_a_key_of_version_1_is_refused_with_its_new_name(small):
    with pytest.raises(UserError, match=r"it is optimizer\.max_grad_norm since schema_version 2"):
        small("optimizer.clip_norm=1.0")


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe4\n")
    folder = "is a folder: give a file, as .*config.yaml"
    for name, message in {"none.yaml": "does not exist", "latin.yaml": "not UTF-8", ".": folder}.items():
        with pytest.raises(UserError, match=message):
            load_config(tmp_path / name)


def test_the_sentence_names_file_key_value_and_what_is_allowed(small_file):
    small_file.write_text(small_file.read_text().replace("steps: 10", "steps: ten"))
    with pytest.raises(UserError) as error:
        load_config(small_file)
    assert str(error.value) == (
        f'{small_file}: train.steps = "ten" is not allowed: it must be a whole number of at least 1'
    )


def test_a_missing_key_is_named_with_its_meaning(small_file):
    small_file.write_text(small_file.read_text().replace("steps: 10, ", ""))
    with pytest.raises(UserError, match=r"train\.steps is missing: set it to a whole number of at least 1 \(Optimizer"):
        load_config(small_file)


def test_further_problems_are_counted_and_named(small):
    said = r"model\.norms is not a known key.* \(2 more problems: model\.heads, train\.steps\)$"
    with pytest.raises(UserError, match=said):
        small("model.heads=0", "train.steps=0", "model.norms=1")


def test_an_unknown_key_like_no_other_names_all_of_its_section(small):
    with pytest.raises(UserError, match="run.profile.begin is not a known key: run.profile has start, steps$"):
        small("run.profile={begin: 1, start: 1, steps: 1}")


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("model.hiden=3", "model.hidden"),
        ("modell.hidden=3", "model"),
        ("optimizer.lr=1", "optimizer.learning_rate"),
        ("train.learning_rate=1", "optimizer.learning_rate"),
        ("model.sparse.layer=1", "model.sparse.layers"),
        ("domains.docs.expert=1", "domains.1.experts"),
        ("train.phases=[{step: 10}]", "train.phases.0.steps"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(small, override, nearest):
    with pytest.raises(UserError, match="is not a known key: the nearest known key is " + nearest.replace(".", r"\.")):
        small(override)


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("train.steps=1.5", "a whole number of at least 1"),
        ("train.steps=1e6", "a whole number"),
        ("train.batch_size=true", "a whole number"),
        ("train.recompute=yes", "true or false"),
        ("train.recompute=1", "true or false"),
        ("model.dropout=1", "a number of at least 0 and less than 1"),
        ("optimizer.learning_rate=0", "a number greater than 0"),
        ("optimizer.learning_rate=1" + "0" * 400, "a number greater than 0"),
        ("optimizer.learning_rate=.nan", "a number greater than 0"),
        ("optimizer.learning_rate=.inf", "a number greater than 0"),
        ("model.norm=batchnorm", "layernorm or rmsnorm"),
        ("model.activation=relu", "fast_gelu, gelu or silu"),
        ("model.preset=7B", "tiny, 350M, 2.6B, 13B or 200B, or null"),
        ("run.dir=null", "a text"),
        ("run.device=GPU", "CPU or Ascend"),
        ("domains=[]", "a list of at least one item"),
        ("domains.code.data=[]", "a list of at least one item"),
        ("domains.code.data=[1]", "a text that is not empty"),
        ("domains.code.experts=0", "a whole number of at least 1"),
        ("domains.code.name=Code", "a text of small letters"),
        ("domains.code.name=../x", "a text of small letters"),
        ("evaluate=null", "a mapping with the keys every"),
        ("train.phases=[{weights: {code: x}}]", "a number"),
        ("run.seed=-1", "at least 0 and at most 2147483647"),
    ],
)
def test_a_wrong_type_or_range_says_what_is_allowed(small, override, allowed):
    key = override.split("=")[0].replace("domains.code", "domains.0")
    with pytest.raises(UserError) as error:
        small(override)
    assert f"override '{override}': {key}" in str(error.value) and allowed in str(error.value)


def test_a_tilde_is_the_home_folder(small):
    assert small("run.dir=~/runs").run.dir == str(Path.home() / "runs")
