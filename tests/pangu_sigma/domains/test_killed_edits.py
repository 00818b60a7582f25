"""kill -9 at every file operation of a change of domains: what is left is the old family or the new one."""

import json
import shutil

import pytest

from pangu_sigma.checkpoint import find_latest
from pangu_sigma.checkpoint.run_config_file import stale_config
from pangu_sigma.config import load_config
from pangu_sigma.domains.add_domain import add_domain
from pangu_sigma.domains.remove_domain import remove_domain, rename_domain
from pangu_sigma.training.job import train
from tests.file_faults import under_faults
from tests.pangu_sigma.domains.test_expand_gates import (
    gated,  # noqa: F401 - the run of a learned gate
    new_domain,
)

# The least number of file operations: the whole change was gone through. Each takes some tenths of a second.
CHANGES = {"add": 30, "add-out": 30, "add-model": 30, "rename": 20, "resize": 20, "merge": 10}


def killed_everywhere(run, tmp_path, change: str, text, every: int) -> dict[str, int]:
    program = "tests.pangu_sigma.domains.killed_at_every_write"
    done = under_faults(program, run, tmp_path / "scratch", change, text, every)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("change", [*(pytest.param(name, marks=pytest.mark.slow) for name in CHANGES), "remove"])
def test_a_killed_change_leaves_the_old_family_or_the_new_one(copied_run, medicine, tmp_path, change):
    run = copied_run(8)
    # The text is tokenised once, so that what is gone through is the change.
    add_domain(run, new_domain(medicine, experts=2), out=tmp_path / "first")
    (tmp_path / "scratch").mkdir()
    if change == "add-model":
        shutil.copytree(run, tmp_path / "scratch" / "sibling")
    every = 8 if change == "remove" else 1
    counts = killed_everywhere(run, tmp_path, change, medicine, every)
    assert counts["operations"] == counts["old"] + counts["new"] >= CHANGES.get(change, 64) // every
    assert counts["old"] and (counts["new"] or change in ("merge", "add-out"))


@pytest.mark.slow
def test_a_killed_expansion_leaves_the_old_family_or_the_new_one(gated, medicine, tmp_path):  # noqa: F811
    run = shutil.copytree(gated, tmp_path / "run")
    (tmp_path / "scratch").mkdir()
    counts = killed_everywhere(run, tmp_path, "expand", medicine, 2)
    assert counts["operations"] == counts["old"] + counts["new"] > 40 and counts["old"] and counts["new"]


def test_a_change_killed_before_its_last_write_is_gone_on_from(copied_run):
    """The run's configuration is still the one from before: a resume with it goes on from the changed model."""
    run = copied_run(8)
    remove_domain(run, "law")
    before = (run / "config.yaml").read_text()
    rename_domain(run, "poems", "verse")
    assert stale_config(run, find_latest(run)[0]) is None
    (run / "config.yaml").write_text(before)
    assert stale_config(run, find_latest(run)[0]) == before
    train(load_config(run / "config.yaml"), resume=True)
    checkpoint, _ = find_latest(run)
    assert (checkpoint.step, checkpoint.domains) == (12, ("code", "verse"))
    assert (run / "config.yaml").read_text() == checkpoint.config_text
    events = [json.loads(line).get("message", "") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("the process of 'rename poems to verse' ended before it was" in event for event in events)
