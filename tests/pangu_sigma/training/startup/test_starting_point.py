"""A sub-model is a model: it is measured, it writes, and a run can begin with it."""

import shutil

import numpy as np
import pytest

from extract.extraction_job import extract, plan
from pangu_sigma.checkpoint import Checkpoint, find_latest, open_checkpoint
from pangu_sigma.config import load_config
from pangu_sigma.errors import UserError
from pangu_sigma.evaluation.evaluation_job import evaluate
from pangu_sigma.monitor.metrics_log import read_metrics
from pangu_sigma.trained_model import stored_config, stored_tokenizer
from pangu_sigma.training.startup.starting_point import resume_from
from tests.pangu_sigma.training.training_process import assert_refused, checkpoint, command


@pytest.fixture(scope="module")
def sub_model(finished_run, tmp_path_factory):
    """The domain `code` of the finished run."""
    out = tmp_path_factory.mktemp("sub") / "code"
    return extract(plan(finished_run, ["code"], out), out, check=False).model.path


@pytest.fixture(scope="module")
def parents_loss(finished_run):
    """What the parent's run measured on `code` at its end, where it left the sub-model."""
    return [record for record in read_metrics(finished_run) if record["kind"] == "evaluate"][-1]["losses"]["code"]


@pytest.fixture(scope="module")
def continued(sub_model, tmp_path_factory):
    """(run, what it said) of two steps from a copy of the sub-model that is gone afterwards."""
    cwd = tmp_path_factory.mktemp("continued")
    shutil.copytree(sub_model, cwd / "model")
    own = ["run.dir=run", "train.stop_at=2", "run.init_from=model"]
    done = command("train", "model/config.yaml", *own, cwd=cwd)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(cwd / "model")
    return cwd / "run", done.stderr


def test_a_run_begins_where_the_parent_ended(continued, parents_loss):
    run, messages = continued
    first = next(record for record in read_metrics(run) if record["kind"] == "evaluate")
    assert first["step"] == 0 and first["losses"] == {"code": parents_loss}
    assert (
        "begins with the weights, tables and tokenizer of" in messages and "optimizer's state starts fresh" in messages
    )


def test_tables_and_tokenizer_are_the_folders_and_the_optimizer_is_new(continued, sub_model):
    checkpoint, _ = find_latest(continued[0])
    folder = open_checkpoint(sub_model)
    table = "domains.code.blocks.0.routing"
    assert checkpoint.step == 2
    np.testing.assert_array_equal(checkpoint.load([table])[table], folder.load([table])[table])
    assert stored_tokenizer(checkpoint).fingerprint == stored_tokenizer(folder).fingerprint
    weight, steps = "domains.code.blocks.0.experts.up.weight", "domains.code.optimizer.steps.blocks.0"
    assert not np.array_equal(checkpoint.load([weight])[weight], folder.load([weight])[weight])
    assert checkpoint.load([steps])[steps].max() <= 2 and checkpoint.state["shared_steps"] == 2


def test_it_resumes_without_the_folder(continued, finished_run):
    run, _ = continued
    done = command("train", run / "config.yaml", "run.init_from=null", "train.stop_at=3", "--resume", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    checkpoint, _ = find_latest(run)
    assert checkpoint.step == 3 and stored_config(checkpoint).run.init_from == str(run.parent / "model")


def test_another_models_configuration_is_refused_before_anything_is_trained(sub_model, small_yaml, tmp_path):
    done = command("train", small_yaml, f"run.init_from={sub_model}", "run.dir=run", cwd=tmp_path)
    assert_refused(done, "has no domain law, poems: leave it out")
    done = command("train", sub_model / "config.yaml", f"run.init_from={sub_model}", "run.dir=run", "model.ffn=64",
                   cwd=tmp_path)  # fmt: skip
    assert_refused(done, "is another model: model.ffn is 32 there and 64 here")
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_it_is_measured_alone_as_in_its_parent(sub_model, parents_loss):
    assert evaluate(sub_model).losses == {"code": parents_loss}


def test_text_that_is_not_here_is_named_and_a_lost_cache_is_no_loss(sub_model, finished_run, corpora, parents_loss):
    text, cache = corpora / "code.jsonl", finished_run / "data"
    cache.rename(cache.with_name("away"))
    try:
        assert evaluate(sub_model).losses == {"code": parents_loss}
        assert not cache.exists()  # nothing is written into another run's folder
        text.rename(text.with_suffix(".away"))
        with pytest.raises(UserError, match=r"of domain code that is not here: put .*code.jsonl back"):
            evaluate(sub_model)
    finally:
        cache.with_name("away").rename(cache)
        if not text.exists():
            text.with_suffix(".away").rename(text)


def test_a_phase_whose_batches_are_drawn_is_done_though_steps_were_skipped(finished_run):
    class AfterSkippedSteps(Checkpoint):
        @property
        def state(self):
            state = super().state
            return state | {"sampler": state["sampler"] | {"step": self.step + 2}}

    whole = open_checkpoint(checkpoint(finished_run, 4))
    phases = "train.phases=[{steps: 4, weights: {code: 1}}, {steps: 1}, {shared: frozen}]"
    changed = load_config(finished_run / "config.yaml", [phases])
    assert resume_from(finished_run, changed, whole).config.train.phases
    with pytest.raises(UserError, match=r"train\.phases"):
        resume_from(finished_run, changed, AfterSkippedSteps(whole.path, whole.manifest))


def test_it_writes(sub_model, tmp_path):
    done = command("generate", sub_model, "--prompt", "def", "--max-tokens", 2, cwd=tmp_path)
    assert done.returncode == 0 and "def" in done.stdout, done.stderr
