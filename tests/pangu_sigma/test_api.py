"""`import pangu_sigma as ps`: jobs as functions, in one process and any thread, and what a model in memory computes."""

from __future__ import annotations

import gc
import json
import logging
import math
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import pangu_sigma as ps
from pangu_sigma.checkpoint import open_checkpoint
from pangu_sigma.generation import Request, Sampling, prompt_ids
from pangu_sigma.generation.domain_inference import token_log_probabilities
from pangu_sigma.generation.engine import Engine
from pangu_sigma.generation.prompts import Prompt
from pangu_sigma.plan.cluster_plan import plan as cluster_plan
from pangu_sigma.plan.hardware import Hardware
from pangu_sigma.tensor_names import is_routing
from pangu_sigma.trained_model import load_trained
from parallel.comm.stop_signals import STOP_SIGNALS

# One sparse layer, which compiles fast; values as Python has them.
FAST = {
    "model.layers": 1, "model.query_layer": "none", "train.steps": np.int64(2), "train.phases": [],
    "train.gradient_accumulation_steps": 1, "schedule.warmup_steps": 0, "evaluate.every": 2,
    "checkpoint.every": 0, "run.tensorboard": False, "data.max_domains_per_batch": None,
}  # fmt: skip
GREEDY = {"max_tokens": 6, "temperature": 0.0}


def test_importing_takes_less_than_a_fifth_of_a_second_and_loads_nothing_heavy():
    command = [sys.executable, "-c", "import pangu_sigma, sys; print(*sys.modules)"]
    seconds, modules = math.inf, ""
    for _ in range(5):
        began = time.perf_counter()
        modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds = min(seconds, time.perf_counter() - began)
    assert seconds < 0.2
    assert not {"numpy", "pydantic", "mindspore", "yaml", "typer"} & set(modules.split())


def test_every_name_is_there_and_stays_what_it_is():
    assert ps.load_config is ps.load_config and issubclass(ps.UserError, ValueError)
    for module in ("training.job", "evaluation.evaluation_job", "serving.server", "report"):
        import_module(f"pangu_sigma.{module}")
    values = {name: getattr(ps, name) for name in ps.__all__}
    assert all(callable(value) for name, value in values.items() if name != "__version__")
    assert set(ps.__all__) == set(dir(ps)) and all(getattr(ps, name) is value for name, value in values.items())
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        ps.trian  # noqa: B018


def test_overrides_are_python_values(small_yaml, tmp_path):
    config = ps.load_config(
        small_yaml, {"run.dir": tmp_path / "run", "train.steps": np.int32(7), "domains.law.weight": 0.25,
                     "train.phases": ({"steps": 3, "weights": {"law": 1}}, {}), "optimizer.learning_rate": 1e-05,
                     "train.stop_at": None},
    )  # fmt: skip
    assert config.run.dir == str(tmp_path / "run") and config.train.steps == 7
    assert config.domains[1].weight == 0.25 and config.optimizer.learning_rate == 1e-5
    assert [phase.steps for phase in config.train.phases] == [3, 4]
    assert ps.load_config(config) == config and ps.load_config(config.to_dict()) == config
    assert ps.load_config(config, {"train.steps": 9, "train.phases": []}).schedule.decay_steps == 9
    with pytest.raises(ps.UserError, match="the nearest known key is train.steps"):
        ps.load_config(small_yaml, {"train.stepz": 5})
    with pytest.raises(ps.UserError, match="override of train.steps holds what no configuration can hold"):
        ps.load_config(small_yaml, {"train.steps": object()})
    with pytest.raises(ps.UserError, match="give a mapping"):
        ps.load_config(small_yaml, "train.steps=9")


def test_a_configuration_for_ones_own_text_is_written(corpora, tmp_path):
    made = ps.init_config(tmp_path / "mine", [corpora / "code.jsonl", corpora / "law.jsonl"])
    assert ps.load_config(made).domain_names == ("code", "law") and made.documents == {"code": 80, "law": 80}
    assert [line.split()[0] for line in made.summary] == ["builds", "trains"]


def live(small_yaml: Path, folder: Path, verify: bool = True) -> None:
    """Train, use and extract a model, and train again; `verify`: compare logits too, which costs graphs."""
    first = ps.train(small_yaml, {**FAST, "run.dir": folder / "first"})
    assert (first.step, first.steps, first.finished) == (2, 2, True)
    assert set(first.losses) == {"code", "law", "poems"} == set(first.unigram)
    assert first.parameter_counts.total > first.parameter_counts.shared
    assert first.metrics("evaluate")[-1]["losses"] == first.losses and len(first.metrics()) == 2
    model = ps.load(first)
    text = model.generate("def return", domain="code", **GREEDY)
    extraction = ps.extract(first, "code", folder / "code", verify=verify)
    sub_model = ps.load(extraction)
    assert sub_model.domains == ("code",) and sub_model.num_parameters == extraction.num_parameters
    assert extraction.parent_parameters == model.num_parameters
    if verify:
        assert extraction.verification is not None and extraction.verification.largest_logit_difference == 0.0
        ids = [model.tokenizer.eod_id, *model.tokenizer.encode("def return if")][:12]
        np.testing.assert_array_equal(sub_model.logits(ids), model.logits(ids, domain="code"))
    with pytest.raises(ps.UserError, match="already holds a run at step 2"):
        ps.train(small_yaml, {**FAST, "run.dir": folder / "first"})
    again = ps.train(small_yaml, {**FAST, "run.dir": folder / "again"})
    assert again.losses == first.losses
    tensors = [open_checkpoint(result.checkpoint).manifest.tensors for result in (first, again)]
    assert tensors[0] == tensors[1]
    assert model.generate("def return", domain="code", **GREEDY) == text
    assert sub_model.generate("def return", **GREEDY) == text


def test_a_process_trains_uses_extracts_and_trains_again_without_a_word(small_yaml, tmp_path, capfd, caplog):
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS], signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with caplog.at_level(logging.INFO, "pangu_sigma"):
        live(small_yaml, tmp_path)
    assert capfd.readouterr() == ("", "")
    assert any("step 2" in record.message for record in caplog.records)
    assert ([signal.getsignal(n) for n in STOP_SIGNALS], signal.pthread_sigmask(signal.SIG_BLOCK, ())) == handlers


def test_so_does_another_thread(small_yaml, tmp_path, capfd):
    errors: list[BaseException] = []

    def work() -> None:
        try:
            live(small_yaml, tmp_path, verify=False)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == [] and capfd.readouterr() == ("", "")
    gc.collect()
    assert [thread.name for thread in threading.enumerate() if "server" in thread.name] == []


@pytest.fixture(scope="module")
def model(finished_run):
    return ps.load(finished_run)


def test_the_model_knows_its_domains_configuration_and_size(model, finished_run):
    assert model.domains == ("code", "law", "poems") == model.config.domain_names
    tensors = open_checkpoint(model.path).manifest.tensors
    counted = [name for name, entry in tensors.items() if entry.dtype == "F32" or entry.dtype == "float32"]
    stored = sum(
        math.prod(tensors[name].shape) for name in counted
        if not is_routing(name) and name in open_checkpoint(model.path).names(optimizer=False)
    )  # fmt: skip
    planned = cluster_plan(model.config, Hardware(), 1)["parameters"]
    assert model.num_parameters == stored == (planned["total"] if isinstance(planned, dict) else planned)
    assert "code" in repr(model) and model.step == 12


def test_the_pieces_of_a_stream_are_the_generated_text(model):
    options = {"max_tokens": 12, "temperature": 1.0, "seed": 5}
    for domain in (*model.domains, "auto"):
        pieces = list(model.stream("the court", domain=domain, **options))
        assert "".join(pieces) == model.generate("the court", domain=domain, **options)
    prompts = ["def", "return if", "class"]
    together = model.generate(prompts, domain="code", **GREEDY)
    assert together == [model.generate(prompt, domain="code", **GREEDY) for prompt in prompts]
    (completion,) = model.complete(["def"], domain="code", logprobs=2, **GREEDY)
    assert completion.text == together[0] and len(completion.events[0].top) == 2
    done: list[tuple[int, str]] = []
    own = [Prompt("def", domain="code"), Prompt("class", domain="code", seed=3)]
    model.complete(own, on_completion=lambda index, completion: done.append((index, completion.text)), **GREEDY)
    assert done == [(0, together[0]), (1, together[2])]
    assert [event.text for event in model.events("def", domain="code", **GREEDY)] == [e.text for e in completion.events]
    with pytest.raises(ps.UserError, match="^prompt 2: the model has no domain 'cod'"):
        model.complete([Prompt("def", domain="code"), Prompt("def", domain="cod")])


def test_streams_run_beside_each_other_and_may_be_left(model):
    whole = model.generate("def return", domain="code", **GREEDY)
    unread = [model.stream("class", domain="code", **GREEDY) for _ in range(20)]  # holds nothing
    stream = model.stream("def return", domain="code", **GREEDY)
    begun = next(stream, "")
    other = model.stream("the court", domain="law", **GREEDY)
    next(other, "")
    other.close()
    assert model.generate("def return", domain="code", **GREEDY) == whole == begun + "".join(stream)
    assert model._engine.idle and len(unread) == 20


def test_ctrl_c_interrupts_python_after_a_model_has_computed(finished_run):
    program = (
        "import os, signal, sys, time; import pangu_sigma as ps\n"
        "model = ps.load(sys.argv[1])\n"
        "model.generate('def', domain='code', max_tokens=2, temperature=0)\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(10)\n"
        "except KeyboardInterrupt:\n    print('interrupted', model.domains[0])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(finished_run)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted code\n"), done.stderr


def test_logits_and_losses_are_those_of_evaluation_and_of_decoding(model, finished_run):
    trained = load_trained(finished_run)
    measured = ps.evaluate(finished_run)
    for name, heldout in trained.corpus().heldout().items():
        rows = [heldout.sequence(index) for index in range(len(heldout))]
        first, labels = rows[0][0][:1], [tokens[1:][mask > 0] for tokens, mask in rows]
        # The whole held-out text as one row of ids, in evaluation's batches: equal to the bit.
        assert model._losses([np.concatenate([first, *labels])], name) == [measured.losses[name]]
    text = "def return if else"
    ids = prompt_ids(model.tokenizer, text)[: model.config.data.sequence_length]
    text = model.tokenizer.decode(ids)
    ids = prompt_ids(model.tokenizer, text)
    logits = model.logits(ids, domain="law")
    assert logits.shape == (len(ids), model.config.model.vocab_size) and logits.dtype == np.float32
    loss = -token_log_probabilities(logits[:-1], np.array(ids[1:])).mean()
    assert model.loss(text, domain="law") == pytest.approx(loss, rel=1e-6)
    assert model.loss([text, text], domain="law") == [model.loss(text, domain="law")] * 2
    engine = Engine(trained.model, trained.tokenizer, 1)
    engine.add(Request(tuple(ids), "law", Sampling(max_tokens=0, echo=True)))
    while not (events := engine.step()):
        pass
    (event,) = events
    assert [score.logprob for score in event.prompt_scores[1:]] == pytest.approx(
        token_log_probabilities(logits[:-1], np.array(ids[1:])).tolist(), abs=1e-5
    )
    batch = model.logits([ids, ids], domain="law")
    np.testing.assert_allclose(batch, [logits, logits], atol=1e-5)


def test_the_domain_of_a_text_is_inferred(model):
    probabilities = model.domain_probabilities("the court shall agreement")
    assert set(probabilities) == set(model.domains) and sum(probabilities.values()) == pytest.approx(1.0)
    assert model.infer_domain("the court shall agreement") == max(probabilities, key=probabilities.get)
    (completion,) = model.complete(["the court shall agreement"], domain="auto", max_tokens=1, temperature=0.0)
    assert completion.events[0].domains[0] == pytest.approx((model.infer_domain("the court shall agreement"),
                                                              max(probabilities.values())))  # fmt: skip


def test_mistakes_are_errors_after_which_the_model_goes_on(model, finished_run, tmp_path):
    text = model.generate("def", domain="code", **GREEDY)
    vocab, length = model.config.model.vocab_size, model.config.data.sequence_length
    for wrong, sentence in (
        (lambda: model.generate("def"), "the model has the domains code, law, poems"),
        (lambda: model.generate("def", domain="cod"), "did you mean 'code'"),
        (lambda: model.generate("def " * 99, domain="code"), "window"),
        (lambda: model.generate("def", domain="code", temperature=-1.0), "temperature"),
        (lambda: model.loss("", domain="code"), "text is empty"),
        (lambda: model.logits([vocab], domain="code"), f"0 to {vocab - 1}"),
        (lambda: model.logits([1] * (length + 1), domain="code"), "data.sequence_length"),
        (lambda: model.logits([0.5], domain="code"), "give integers"),
        (lambda: ps.load(tmp_path / "nothing"), "does not exist"),
        (lambda: ps.evaluate(tmp_path), "neither a run"),
        (lambda: ps.extract(finished_run, ["cod"], tmp_path / "out"), "cod"),
        (lambda: ps.extract(finished_run, "code", tmp_path / "out", max_shard_size="much"), "no size"),
        (lambda: ps.export(finished_run, "pdf", tmp_path / "out"), "no format"),
        (lambda: ps.add_domain(finished_run, "new", "x.jsonl", replay=0.5), "with steps"),
        (lambda: ps.remove_domain(finished_run, "cod"), "has no domain cod"),
    ):
        with pytest.raises(ValueError, match=sentence) as error:
            wrong()
        assert isinstance(error.value, ps.UserError)
    assert not (tmp_path / "out").exists()
    assert model.generate("def", domain="code", **GREEDY) == text


def test_two_models_in_two_threads_write_what_each_writes_alone(model, finished_run):
    models, domains = [model, ps.load(finished_run)], ["code", "law"]
    texts: dict[str, list[str]] = {"code": [], "law": []}

    def write(number: int) -> None:
        for _ in range(3):
            texts[domains[number]].append(models[number].generate("def return", domain=domains[number], **GREEDY))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = {domain: model.generate("def return", domain=domain, **GREEDY) for domain in domains}
    assert texts == {domain: [text] * 3 for domain, text in alone.items()}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda path: ps.serve(path, slots=0), "slots is 0: give at least 1"),
        (lambda path: ps.serve(path, slots=5000), "slots is 5000: give at most 1024"),
        (lambda path: ps.serve(path, queue=-1), "queue is -1: give at least 0"),
        (lambda path: ps.serve(path, max_tokens=0), "max_tokens is 0: give at least 1"),
        (lambda path: ps.serve(path, port=70000), "port is 70000: give one of 1 to 65535"),
        (lambda path: ps.serve(path, token=" "), "the token is empty"),
        (lambda path: ps.load(path, slots=0), "slots is 0"),
        (lambda path: ps.evaluate(path, workers=0), "workers is 0: give at least 1"),
        (lambda path: ps.evaluate_tasks(path, "a.jsonl", shots=-1), "shots is -1"),
        (lambda path: ps.analyze(path, tokens=0), "tokens is 0: give at least 1"),
        (lambda path: ps.export(path, "mindir", path / "out", batch_size=0), "batch_size is 0: give at least 1"),
        (lambda path: ps.export(path, "hf", path / "out", max_shard_size=0), "max_shard_size 0 is no size"),
        (lambda path: ps.add_domain(path, "new", "x.txt", steps=3, regularise={"l2": -0.1}), "regularise.l2 = -0.1"),
        (lambda path: ps.add_domain_of_model(path, path, steps=0), "steps = 0 is not allowed"),
        (lambda path: ps.merge_models(path, path / "out"), "one model alone"),
        (lambda path: ps.init_config(path / "new", "a.txt"), "^a.txt does not exist"),
    ],
)
def test_values_out_of_range_are_told_before_anything_is_read(call, sentence, tmp_path):
    with pytest.raises(ps.UserError, match=sentence):
        call(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cluster_is_planned(small_yaml):
    counts = ps.plan_cluster(small_yaml, {"run.device": "CPU"})["parameters"]
    assert counts["total"] > 0


def test_what_the_disk_answers_is_a_sentence(corpora, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ps.UserError, match=r"\(Not a directory\): mend that, or choose another folder"):
        ps.init_config(tmp_path / "file" / "mine", corpora / "code.jsonl")


def test_a_training_takes_at_least_one_process(small_yaml, tmp_path):
    with pytest.raises(ps.UserError, match="parallel.workers = 0 is not allowed"):
        ps.train(small_yaml, {"run.dir": tmp_path / "run"}, workers=0)


def test_domains_are_added_renamed_and_removed(copied_run, corpora, tmp_path):
    run = copied_run(12)
    added = ps.add_domain(run, "medicine", corpora / "law.jsonl", experts=1, init="from:law", steps=3)
    assert added.domains == ("code", "law", "poems", "medicine") and added.steps_ahead == 3
    assert added.config_file == run / "config.yaml" and Path(added) == run
    assert ps.rename_domain(run, "medicine", "health").domains[-1] == "health"
    elsewhere = ps.remove_domain(run, "health", out=tmp_path / "without")
    assert [facts.name for facts in ps.list_domains(elsewhere)] == ["code", "law", "poems"]
    assert ps.list_domains(run)[-1].name == "health"
    resized = ps.resize_domain(run, "health", 2)
    assert [groups["health"] for groups in resized.checkpoint.coverage.values()] == [2]


def test_a_server_runs_beside_the_program(finished_run, capfd):
    with ps.serve(finished_run, port=0, block=False, domains="code", slots=1, warm_up=False) as server:
        body = json.dumps({"model": "code", "prompt": "def", "max_tokens": 3}).encode()
        request = urllib.request.Request(f"{server.url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] <= 3
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{server.url}/health", timeout=5)
    with pytest.raises(ps.UserError, match="did you mean 'code'"):
        ps.serve(finished_run, port=0, block=False, domains=["cod"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_several_processes_train_and_evaluate_for_one_call(small_yaml, tmp_path, capfd):
    result = ps.train(small_yaml, {**FAST, "run.dir": tmp_path / "run", "train.batch_size": 4}, workers=2)
    assert result.finished and set(result.losses) == {"code", "law", "poems"}
    evaluation = ps.evaluate(result, workers=2)
    assert evaluation.losses == pytest.approx(result.losses, rel=1e-5)
    with pytest.raises(ps.UserError, match="already holds a run"):
        ps.train(small_yaml, {**FAST, "run.dir": tmp_path / "run"}, workers=2)
    with pytest.raises(ps.UserError, match="set parallel.workers=2"):
        ps.train(small_yaml, {**FAST, "run.dir": tmp_path / "other", "parallel.data": 2})
    assert capfd.readouterr() == ("", "")


def test_the_page_names_what_there_is(model):
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    assert {name for name in re.findall(r"\bps\.(\w+)", page) if not hasattr(ps, name)} == set()
    assert {name for name in re.findall(r"(?<![\w.])model\.(\w+)", page) if not hasattr(model, name)} == set()
    assert set(ps.__all__) - {"__version__"} <= set(re.findall(r"\w+", page))
