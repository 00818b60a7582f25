"""Fine-tuning as a job: it is a run like any other, of whatever model it is given."""

import json
import shlex
import shutil
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from extract.extraction_job import extract, plan
from pangu_sigma.checkpoint import open_checkpoint
from pangu_sigma.cli import app
from pangu_sigma.config import load_config
from pangu_sigma.errors import UserError
from pangu_sigma.evaluation.evaluation_job import evaluate
from pangu_sigma.finetuning.finetuning_job import adapt
from pangu_sigma.finetuning.finetuning_task import _frozen
from pangu_sigma.monitor.metrics_log import read_metrics
from pangu_sigma.report import write_report
from pangu_sigma.trained_model import stored_config
from pangu_sigma.training.job import train
from tests.pangu_sigma.finetuning.conftest import BASE, LENGTH, answers, write_jsonl
from tests.pangu_sigma.training.training_process import assert_equal_checkpoints, assert_refused, checkpoint, command

KEEP_ONE = ("checkpoint.every=1", "checkpoint.keep=1")


def evaluations(run) -> list[dict]:
    return [record for record in read_metrics(run) if record["kind"] == "evaluate"]


def test_sft_learns_the_answers_and_a_resumed_run_ends_with_the_same_bytes(taught, adaptation_file, tmp_path):
    file = adaptation_file("sft")
    done = command("sft", taught, file, "run.dir=whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "law: 3" in done.stderr and "examples to learn from" in done.stderr and "training: 4/4" in done.stderr
    losses = [record["losses"]["law"] for record in evaluations(tmp_path / "whole")]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.05
    part = ["sft", str(taught), str(file), f"run.dir={tmp_path / 'parts'}", "train.stop_at=2"]
    stopped = CliRunner().invoke(app, part)
    assert shlex.join(["pangu-sigma", *part, "train.stop_at=null", "--resume"]) in stopped.stderr, stopped.stderr
    # Its own saves delete the checkpoint that it resumed from.
    adapt(tmp_path / "gone", file, "sft", (f"run.dir={tmp_path / 'parts'}", *KEEP_ONE), resume=True)
    assert [path.name for path in (tmp_path / "parts/checkpoints").iterdir()] == ["step-00000004"]
    assert_equal_checkpoints(checkpoint(tmp_path / "whole", 4), checkpoint(tmp_path / "parts", 4))


def test_dpo_prefers_the_chosen_answers_and_resumes_to_the_same_bytes(taught, adaptation_file, tmp_path):
    file = adaptation_file("dpo", beta=0.5)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    adapt(taught, file, "dpo", (f"run.dir={whole}", "model.dropout=0", "model.attention.dropout=0"))
    first, *_, last = evaluations(whole)
    assert first["losses"]["law"] == pytest.approx(0.693147, abs=1e-5) and last["losses"]["law"] < 0.68
    assert last["figures"]["preference_accuracy"] > 0.5 and last["figures"]["preference_margin"] > 0
    assert "law" in write_report(whole).read_text(encoding="utf-8")
    no_dropout = ("model.dropout=0", "model.attention.dropout=0")
    tree, model = tmp_path / "tree", tmp_path / "tree/models/taught"
    shutil.copytree(taught, model)
    parts = tree / "runs/parts"
    adapt(model, file, "dpo", (f"run.dir={parts}", "train.stop_at=2", *no_dropout))
    model.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"the reference model of this run was {checkpoint(model, 2)}, which is gone"):
        adapt(model, file, "dpo", (f"run.dir={parts}", *no_dropout), resume=True)
    (tmp_path / "elsewhere").rename(model)
    # Moved together, the run finds its reference by itself: no model is where the command says.
    moved = tree.rename(tmp_path / "moved")
    adapt(model, file, "dpo", (f"run.dir={moved / 'runs/parts'}", *no_dropout, *KEEP_ONE), resume=True)
    own, other = checkpoint(whole, 4), checkpoint(moved / "runs/parts", 4)
    for path, reference in ((own, taught), (other, moved / "models/taught")):
        state = json.loads((path / "state.json").read_text())
        kept = state["reference"].pop("path")
        assert kept.startswith("..") and (path.parents[1] / kept).resolve() == checkpoint(reference, 2).resolve()
        (path / "state.json").write_text(json.dumps(state))
    assert_equal_checkpoints(own, other)
    # metrics.jsonl names no folder but from the run's own.
    text = (moved / "runs/parts/metrics.jsonl").read_text(encoding="utf-8")
    assert '"path": "checkpoints/step-00000004"' in text and str(tmp_path) not in text and "../../models" in text


def test_a_copy_of_the_reference_may_be_named_instead(taught, tmp_path):
    (copy,) = ((shutil.copytree(taught, tmp_path / "copy") / "checkpoints").iterdir())
    frozen = open_checkpoint(copy)
    for kept in ("gone", str(tmp_path / "gone")):  # runs of earlier versions keep an absolute path
        state = {"reference": {"path": kept, "sha256": frozen.sha256}}
        start = SimpleNamespace(
            initial_model=None, tokenizer_checkpoint=SimpleNamespace(state=state),
            config=SimpleNamespace(run=SimpleNamespace(dir=str(tmp_path))),
        )  # fmt: skip
        assert _frozen(start, copy).path == copy
        with pytest.raises(UserError, match=f"was {tmp_path / 'gone'}, which is gone or changed: put it back"):
            _frozen(start, tmp_path / "nothing")


def test_a_sub_model_learns_with_its_shared_parameters_frozen_and_its_parents_domains_keep_every_bit(
    taught, adaptation_file, tmp_path
):
    file = adaptation_file("sft")
    phases = 'train.phases=[{shared: false, domains: [law]}]'
    run = adapt(taught, file, "sft", (f"run.dir={tmp_path / 'run'}", "adapt.examples.code.weight=0", phases)).run_dir
    before, after = (open_checkpoint(checkpoint(path, step)) for path, step in ((taught, 2), (run, 4)))
    names = before.names(optimizer=False)
    old, new = before.load(names), after.load(names)
    changed = {name for name in names if old[name].tobytes() != new[name].tobytes()}
    assert changed and all(name.startswith("domains.law.blocks.0.experts.") for name in changed)
    # What it was trained on is still what it is measured on, and a domain can be cut out.
    assert set(evaluate(run).losses) == {"code", "law", "poems"}
    out = tmp_path / "law"
    sub = extract(plan(run, ["law"], out), out).model
    assert stored_config(sub).adapt is None
    write_jsonl(tmp_path / "law.jsonl", answers("law", 12))
    examples = [{"name": "law", "data": [str(tmp_path / "law.jsonl")]}]
    values = {**BASE, "adapt": {"template": "plain", "examples": examples}}
    (tmp_path / "sub.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    again = adapt(out, tmp_path / "sub.yaml", "sft", (f"run.dir={tmp_path / 'again'}", "train.stop_at=1")).run_dir
    assert checkpoint(again, 1).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("router", ["olmoe", "hash", "expert_choice"])
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_models_of_other_routers_adapt(small_yaml, adaptation_file, tmp_path, router, objective):
    size = [f"model.positions={LENGTH}", f"data.sequence_length={LENGTH}", "train.steps=1", "train.phases=[]"]
    gate = [f"model.sparse.router={router}", "model.sparse.resample=false", "schedule.warmup_steps=0"]
    if router == "olmoe":
        parts = ["norm=rmsnorm", "position=rope", "feed_forward=swiglu", "activation=silu", "biases=false"]
        parts += ["head=untied", "query_layer=none", "attention.qk_norm=true", "sparse.top_k=2"]
        gate += [f"model.{part}" for part in parts]
    model = train(load_config(small_yaml, [f"run.dir={tmp_path / 'model'}", *size, *gate, "evaluate.every=0"]))
    run = adapt(model.run_dir, adaptation_file(objective), objective, (f"run.dir={tmp_path / 'run'}",)).run_dir
    # Of what it learns from: four steps on random words say nothing of other words.
    losses = [record["loss"] for record in read_metrics(run) if record["kind"] == "train"]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert {line["step"] for line in evaluations(run)} == {0, 2, 4}


def test_mistakes_are_told_in_a_sentence(taught, adaptation_file, tmp_path):
    sft, dpo = adaptation_file("sft"), adaptation_file("dpo")
    assert_refused(command("sft", taught, dpo.rename(tmp_path / "d.yaml"), "adapt.examples.law.data=[gone.jsonl]",
                           cwd=tmp_path), "the file", "gone.jsonl does not exist")  # fmt: skip

    def refused(match, *overrides, file=sft, objective="sft"):
        with pytest.raises(UserError, match=match):
            adapt(taught, file, objective, (f"run.dir={tmp_path / 'run'}", *overrides))

    refused("is no domain of the model: it has code, law, poems", "adapt.examples.law.name=music")
    refused("is another model: model.ffn is 32 there and 64 here", "model.ffn=64")
    refused("this job runs in one process: set parallel={}", "parallel={data: 2}")
    refused("adapt.betta is not a known key: the nearest known key is adapt.beta", "adapt.betta=1")
    refused("train.phases.0.weights.poems draws poems", "train.phases=[{weights: {poems: 1}}]")
    refused("evaluate.every = 2 needs held-out examples", "adapt.heldout_fraction=0")
    values = yaml.safe_load(sft.read_text())
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump({**values, "adapt": {**values["adapt"], "objective": "dpo"}}))
    refused("adapt.objective is dpo: run it with pangu-sigma dpo", file=tmp_path / "dpo.yaml")
    (tmp_path / "none.yaml").write_text(yaml.safe_dump(BASE))
    refused("the section adapt is missing", file=tmp_path / "none.yaml")
    refused("the field 'chosen' is missing", file=sft, objective="dpo")
    with pytest.raises(UserError, match="adapt fine-tunes a trained model: run it with pangu-sigma sft MODEL"):
        section = "adapt={objective: sft, examples: [{name: law, data: [a]}]}"
        train(load_config(checkpoint(taught, 2) / "config.yaml", ["run.init_from=x", section]))
