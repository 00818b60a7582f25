"""From a run or checkpoint folder to the model that was trained."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pangu_sigma.errors import UserError
from pangu_sigma.model.state_dict import model_tensors
from pangu_sigma.trained_model import load_trained, stored_config
from tests.pangu_sigma.training.training_process import checkpoint


@pytest.fixture(scope="module")
def trained(finished_run):
    return load_trained(finished_run)


def test_a_run_is_its_last_checkpoint(trained, finished_run):
    assert trained.checkpoint.path == checkpoint(finished_run, 12) and trained.run_dir == finished_run


def test_every_tensor_is_the_checkpoints(trained):
    loaded = model_tensors(trained.model, None)
    stored = trained.checkpoint.load(trained.checkpoint.names(optimizer=False))
    assert loaded.keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(loaded[name], tensor, err_msg=name)


def test_tables_are_the_stored_ones_and_are_not_drawn_again(trained):
    for domain, table in trained.model.tables["blocks.0"].items():
        stored = trained.checkpoint.load([f"domains.{domain}.blocks.0.routing"])
        np.testing.assert_array_equal(table, stored[f"domains.{domain}.blocks.0.routing"])
        np.testing.assert_array_equal(trained.model.routers[0].tables[domain], table)


def test_the_configuration_is_complete(trained, finished_run):
    config = stored_config(trained.checkpoint)
    assert config.model.vocab_size == trained.tokenizer.vocab_size == 384
    assert config.schedule.decay_steps == 12 and config.run.dir == str(finished_run)


def test_a_checkpoint_outside_a_run_has_no_run(finished_run, tmp_path):
    alone = tmp_path / "model"
    alone.symlink_to(checkpoint(finished_run, 2), target_is_directory=True)
    assert load_trained(alone).run_dir is None


def test_a_changed_corpus_is_not_measured(trained, corpora):
    file = corpora / "poems.jsonl"
    content = file.read_bytes()
    try:
        file.write_bytes(content + b'{"text": "a new poem of the moon and of the winter"}\n')
        with pytest.raises(UserError, match="the corpus of domain poems has changed"):
            trained.corpus()
    finally:
        file.write_bytes(content)


def test_a_folder_of_schema_version_1_is_refused_with_the_last_version_that_reads_it():
    path = Path("runs/old/checkpoints/step-00000006")
    folder = SimpleNamespace(path=path, config_text="schema_version: 1\nunknown: 1\n")
    with pytest.raises(UserError, match=r"^runs/old/\S+/config.yaml: .* 0\.1\.0 is the last version of pangu-sigma"):
        stored_config(folder)
