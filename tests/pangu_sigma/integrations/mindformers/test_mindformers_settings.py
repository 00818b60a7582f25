"""A MindFormers YAML is read as our configuration; what would change the run unseen is refused before any import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pangu_sigma.errors import UserError
from pangu_sigma.integrations.mindformers import mindformers_job
from pangu_sigma.integrations.mindformers.mindformers_settings import read_yaml, settings_of
from tests.pangu_sigma.integrations.mindformers.conftest import SHIPPED
from tests.pangu_sigma.training import training_process

FILES = sorted(SHIPPED.parent.glob("*.yaml"))
OURS = "model.model_config.pangu_sigma"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_shipped_yaml_is_a_configuration(path):
    config = settings_of(read_yaml(path), str(path))
    assert config.optimizer.learning_rate > 0 and config.train.steps > 0


def test_mindformers_own_keys_become_ours():
    changes = ["optimizer.betas=[0.8, 0.99]", "optimizer.expert_eps=1.0e-20", "runner_wrapper.max_grad_norm=0.5"]
    changes += ["lr_schedule.total_steps=100", "runner_config.batch_size=8", f"{OURS}.run.seed=7", "output_dir=there"]
    config = settings_of(read_yaml(SHIPPED, changes), "file")
    assert (config.optimizer.beta1, config.optimizer.beta2) == (0.8, 0.99)
    assert (config.optimizer.expert_epsilon, config.optimizer.max_grad_norm) == (1e-20, 0.5)
    assert (config.schedule.decay_steps, config.train.batch_size, config.train.steps) == (100, 8, 220)
    assert config.run.seed == 7 and config.run.dir.endswith("/there")


def test_our_sections_are_changed_by_their_own_name_for_model_and_data_alike():
    values = read_yaml(SHIPPED, ["pangu_sigma.run.init_from=there", "pangu_sigma.domains.code.experts=8"])
    assert values["train_dataset"]["data_loader"]["pangu_sigma"]["run"]["init_from"] == "there"
    config = settings_of(values, "file")
    assert config.run.init_from.endswith("/there") and config.domains[0].experts == 8


def test_what_is_typed_for_a_text_is_that_text():
    values = read_yaml(SHIPPED, ["output_dir=exp #2", "pangu_sigma.domains.code.text_field=*a", "new_key=&a 1"])
    assert values["output_dir"] == "exp #2" and values["new_key"] == "&a 1"
    assert values["model"]["model_config"]["pangu_sigma"]["domains"][0]["text_field"] == "*a"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimiser.eps=1.0e-6", "changes optimiser, which the file lacks"),
        ("optimizer.type=AdamW", "optimizer.type is \"AdamW\": set it to PanGuSigmaAdamW"),
        ("runner_config.sink_mode=true", "runner_config.sink_mode is true: set it to false"),
        ("runner_config.gradient_accumulation_steps=4", "MindFormers ignores it on one device"),
        ("resume_training=true", "go on from it with run.init_from"),
        ("callbacks=[]", "callbacks lacks '- type: PanGuSigmaTableCheck'"),
        ("lr_schedule.learning_rate='1e-3'", "write 1.0e-4"),
        ("optimizer.betas=0.9", "optimizer.betas is 0.9: write two numbers"),
        (f"{OURS}.model.layer=3", "the nearest known key is model.layers"),
        (f"{OURS}.experts={{store: host}}", "has the section 'experts'"),
        (f"{OURS}.data.stream={{path: '-', domain: code}}", "data.stream is learned from by pangu-sigma train only"),
        (f"{OURS}.run.dir=x", "pangu_sigma.run has 'dir'"),
        ("use_parallel=true", "set it to 0 (data parallel)"),
        ("lr_schedule.decay_steps=9", "lr_schedule has decay_steps, which changes nothing here: it takes "),
        ("optimizer.amsgrad=true", "optimizer has amsgrad"),
        ("model.model_config.hidden_size=64", "model.model_config has hidden_size"),
        ("train_dataset.data_loader.shuffle=true", "train_dataset.data_loader has shuffle"),
        ("train_dataset.data_loader.steps=many", "write a whole number"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(change, message):
    with pytest.raises(UserError) as caught:
        settings_of(read_yaml(SHIPPED, [change]), "file")
    assert message in str(caught.value)


def test_sections_that_differ_between_model_and_data_are_refused():
    values = read_yaml(SHIPPED)
    values["train_dataset"]["data_loader"]["pangu_sigma"] = {"model": {}}
    with pytest.raises(UserError, match="as its alias"):
        settings_of(values, "file")


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not valid YAML"), ("- 1", "not a mapping"), (None, "does not exist")],
    ids=["broken", "list", "missing"],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "file.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_yaml(tmp_path / "file.yaml")


def test_the_command_says_a_mistake_without_importing_a_framework(tmp_path):
    done = training_process.command("mindformers", SHIPPED, "optimizer.type=AdamW", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("Error: ") and "Traceback" not in done.stderr
    code = (
        "import sys; from pangu_sigma.integrations.mindformers import mindformers_job, import_mindformers\n"
        "from pangu_sigma.integrations.mindformers import mindformers_settings as settings\n"
        f"settings.settings_of(settings.read_yaml({str(SHIPPED)!r}), 'file')\n"
        "sys.exit(sorted({'mindspore', 'mindformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=training_process.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_to_load_must_be_there(formers, tmp_path):
    (tmp_path / "half.safetensors").write_bytes(b"no tensors")
    for path, message in (("gone.safetensors", "is no .safetensors file"), ("half.safetensors", "is no whole")):
        done = training_process.command("mindformers", SHIPPED, f"load_checkpoint={tmp_path / path}", cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr, done.stderr


def test_a_folder_with_another_trainings_checkpoints_is_refused(tmp_path):
    (tmp_path / "out" / "checkpoint" / "rank_0").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint" / "rank_0" / "pangu_sigma_rank_0-1_220.safetensors").touch()
    with pytest.raises(UserError, match="already holds checkpoints of MindFormers: set another output_dir"):
        mindformers_job.train(SHIPPED, [f"output_dir={tmp_path / 'out'}"])
