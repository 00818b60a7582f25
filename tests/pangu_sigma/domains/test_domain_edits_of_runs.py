"""What a change of domains does to a run's files: everything of the others stays, and a mistake changes nothing."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable

import numpy as np
import pytest

from extract.extraction_job import extract, plan
from pangu_sigma.checkpoint import find_latest, open_checkpoint
from pangu_sigma.checkpoint.folder_locks import lock_run_folder
from pangu_sigma.config import load_config
from pangu_sigma.config.domain_edits import FollowUpTraining
from pangu_sigma.domains.add_domain import NewDomain, add_domain, add_model
from pangu_sigma.domains.checkpoint_editor import sampler_state
from pangu_sigma.domains.list_domains import list_domains
from pangu_sigma.domains.merge_models import merge_models
from pangu_sigma.domains.remove_domain import remove_domain, rename_domain
from pangu_sigma.domains.resize_domain import resize_domain
from pangu_sigma.errors import UserError
from pangu_sigma.evaluation.evaluation_job import evaluate
from pangu_sigma.monitor.metrics_log import read_metrics
from pangu_sigma.report import write_report
from pangu_sigma.trained_model import stored_config
from pangu_sigma.training.job import train
from pangu_sigma.training.schedule import domain_weights
from tests.pangu_sigma.domains.conftest import digests, tensor_digests
from tests.pangu_sigma.training import training_process

STEP = 12
TABLE, UP = "blocks.0.routing", "blocks.0.experts.up.weight"


def new_domain(medicine, **changes) -> NewDomain:
    return NewDomain(**{"name": "medicine", "data": (str(medicine),), "experts": 3, **changes})


def folder(run, step: int = STEP):
    return training_process.checkpoint(run, step)


def test_adding_keeps_every_other_file(copied_run, medicine):
    run = copied_run(STEP)
    before, earlier = digests(folder(run)), digests(folder(run, 10))
    done = add_domain(run, new_domain(medicine))
    after = digests(folder(run))
    own = {"domains/medicine.safetensors", "optimizer/domains/medicine.safetensors"}
    assert after.keys() - before.keys() == own and not before.keys() - after.keys()
    # Only what lists the domains is another file: configuration, state, manifest and the probe of all domains.
    written = {"config.yaml", "state.json", "manifest.json", "probe.safetensors"}
    assert {name for name in before if before[name] != after[name]} == written
    assert digests(folder(run, 10)) == earlier
    assert done.checkpoint.domains == ("code", "law", "poems", "medicine")
    checkpoint, messages = find_latest(run)
    assert checkpoint.path == folder(run) and not messages and checkpoint.coverage["blocks.0"]["medicine"] == 3
    checkpoint.verify()
    assert load_config(run / "config.yaml") == stored_config(checkpoint)
    assert set(checkpoint.probe()) == set(checkpoint.domains)


def test_a_new_domain_begins_as_it_was_asked(copied_run, medicine, tmp_path):
    run = copied_run(STEP)
    old = open_checkpoint(folder(run)).load()
    experts = np.concatenate([old[f"domains.{name}.{UP}"] for name in ("code", "law", "poems")])

    def begun(init: str, experts: int = 3) -> dict[str, np.ndarray]:
        out = tmp_path / f"{init.partition(':')[0]}{experts}"
        loaded = add_domain(run, new_domain(medicine, init=init, experts=experts), out=out).checkpoint.load()
        prefix = "domains.medicine."
        return {name.removeprefix(prefix): t for name, t in loaded.items() if name.startswith(prefix)}

    mean = begun("mean")
    np.testing.assert_array_equal(mean[UP], np.stack([experts.mean(0, dtype=np.float64).astype(np.float32)] * 3))
    assert sorted(set(mean[TABLE].tolist())) == [0, 1, 2] and np.ptp(np.bincount(mean[TABLE])) <= 1
    drawn = begun("random")
    assert 0.5 < drawn[UP].std() / 0.02 < 2 and not np.array_equal(drawn[UP][0], drawn[UP][1])
    assert not drawn["blocks.0.experts.up.bias"].any()
    same = begun("from:code", 2)
    for name in (TABLE, UP, "blocks.0.experts.down.bias"):
        np.testing.assert_array_equal(same[name], old[f"domains.code.{name}"])
    larger = begun("from:code", 5)
    origin = {expert: int(np.flatnonzero((old[f"domains.code.{UP}"] == w).all((1, 2)))[0])
              for expert, w in enumerate(larger[UP])}  # fmt: skip
    assert [origin[int(e)] for e in larger[TABLE]] == old[f"domains.code.{TABLE}"].tolist()
    assert len(set(larger[TABLE].tolist())) == 5
    for tensors in (mean, drawn, larger):
        states = {name: tensor for name, tensor in tensors.items() if ".optimizer." in "." + name}
        assert states and not any(tensor.any() for tensor in states.values())


def test_a_new_domain_begins_from_the_nearest(copied_run, corpora, tmp_path):
    run = copied_run(STEP)
    matrix = evaluate(run).matrix
    for name in ("code", "law"):
        twin = new_domain(corpora / f"{name}.jsonl", name="twin", init="nearest")
        checkpoint = add_domain(run, twin, out=tmp_path / name).checkpoint
        nearest = min(matrix[name], key=matrix[name].get)
        assert checkpoint.state["domain_changes"][-1]["change"] == f"add twin (nearest, from:{nearest})"
        asked = new_domain(corpora / f"{name}.jsonl", name="twin", init=f"from:{nearest}")
        other = add_domain(run, asked, out=tmp_path / f"{name}-asked").checkpoint
        assert tensor_digests(checkpoint) == tensor_digests(other)


def test_a_new_domain_begins_as_a_dense_models_networks(copied_run, small_yaml, medicine, tmp_path):
    """Every expert is the feed-forward network of its layer in the dense model, tables are drawn, and it goes on."""
    run, dense = copied_run(STEP), tmp_path / "dense"
    changes = ["model.sparse={layers: 0}", "train.steps=2", "train.phases=[]", "evaluate.every=0", f"run.dir={dense}"]
    train(load_config(small_yaml, changes))
    add_domain(run, new_domain(medicine, init=f"dense:{dense}"), follow_up=FollowUpTraining("medicine", 1))
    networks, tensors = (open_checkpoint(path).load() for path in (folder(dense, 2), folder(run)))
    for name in ("up.weight", "up.bias", "down.weight", "down.bias"):
        experts = tensors[f"domains.medicine.blocks.0.experts.{name}"]
        assert len(experts) == 3
        for expert in experts:
            np.testing.assert_array_equal(expert, networks[f"blocks.0.feed_forward.{name}"])
    assert sorted(set(tensors[f"domains.medicine.{TABLE}"].tolist())) == [0, 1, 2]
    train(load_config(run / "config.yaml"), resume=True)
    assert find_latest(run)[0].step == STEP + 1


def test_training_ahead_is_the_runs_plan(copied_run, medicine):
    run = copied_run(8)
    add_domain(run, new_domain(medicine), follow_up=FollowUpTraining("medicine", 6, shared="frozen", replay=0.0))
    train = load_config(run / "config.yaml").train
    assert train.steps == 14 and [phase.steps for phase in train.phases] == [4, 4, 6]
    last = train.phases[-1]
    assert (last.weights, last.shared, last.domains, last.restart) == (
        {"medicine": 1.0}, "frozen", ("medicine",), True)  # fmt: skip


def test_replay_draws_the_others_by_their_weights(copied_run, medicine):
    run = copied_run(8)
    add_domain(run, new_domain(medicine), follow_up=FollowUpTraining("medicine", 6, shared="train", replay=0.3))
    config = load_config(run / "config.yaml")
    last = config.train.phases[-1]
    assert (last.weights, last.replay, last.old) == ({"medicine": 1.0}, 0.3, ("code", "law", "poems"))
    assert domain_weights(config, 9) == pytest.approx({"medicine": 0.7, "code": 0.1, "law": 0.1, "poems": 0.1})
    assert last.shared == "train" and last.domains is None


def test_what_a_stream_left_over_goes_with_its_domain():
    cursors = {"code": {"cursor": 4}, "law": {"cursor": 1}}
    state = {"sampler": {"byte": 7, "tails": {"code": [1, 2], "law": [3]}, "domains": cursors}, "step": 2}
    changed = sampler_state(state, {"code": "code", "statutes": "law", "medicine": "medicine"})
    cursors = {"code": {"cursor": 4}, "statutes": {"cursor": 1}}
    sampler = {"byte": 7, "tails": {"code": [1, 2], "statutes": [3]}, "domains": cursors}
    assert changed == {"sampler": sampler, "step": 2}


def test_removing_and_renaming_keep_the_others(copied_run):
    run = copied_run(STEP)
    before = tensor_digests(open_checkpoint(folder(run)))
    rename_domain(run, "poems", "verse")
    renamed = open_checkpoint(folder(run))
    assert renamed.domains == ("code", "law", "verse") and renamed.state["sampler"]["domains"].keys() == {
        "code", "law", "verse"}  # fmt: skip
    verse = {name.replace("domains.poems.", "domains.verse."): digest for name, digest in before.items()}
    assert tensor_digests(renamed) == verse
    remove_domain(run, "verse")
    left = open_checkpoint(folder(run))
    assert tensor_digests(left) == {name: d for name, d in before.items() if not name.startswith("domains.poems.")}
    assert set(left.probe()) == {"code", "law"} and load_config(run / "config.yaml").domain_names == ("code", "law")
    assert [record["change"] for record in left.state["domain_changes"]] == ["rename poems to verse", "remove verse"]


def test_add_and_remove_give_the_checkpoint_back(copied_run, medicine):
    run = copied_run(STEP)
    before, files = open_checkpoint(folder(run)), digests(folder(run))
    state = before.state
    add_domain(run, new_domain(medicine), follow_up=FollowUpTraining("medicine", 4, shared="frozen", replay=0.0))
    remove_domain(run, "medicine")
    after = open_checkpoint(folder(run))
    assert tensor_digests(after) == tensor_digests(before) and after.coverage == before.coverage
    assert {name for name, digest in digests(folder(run)).items() if files[name] != digest} == {
        "state.json", "manifest.json"}  # fmt: skip
    assert after.state["sampler"] == state["sampler"]
    assert stored_config(after).train.steps == STEP


def test_a_grown_group_is_the_same_function(copied_run):
    run = copied_run(STEP)
    before = open_checkpoint(folder(run)).load()
    resize_domain(run, "code", 5)
    grown = open_checkpoint(folder(run))
    after = grown.load()
    assert grown.coverage["blocks.0"] == {"code": 5, "law": 1, "poems": 2}
    table, old = after[f"domains.code.{TABLE}"], before[f"domains.code.{TABLE}"]
    for name in ("blocks.0.experts.up.weight", "optimizer.m.blocks.0.experts.up.weight", "optimizer.steps.blocks.0"):
        was, now = before[f"domains.code.{name}"], after[f"domains.code.{name}"]
        assert now.shape == (5, *was.shape[1:])
        np.testing.assert_array_equal(now[table], was[old])
        np.testing.assert_array_equal(now[:2], was)
    # Only tokens of an expert with copies go to a copy; all five have about as many.
    assert np.ptp(np.bincount(table)) <= np.bincount(old).max() // 4
    others = [name for name in before if not name.startswith("domains.code.")]
    assert all(before[name].tobytes() == after[name].tobytes() for name in others)
    resize_domain(run, "law", 2, redraw=True)
    redrawn = open_checkpoint(folder(run)).load([f"domains.law.{TABLE}"])[f"domains.law.{TABLE}"]
    assert np.ptp(np.bincount(redrawn)) <= 1


def test_an_extracted_sub_model_comes_back_in(copied_run, tmp_path):
    run = copied_run(STEP)
    before = tensor_digests(open_checkpoint(folder(run)))
    extract(plan(run, ["law"], tmp_path / "law"), tmp_path / "law", check=False)
    remove_domain(run, "law")
    add_model(run, tmp_path / "law", None)
    after = tensor_digests(open_checkpoint(folder(run)))
    own = {name for name in before if not name.startswith("domains.law.optimizer.")}
    assert {name: after[name] for name in own} == {name: before[name] for name in own}
    assert before.keys() == after.keys()
    add_model(run, folder(run), "poems", name="verse")  # with its moments: the sibling is a checkpoint
    copy = open_checkpoint(folder(run))
    for name in copy.names(domains=["verse"], shared="frozen"):
        entry, origin = (copy.manifest.tensors[n] for n in (name, name.replace(".verse.", ".poems.")))
        assert entry.slices[0].sha256 == origin.slices[0].sha256


def test_models_merge_from_one_parent(copied_run, medicine, tmp_path):
    run = copied_run(STEP)
    one = add_domain(run, new_domain(medicine, init="random"), out=tmp_path / "one")
    remove_domain(run, "law", out=tmp_path / "two")
    done = merge_models([tmp_path / "two", one.checkpoint.path], tmp_path / "merged")
    assert done.checkpoint.domains == ("code", "poems", "law", "medicine")
    parts = tensor_digests(one.checkpoint)
    assert tensor_digests(done.checkpoint) == {name: parts[name] for name in one.checkpoint.names(optimizer=False)}
    done.checkpoint.verify()
    assert [facts.name for facts in list_domains(tmp_path / "merged")] == ["code", "poems", "law", "medicine"]


def test_an_output_leaves_the_run_as_it_is(copied_run, medicine, tmp_path):
    run = copied_run(STEP)
    before = digests(run / "checkpoints")
    done = add_domain(run, new_domain(medicine), out=tmp_path / "new")
    assert digests(run / "checkpoints") == before and done.run_dir == tmp_path / "new"
    checkpoint, _ = find_latest(tmp_path / "new")
    assert checkpoint.step == STEP and "medicine" in checkpoint.domains
    shared = "shared.safetensors"
    assert (checkpoint.path / shared).stat().st_ino == (folder(run) / shared).stat().st_ino
    assert load_config(tmp_path / "new" / "config.yaml").run.dir == str(tmp_path / "new")


def test_an_output_has_the_runs_metrics_up_to_its_step(copied_run, medicine, tmp_path):
    """It can be drawn and listed at once, and its curves go on where the run's were."""
    run, out = copied_run(12), tmp_path / "new"
    add_domain(folder(run, 8), new_domain(medicine), out=out)
    records = [record for record in read_metrics(run) if record["step"] <= 8]
    assert read_metrics(out) == records and records[-1]["step"] == 8
    assert "medicine" in write_report(out).read_text(encoding="utf-8")
    before = [facts.loss for facts in list_domains(folder(run, 8))]
    assert [facts.loss for facts in list_domains(out)] == [*before, None] and None not in before


def test_a_renamed_domain_keeps_its_loss_and_a_new_one_of_its_name_has_none(copied_run, medicine):
    run = copied_run(STEP)
    losses = {facts.name: facts.loss for facts in list_domains(run)}
    rename_domain(run, "poems", "verse")
    rename_domain(run, "verse", "lines")
    add_domain(run, new_domain(medicine, name="poems"))
    assert {facts.name: facts.loss for facts in list_domains(run)} == {
        "code": losses["code"], "law": losses["law"], "lines": losses["poems"], "poems": None}  # fmt: skip


def test_the_list_tells_experts_parameters_tokens_and_losses(copied_run, medicine):
    run = copied_run(STEP)
    add_domain(run, new_domain(medicine))
    code, *_, new = list_domains(run)
    assert code.experts == {"blocks.0": 2} and code.parameters == 2 * (16 * 32 + 32 + 32 * 16 + 16)
    state = open_checkpoint(folder(run)).state["sampler"]["domains"]
    assert code.tokens == 16 * state["code"]["cursor"] > 0
    assert (code.loss_kind, code.loss_step) == ("evaluate", STEP)
    assert code.bytes == (folder(run) / "domains/code.safetensors").stat().st_size
    assert (new.name, new.tokens, new.loss) == ("medicine", 0, None)


Mistake = tuple[Callable, str]
MISTAKES: dict[str, Mistake] = {
    "a name that exists": (lambda run, t: add_domain(run, new_domain(t, name="law")), "already has a domain law"),
    "the name of inference": (lambda run, t: add_domain(run, new_domain(t, name="auto")), "auto is reserved: domain="),
    "renamed to inference": (lambda run, t: rename_domain(run, "law", "auto"), "auto is reserved: domain='auto'"),
    "a bad name": (lambda run, t: add_domain(run, new_domain(t, name="Two words")), "name"),
    "text that is not there": (lambda run, t: add_domain(run, new_domain(t, data=("no.jsonl",))), "does not exist"),
    "a stranger's experts": (lambda run, t: add_domain(run, new_domain(t, init="from:sport")), "no domain of"),
    "fewer than are copied": (lambda run, t: add_domain(run, new_domain(t, init="from:code", experts=1)), "at least 2"),
    "an unknown beginning": (lambda run, t: add_domain(run, new_domain(t, init="zero")), "write from:DOMAIN, nearest"),
    "dense without a model": (lambda run, t: add_domain(run, new_domain(t, init="dense")), "write dense:MODEL"),
    "a sparse model as dense": (
        lambda run, t: add_domain(run, new_domain(t, init=f"dense:{run}")),
        "is no dense model",
    ),
    "an unknown domain removed": (lambda run, t: remove_domain(run, "sport"), "it has code, law, poems"),
    "an unknown domain renamed": (lambda run, t: rename_domain(run, "sport", "games"), "it has code, law, poems"),
    "renamed to another's name": (lambda run, t: rename_domain(run, "law", "code"), "already has a domain code"),
    "renamed to no name": (lambda run, t: rename_domain(run, "law", "no name"), "name"),
    "a group that shrinks": (lambda run, t: resize_domain(run, "code", 2), "can only grow"),
    "a checkpoint, not the run": (lambda run, t: remove_domain(folder(run), "law"), "is one checkpoint"),
    "an output that is full": (lambda run, t: remove_domain(run, "law", out=run), "not empty"),
    "one model to merge": (lambda run, t: merge_models([run], run.parent / "merged"), "name at least two"),
    "replay of the frozen": (
        lambda run, t: FollowUpTraining("medicine", 4, "frozen", 0.5), "no use with shared = frozen",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_changes_nothing(copied_run, medicine, mistake):
    run = copied_run(STEP)
    shutil.rmtree(run / "data", ignore_errors=True)
    before = digests(run)
    call, sentence = MISTAKES[mistake]
    with pytest.raises(UserError, match=re.escape(sentence)) as raised:
        call(run, medicine)
    assert "\n" not in str(raised.value)
    after = {name: digest for name, digest in digests(run).items() if name != ".lock" and not name.startswith("data/")}
    assert after == {name: digest for name, digest in before.items() if name != ".lock"}


def test_the_last_domain_stays(copied_run):
    run = copied_run(STEP)
    remove_domain(run, "law")
    remove_domain(run, "poems")
    before = digests(folder(run))
    with pytest.raises(UserError, match="last domain"):
        remove_domain(run, "code")
    assert digests(folder(run)) == before


def test_unlike_parents_are_refused(copied_run, tmp_path):
    run = copied_run(STEP)
    earlier = folder(run, 10)
    with pytest.raises(UserError, match="differ in .* shared parameters"):
        merge_models([run, earlier], tmp_path / "merged")
    remove_domain(run, "law")
    before = digests(folder(run))
    with pytest.raises(UserError, match="differ in .* shared parameters"):
        add_model(run, earlier, "law")
    assert digests(folder(run)) == before and not (tmp_path / "merged").exists()


def test_two_versions_of_one_domain_do_not_merge(copied_run, tmp_path):
    run = copied_run(STEP)
    resize_domain(run, "law", 2, out=tmp_path / "grown")
    with pytest.raises(UserError, match="both have a domain law, and not the same one"):
        merge_models([run, tmp_path / "grown"], tmp_path / "merged")


def test_a_damaged_file_is_refused_by_name(copied_run):
    run = copied_run(STEP)
    file = folder(run) / "domains" / "code.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.unlink()  # the file is shared with earlier checkpoints
    file.write_bytes(content)
    before = digests(run / "checkpoints")
    with pytest.raises(UserError, match=re.escape(str(file))):
        remove_domain(run, "law")
    assert digests(run / "checkpoints") == before


def test_a_kill_while_writing_leaves_the_old_checkpoint(copied_run, monkeypatch):
    run = copied_run(STEP)
    before = digests(folder(run))

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["pangu_sigma.checkpoint.save_checkpoint"], "move_into_place", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_domain(run, "law")
    assert digests(folder(run)) == before and not list((run / "checkpoints").glob(".tmp*"))


def test_a_resume_with_the_old_configuration_says_where_the_new_one_is(copied_run):
    run = copied_run(STEP)
    shutil.copy(run / "config.yaml", run / "old.yaml")
    remove_domain(run, "law")
    with pytest.raises(UserError, match=f"resume with .*/step-000000{STEP}/config.yaml"):
        train(load_config(run / "old.yaml", [f"run.dir={run}"]), resume=True)


def test_a_run_that_trains_is_not_changed(copied_run):
    run = copied_run(STEP)
    before = digests(folder(run))
    with lock_run_folder(run), pytest.raises(UserError, match="another process is training"):
        remove_domain(run, "law")
    assert digests(folder(run)) == before


def test_a_full_disk_leaves_the_run_as_it_was(copied_run, monkeypatch):
    run = copied_run(STEP)
    before = digests(run / "checkpoints")
    usage = shutil.disk_usage(run)
    monkeypatch.setattr("pangu_sigma.checkpoint.disk_space.shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="the checkpoint is as it was"):
        remove_domain(run, "law")
    assert digests(run / "checkpoints") == before


def test_the_record_is_json(copied_run):
    run = copied_run(STEP)
    remove_domain(run, "law")
    assert json.loads((folder(run) / "state.json").read_text())["domain_changes"] == [
        {"step": STEP, "change": "remove law"}
    ]
