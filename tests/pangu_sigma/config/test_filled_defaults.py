"""Defaults that follow from other keys: eight lines are enough, and files that say more mean what they meant."""

from __future__ import annotations

import pytest

from pangu_sigma.config import check_resume, config_from_dict, load_config
from pangu_sigma.config.config_text import yaml_text
from pangu_sigma.config.load_config import read_values
from pangu_sigma.config.rules import warnings
from pangu_sigma.errors import UserError
from pangu_sigma.workers import with_workers

EIGHT_LINES = """\
schema_version: 2
run: {dir: runs/mine}
model: {preset: tiny}
domains:
  - {name: code, data: [build/quickstart/code.jsonl]}
  - {name: docs, data: build/quickstart/docs.jsonl}
train: {steps: 200}
"""


@pytest.fixture
def eight(tmp_path):
    """Loads the eight lines with the given overrides."""
    path = tmp_path / "eight.yaml"
    path.write_text(EIGHT_LINES, encoding="utf-8")
    return lambda *overrides: load_config(path, overrides)


def test_eight_lines_are_a_configuration_with_experts_and_a_schedule(eight):
    config = eight()
    assert config.coverage == {"blocks.1": {"code": 4, "docs": 4}, "blocks.2": {"code": 4, "docs": 4}}
    assert config.optimizer.learning_rate == 0.002 and config.schedule.warmup_steps == 20
    assert (config.train.batch_size, config.data.sequence_length, config.data.tokenizer.vocab_size) == (16, 256, 4096)
    assert (config.evaluate.every, config.checkpoint.every) == (20, 100)
    assert config_from_dict(config.to_dict()) == config
    assert not list(warnings(config))


def test_larger_models_take_smaller_rates_longer_sequences_and_larger_batches(eight):
    config = eight("model.preset=13B", "train.steps=100000")
    assert config.optimizer.learning_rate == 7.4e-5 and config.schedule.warmup_steps == 2000
    assert (config.train.batch_size, config.data.sequence_length, config.data.tokenizer.vocab_size) == (64, 1024, 40000)
    assert config.model.sparse.layers == 8  # as PanGu-Σ
    assert (config.evaluate.every, config.checkpoint.every) == (1000, 1000)


def test_a_batch_is_a_multiple_of_what_divides_it(eight):
    assert eight("train.gradient_accumulation_steps=3", "parallel.data=2", "parallel.workers=2").train.batch_size == 18


@pytest.mark.parametrize(
    ("override", "batch", "of_evaluation"), [("run.seed=1", 18, 9), ("train.batch_size=24", 24, 9)]
)
def test_a_batch_that_nobody_wrote_follows_the_processes(eight, override, batch, of_evaluation):
    config = with_workers(eight(override), 3)
    assert (config.train.batch_size, config.evaluate.batch_size) == (batch, of_evaluation)
    assert eight().evaluate.batch_size == 8
    with pytest.raises(UserError, match=r"train\.batch_size = 16 .* choose a batch that is a multiple of both"):
        with_workers(eight("train.batch_size=16"), 3)


def test_overrides_of_a_configuration_act_as_on_its_file(eight, tmp_path, monkeypatch):
    changes = ["train.steps=4000", f"run.dir={tmp_path}/other", "model.preset=13B"]
    config = eight("run.seed=7")
    assert load_config(config) == config
    stored = config_from_dict(config.to_dict())
    monkeypatch.chdir("/")
    assert load_config(config, changes) == load_config(load_config(config, changes[:1]), changes[1:])
    again = load_config(config, changes)
    assert again.run.seed == 7 and again.domains[0].data == config.domains[0].data
    assert (again.schedule.decay_steps, again.schedule.warmup_steps, again.evaluate.every) == (4000, 400, 400)
    assert again.data.cache == f"{tmp_path}/other/data" and again.model.layers == 40
    # What was stored is whole, and so is a copy with changes of its own.
    assert stored == config and load_config(stored, changes[:1]).schedule.warmup_steps == 20
    copied = config.model_copy(update={"train": config.train.model_copy(update={"steps": 300})})
    assert load_config(copied) == copied


def test_files_that_write_batch_and_learning_rate_keep_their_numbers(eight):
    config = eight("train.batch_size=4", "optimizer.learning_rate=1e-3", "model.preset=350M")
    assert config.data.sequence_length == 128 and config.schedule.warmup_steps == 0
    assert config.data.tokenizer.vocab_size == 4096


def test_a_warm_up_ends_before_the_anneal_and_the_decay(eight):
    assert eight("train.steps=100", "schedule.anneal_steps=98").schedule.warmup_steps == 2
    assert eight("train.steps=100", "schedule.decay_steps=3").schedule.warmup_steps == 3


def test_nothing_is_measured_without_held_out_text_or_between_stages(eight):
    assert eight("data.heldout_fraction=0", "checkpoint.probe_sequences=0").evaluate.every == 0
    mesh = eight("parallel={pipeline: 2}", "run.device=Ascend", "train.gradient_accumulation_steps=2",
                 "model.sparse.dispatch=capacity")  # fmt: skip
    assert mesh.evaluate.every == 0


def test_a_preset_leaves_other_layouts_of_experts_alone(eight):
    assert eight("model.sparse.layers=1").model.sparse.layers == 1
    assert eight("model.sparse.pattern=every").model.sparse.layers == 0
    assert eight("model.top_layer=mixture").model.sparse.layers == 0
    assert eight("model.layers=2").model.sparse.layers == 1


def test_a_domain_that_owns_nothing_is_a_warning(eight):
    (warning,) = warnings(eight("model.sparse.layers=0"))
    assert "(code, docs)" in warning and "model.sparse.layers" in warning


def test_what_is_left_out_is_marked(eight, tmp_path):
    config = eight("run.seed=7")
    written = {**read_values(tmp_path / "eight.yaml"), "run": {"dir": "runs/mine", "seed": 7}}
    lines = yaml_text(config, 4096, written).splitlines()
    assert {"  seed: 7", "  preset: tiny", "  layers: 4  # filled in", "  batch_size: 16  # filled in"} < set(lines)
    assert {"  experts: 4  # default", "  device: CPU  # default", "  phases: []  # default"} < set(lines)
    assert not [line for line in lines if line.startswith(("  steps", "  dir", "- name")) and "#" in line]


def test_a_run_may_grow_though_its_warm_up_and_intervals_follow_its_steps(eight):
    changes = check_resume(eight(), eight("train.steps=400"), 100).allowed
    assert {change.key for change in changes} == {"train.steps", "evaluate.every"}


def test_fine_tuning_takes_a_tenth_of_the_rate(eight):
    adapt = "adapt={objective: sft, examples: [{name: code, data: x.jsonl}]}"
    assert eight(adapt, "run.init_from=runs/other").optimizer.learning_rate == 0.0002


def test_a_file_of_version_1_is_told_of_changed_defaults(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("schema_version: 1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a preset has sparse layers unless .* follow train\.steps unless they are 0"):
        load_config(path)
