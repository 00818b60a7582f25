"""`import pangu_sigma as ps`: what stands for a model or a run, and functions that make a model of others."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from typer.testing import CliRunner

import pangu_sigma as ps
from pangu_sigma.api_arguments import folder, run_folder
from pangu_sigma.cli import app
from pangu_sigma.serving.model_server import ModelServer
from pangu_sigma.serving.server_settings import ServerSettings
from pangu_sigma.training.training_result import TrainingResult


@pytest.fixture(scope="module")
def results(finished_run, tmp_path_factory):
    """A result of each kind that lies in a folder, and the folders of its model and of its run."""
    out = tmp_path_factory.mktemp("results")
    pieces = out / "pieces.txt"
    pieces.write_text("zyzzyva", encoding="utf-8")
    trained, model = TrainingResult.of(finished_run), ps.load(finished_run)
    edited = ps.remove_domain(finished_run, "law", out=out / "edited")
    extracted = ps.extract(finished_run, "code", out / "code", verify=False)
    extended = ps.extend_vocabulary(model, out / "extended", pieces=pieces)
    server = ModelServer(finished_run, ServerSettings())
    return [
        (trained, finished_run, finished_run), (model, model.path, finished_run), (server, finished_run, finished_run),
        (edited, out / "edited", out / "edited"), (extracted, out / "code", out / "code"),
        (extended, out / "extended", out / "extended"),
    ]  # fmt: skip


# Every function that takes a model or a run, called with what stands for one.
TAKES_A_MODEL = {
    "load": lambda place, out: ps.load(place),
    "sft": lambda place, out: ps.sft(place, "sft.yaml"),
    "dpo": lambda place, out: ps.dpo(place, "dpo.yaml"),
    "evaluate": lambda place, out: ps.evaluate(place),
    "evaluate_tasks": lambda place, out: ps.evaluate_tasks(place, "a.jsonl"),
    "analyze": lambda place, out: ps.analyze(place),
    "extract": lambda place, out: ps.extract(place, "code", out),
    "export": lambda place, out: ps.export(place, "hf", out),
    "list_domains": lambda place, out: ps.list_domains(place),
    "add_domain": lambda place, out: ps.add_domain(place, "new", "a.txt"),
    "add_domain_of_model": lambda place, out: ps.add_domain_of_model(out, place, "code"),
    "remove_domain": lambda place, out: ps.remove_domain(place, "code"),
    "rename_domain": lambda place, out: ps.rename_domain(place, "code", "programs"),
    "resize_domain": lambda place, out: ps.resize_domain(place, "code", 4),
    "merge_models": lambda place, out: ps.merge_models([place, place], out),
    "upcycle": lambda place, out: ps.upcycle(place, {}, out),
    "extend_vocabulary": lambda place, out: ps.extend_vocabulary(place, out, pieces="a.txt"),
    "serve": lambda place, out: ps.serve(place),
    "read_metrics": lambda place, out: ps.read_metrics(place),
    "write_report": lambda place, out: ps.write_report(place),
}


def test_a_result_stands_for_its_model_and_for_its_run(results):
    for result, model_folder, run in results:
        assert (folder(result), run_folder(result)) == (model_folder, run) == (Path(result), run)
        assert ps.list_domains(result) == ps.list_domains(model_folder)
        assert len(repr(result)) < 250 and str(model_folder) in repr(result)


@pytest.mark.parametrize("function", TAKES_A_MODEL)
def test_what_lies_in_no_folder_is_told_by_every_function(function, tmp_path):
    measured = ps.DomainEvaluation(3, {"code": 1.23456}, {}, {}, {}, {}, {})
    with pytest.raises(ps.UserError, match="^a DomainEvaluation stands for no folder: give a path, or a result"):
        TAKES_A_MODEL[function](measured, tmp_path / "out")
    assert repr(measured) == "DomainEvaluation(step=3, losses={'code': 1.235})"


def test_every_function_of_a_model_is_among_these():
    named = {name for name in ps.__all__ if {"model", "run", "dense", "models"} & _arguments(name)}
    assert named - {"import_model"} == set(TAKES_A_MODEL)


def _arguments(name: str) -> set[str]:
    return set(inspect.signature(getattr(ps, name)).parameters) if name[0].islower() and name[0] != "_" else set()


def test_an_error_speaks_of_arguments_in_python_and_of_flags_on_the_command_line(finished_run, tmp_path):
    words = ["resize", str(finished_run), "--name", "code", "--experts", "1"]
    with pytest.raises(ps.UserError, match="set experts to more than 2$"):
        ps.resize_domain(finished_run, "code", 1)
    assert CliRunner().invoke(app, ["domains", *words]).stderr.endswith("set --experts to more than 2\n")
    with pytest.raises(ps.UserError, match="add resume=True or set run.dir$"):
        ps.train(finished_run / "config.yaml")
    done = CliRunner().invoke(app, ["train", str(finished_run / "config.yaml")])
    assert done.stderr.endswith("add --resume or set run.dir\n")


def test_conversions_are_functions(finished_run, tmp_path):
    for wrong, sentence in (
        (lambda: ps.import_model(tmp_path, "gguf", tmp_path / "out"), "^format='gguf' is unknown: choose one of hf"),
        (lambda: ps.import_model(tmp_path, "hf", tmp_path / "out", heads=4), "^heads is not for hf: leave it out"),
        (lambda: ps.import_model(tmp_path, "pangu-alpha", tmp_path / "out"), "^tokenizer is missing"),
        (lambda: ps.import_model(tmp_path, "hf", tmp_path / "out"), "config.json is not there"),
        (lambda: ps.import_model(tmp_path, "mindformers", tmp_path / "out"), "holds no checkpoint of MindFormers"),
        (lambda: ps.extend_vocabulary(finished_run, tmp_path / "out"), r"\(pieces\) .* \(tokenizer\): give one"),
        (lambda: ps.extend_vocabulary(finished_run, tmp_path / "out", pieces="a", initial="zero"), "initial='zero'"),
        (lambda: ps.upcycle(finished_run, {}, tmp_path / "out", noise=-1.0), r"^noise=-1.0 is no share"),
    ):
        with pytest.raises(ps.UserError, match=sentence):
            wrong()
    assert not (tmp_path / "out").exists()
