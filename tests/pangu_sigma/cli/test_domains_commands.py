"""What the commands `domains …` say at their end."""

from __future__ import annotations

from typer.testing import CliRunner

from pangu_sigma.cli import app


def test_a_changed_run_that_has_no_step_ahead_proposes_one_way_to_train_on(finished_run, tmp_path):
    out = tmp_path / "renamed"
    done = CliRunner().invoke(
        app, ["domains", "rename", str(finished_run), "--name", "law", "--to", "laws", "--out", str(out)]
    )
    assert done.exit_code == 0 and "No step lies ahead." in done.output
    (proposed,) = (line for line in done.output.splitlines() if "train " in line)
    assert proposed == f"  pangu-sigma train {out}/config.yaml run.init_from={out} run.dir={out}-trained"
