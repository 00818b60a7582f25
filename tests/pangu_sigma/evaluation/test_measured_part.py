"""An evaluation of a part of the held-out text: what it is compared with, and that it says so."""

import json

import pytest

from pangu_sigma.monitor.text_tables import measured_part
from pangu_sigma.report.run_data import Evaluation, RunData
from tests.pangu_sigma.training.training_process import checkpoint, command


def test_a_part_is_named_as_one():
    assert measured_part({"code": [2, 31], "law": [2, 2]}) == (
        "Only a part of the held-out text was measured: code 2 of 31 batches."
    )
    assert measured_part({"code": [31, 31]}) is None


@pytest.mark.parametrize(("tokens", "loss"), [(32, 2.0), (64, 1.0)])
def test_of_one_step_the_report_takes_the_results_of_most_text(tokens, loss):
    during, final = (Evaluation(step=5, losses={"a": v}, tokens={"a": n}) for v, n in ((2.0, 64), (1.0, tokens)))
    assert RunData("x", [], [during], [], [], final, {}, {}, "").latest.losses == {"a": loss}


def test_the_command_says_which_part_it_measured(copied_run):
    run = copied_run(2)
    done = command("evaluate", checkpoint(run, 2), "--batches", "1", cwd=run)
    assert "Only a part of the held-out text was measured: code 1 of " in done.stdout, done.stderr
    result = json.loads((run / "evaluation.json").read_text())
    whole = json.loads(command("evaluate", checkpoint(run, 2), "--batches", "0", "--json", cwd=run).stdout)
    assert all(result["unigram"][d] != whole["unigram"][d] for d in result["losses"])
