"""Held-out quality: of a run, of a checkpoint, of a run that was moved; the figures of training itself."""

import json
import math
import re
import shutil

import pytest

from pangu_sigma.config.run_sections import EvaluateConfig
from pangu_sigma.errors import UserError
from pangu_sigma.evaluation.evaluation_job import evaluate
from pangu_sigma.monitor.metrics_log import read_metrics
from tests.pangu_sigma.training.training_process import assert_refused, checkpoint, command

DOMAINS = ["code", "law", "poems"]


@pytest.fixture(scope="module")
def printed(finished_run, tmp_path_factory):
    """The figures that the command prints for the finished run."""
    done = command("evaluate", finished_run, "--json", cwd=tmp_path_factory.mktemp("cwd"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_domain_meets_every_group(printed):
    assert printed["step"] == 12
    assert list(printed["matrix"]) == DOMAINS
    assert all(list(row) == DOMAINS and all(map(math.isfinite, row.values())) for row in printed["matrix"].values())
    assert printed["losses"] == {d: printed["matrix"][d][d] for d in DOMAINS}
    assert printed["perplexity"] == pytest.approx({d: math.exp(loss) for d, loss in printed["losses"].items()})
    assert len({printed["matrix"]["code"][group] for group in DOMAINS}) == 3


def test_it_measures_what_the_last_validation_measured(printed, finished_run):
    last = [record for record in read_metrics(finished_run) if record["kind"] == "evaluate"][-1]
    assert last["tokens"] == printed["tokens"]  # all held-out text in both
    assert last["losses"] == printed["losses"] and last["unigram"] == printed["unigram"]


def test_the_result_stands_in_the_runs_folder(printed, finished_run):
    assert json.loads((finished_run / "evaluation.json").read_text()) == printed


def test_a_checkpoint_can_be_measured_alone(printed, copied_run):
    result = evaluate(checkpoint(copied_run(12), 2))
    assert result.step == 2
    assert all(result.losses[d] > printed["losses"][d] for d in DOMAINS)
    assert result.unigram == printed["unigram"]


def test_a_run_that_was_moved_is_measured_where_it_is(printed, finished_run, tmp_path):
    moved, away = tmp_path / "elsewhere", finished_run.with_name("away")
    shutil.copytree(finished_run, moved)
    finished_run.rename(away)  # as if the run had been moved
    try:
        assert evaluate(moved).matrix == printed["matrix"]
        assert not finished_run.exists()
    finally:
        away.rename(finished_run)


def test_a_limit_on_batches_counts_its_tokens(copied_run):
    result = evaluate(copied_run(2), batches=1)
    assert all(0 < tokens <= 4 * 16 for tokens in result.tokens.values())


@pytest.mark.parametrize(("asked", "limit"), [(None, 5), (0, None), (3, 3)])
def test_without_a_number_the_configurations_batches_are_measured(asked, limit):
    assert EvaluateConfig(batches=5).batch_limit(asked) == limit
    with pytest.raises(UserError, match="batches is -1: give"):
        EvaluateConfig().batch_limit(-1)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist: name a run folder or a checkpoint folder"):
        evaluate(tmp_path / "nothing")
    assert_refused(command("evaluate", tmp_path, cwd=tmp_path), f"{tmp_path} is neither a run", "nor a checkpoint")


def test_a_damaged_checkpoint_is_refused_by_the_files_name(copied_run, tmp_path):
    folder = checkpoint(copied_run(2), 2)
    file = max((folder / "tokenizer").iterdir())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(file))):
        evaluate(folder)
