"""An adaptation's file over a model's configuration, its rules, and what becomes of it when domains change."""

from __future__ import annotations

import pytest
import yaml

from pangu_sigma.config import config_from_dict, load_config
from pangu_sigma.config.domain_edits import remove_domain, rename_domain
from pangu_sigma.config.finetuning_file import load_adaptation, run_dir_of, without_adaptation
from pangu_sigma.errors import UserError

SFT = {
    "schema_version": 2,
    "run": {"dir": "runs/sft"},
    "adapt": {"examples": [{"name": "code", "data": ["c.jsonl"]}, {"name": "docs", "data": ["d.jsonl"]}]},
    "optimizer": {"learning_rate": 1e-4},
    "train": {"steps": 4, "batch_size": 2},
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(SFT), encoding="utf-8")
    return path


@pytest.fixture
def adapted(small, file):
    """Loads the file over the smallest configuration, with overrides."""
    return lambda *overrides: load_adaptation(file, overrides, "sft", small(), "/models/small")


def test_model_domains_and_data_are_the_models_and_the_rest_is_the_files(adapted, small):
    config, model = adapted("model.dropout=0.5", "data.sequence_length=64"), small()
    assert config.run.init_from == "/models/small" and config.adapt.objective == "sft"
    assert config.domains == model.domains and config.model.hidden == model.model.hidden
    assert (config.model.dropout, config.data.sequence_length) == (0.5, 64)
    assert config.train.steps == 4 and config.schedule.decay_steps == 4
    # The model's run has its tokenised text to itself; a cache that its owner placed elsewhere is shared.
    assert config.data.cache == f"{config.run.dir}/data" != model.data.cache
    assert config.adapt.examples[0].data[0].startswith("/")
    assert config_from_dict(config.to_dict()) == config


def test_examples_are_changed_by_their_domains_name(adapted):
    config = adapted("adapt.examples.docs.weight=3", "adapt.template=plain")
    assert [examples.weight for examples in config.adapt.examples] == [1.0, 3.0] and config.adapt.template == "plain"


@pytest.mark.parametrize(
    "override, message",
    [
        ("adapt.examples.code.name=docs", "adapt.examples.1.name = docs is named twice"),
        ("adapt.examples.code.name=law", "adapt.examples.0.name = law is no domain of the model: it has code, docs"),
        ("adapt.examples=[{name: code, data: [c], weight: 0}]", "do not add up to a positive number"),
        ("evaluate.every=2 ", None),
        ("run.init_from=null", "run.init_from is null, but adapt changes a trained model"),
        ("adapt.beta=0", "adapt.beta = 0"),
        ("adapt.objective=rlhf", "adapt.objective"),
    ],
)
def test_rules(adapted, override, message):
    if message is None:
        assert adapted(override.strip()).evaluate.every == 2
        with pytest.raises(UserError, match="needs held-out examples, but adapt.heldout_fraction is 0"):
            adapted(override.strip(), "adapt.heldout_fraction=0")
    else:
        with pytest.raises(UserError) as error:
            adapted(override)
        assert message in str(error.value)


def test_the_runs_folder_is_known_before_the_rest(file, tmp_path):
    assert run_dir_of(file, ()) == "runs/sft"
    assert run_dir_of(file, ("train.steps=3", "run.dir=a", "run.dir='b' #c")) == "'b' #c"
    assert run_dir_of(file, {"run.dir": "null"}) == "null"
    (tmp_path / "empty.yaml").write_text("train: {}\n")
    assert run_dir_of(tmp_path / "empty.yaml", ()) is None


def test_training_on_text_refuses_an_adaptation(adapted, tmp_path):
    from pangu_sigma.training.job import train

    path = tmp_path / "adapted.yaml"
    path.write_text(adapted().to_yaml(), encoding="utf-8")
    with pytest.raises(UserError, match="run it with pangu-sigma sft MODEL FILE.yaml"):
        train(load_config(path))


def test_a_domain_that_goes_takes_its_examples_along_and_a_new_name_follows(adapted):
    values = adapted().to_dict()
    rename_domain(values, "docs", "manuals")
    assert [entry["name"] for entry in values["adapt"]["examples"]] == ["code", "manuals"]
    config_from_dict(values)
    remove_domain(values, "code", 2)
    assert [entry["name"] for entry in values["adapt"]["examples"]] == ["manuals"]
    config_from_dict(values)


def test_without_examples_it_is_a_run_on_text_again(adapted):
    values = adapted("data.heldout_fraction=0", "evaluate.every=2").to_dict()
    values["adapt"]["examples"] = values["adapt"]["examples"][:1]
    remove_domain(values, "code", 2)
    assert values["adapt"] is None and values["evaluate"]["every"] == 0
    config_from_dict(values)
    values = adapted().to_dict()
    without_adaptation(values)
    assert config_from_dict(values).checkpoint.probe_sequences == 2
