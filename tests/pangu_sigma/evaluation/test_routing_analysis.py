"""`pangu-sigma analyze` on real runs: of tables, whose routing never changes, and of a learned gate."""

import csv
import json
import shutil

import numpy as np
import pytest

from tests.pangu_sigma.training import training_process


@pytest.fixture(scope="module")
def table_run(finished_run, tmp_path_factory):
    run = tmp_path_factory.mktemp("tables") / "run"
    shutil.copytree(finished_run, run)
    return run


@pytest.fixture(scope="module")
def gate_run(small_yaml, tmp_path_factory):
    """A run of OLMoE's gate: 2 of 5 experts."""
    folder = tmp_path_factory.mktemp("gate")
    done = training_process.command(
        "train", small_yaml, f"run.dir={folder / 'run'}", "model.sparse.router=olmoe", "model.sparse.top_k=2",
        "model.sparse.resample=false", "checkpoint.every=6", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "run"


def analyze(run, *more: str) -> dict:
    done = training_process.command("analyze", run, "--tokens", "256", "--json", *more, cwd=run)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_tables_are_saturated_from_the_first_step_and_a_domain_meets_its_own_group_alone(table_run):
    result = analyze(table_run)
    (layer,) = result["layers"].values()
    assert {checkpoint["all"] for checkpoint in layer["saturation"]} == {1.0}
    assert [checkpoint["step"] for checkpoint in layer["saturation"]] == result["steps"]
    assert layer["vocabulary_specialisation"] < 1.0 or len(layer["domain_specialisation"]) == 1
    share = {name: np.array(values) for name, values in layer["domain_specialisation"].items()}
    assert share["code"][2:].sum() == share["law"][[0, 1, 3, 4]].sum() == share["poems"][:3].sum() == 0.0
    assert all(values.sum() == pytest.approx(1.0) for values in share.values())
    assert layer["entropy"]["law"] == layer["imbalance"]["law"] == 1.0
    assert layer["coactivation"] == []
    assert np.sum(layer["load"]) == pytest.approx(1.0)


def test_the_shares_of_a_table_are_what_its_tensor_says(table_run):
    """Another path to the same figure: the checkpoint's table and the text's own tokens."""
    from pangu_sigma.model.state_dict import stored_tables
    from pangu_sigma.trained_model import load_trained, stored_weights

    trained = load_trained(table_run)
    tables = stored_tables(stored_weights(trained.checkpoint))
    heldout = trained.corpus().heldout_to_measure()["code"]
    ids, mask = heldout.batch(0, len(heldout))
    tokens = ids[:, :-1].reshape(-1)[mask.reshape(-1) > 0][:256]
    (layer_name,) = tables
    expected = np.bincount(tables[layer_name]["code"][tokens], minlength=2) / len(tokens)
    layers = json.loads((table_run / "analysis.json").read_text())["layers"]
    specialisation = layers[layer_name]["domain_specialisation"]["code"]
    np.testing.assert_allclose(specialisation[:2], expected, atol=1e-12)


def test_a_learned_gate(gate_run):
    result = analyze(gate_run)
    (layer,) = result["layers"].values()
    assert result["router"] == "olmoe" and result["steps"] == [6, 12]
    assert layer["saturation"][-1]["all"] == 1.0 and 0.0 <= layer["saturation"][0]["all"] <= 1.0
    for shares in layer["domain_specialisation"].values():
        assert np.sum(shares) == pytest.approx(2.0)
    assert all(0.0 < pair["share"] <= 1.0 for pair in layer["coactivation"])
    assert all(0.0 <= value <= 1.0 for value in layer["entropy"].values())


def test_tables_figures_and_report(gate_run):
    done = training_process.command("analyze", gate_run, "--tokens", "128", cwd=gate_run)
    assert "The analysis is in analysis. Next:" in done.stderr
    assert done.returncode == 0, done.stderr
    assert "saturation at 6" in done.stdout
    rows = list(csv.DictReader((gate_run / "analysis" / "domains.csv").open(encoding="utf-8")))
    assert len(rows) == 3 * 5 and {row["domain"] for row in rows} == {"code", "law", "poems"}
    page = (gate_run / "report.html").read_text(encoding="utf-8")
    assert "Co-activation" in page and "Router saturation" in page


@pytest.mark.parametrize(
    ("path", "sentence"), [("nowhere", "does not exist"), ("checkpoint", "name the folder of a run")]
)
def test_what_is_no_run_is_refused(table_run, path, sentence):
    named = {"nowhere": table_run / "nowhere", "checkpoint": training_process.checkpoint(table_run, 12)}[path]
    done = training_process.command("analyze", named, cwd=table_run)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
