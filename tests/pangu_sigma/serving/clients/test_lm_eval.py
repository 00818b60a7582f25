"""lm-evaluation-harness with its `local-completions` model, as its command line runs it, on a local task."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml

from pangu_sigma.evaluation.task_evaluation import FewShotSettings, evaluate_tasks, write_answers
from pangu_sigma.generation.sampling import log_softmax
from pangu_sigma.trained_model import load_trained
from tests.pangu_sigma.conftest import WORDS
from tests.pangu_sigma.serving.clients.client_environments import client_python
from tests.pangu_sigma.serving.conftest import WINDOW
from tests.pangu_sigma.training.training_process import command

QUESTIONS, CHOICES, SHOTS, WRITTEN = 12, 3, 2, 6


@pytest.fixture(scope="module")
def questions() -> list[dict]:
    draw = random.Random(3)
    words = WORDS["law"].split()
    return [
        {
            "question": " ".join(draw.choices(words, k=draw.randrange(3, 8))),
            "choices": [" ".join(draw.choices(words, k=draw.randrange(1, 4))) for _ in range(CHOICES)],
            "gold": draw.randrange(CHOICES),
        }
        for _ in range(QUESTIONS)
    ]


@pytest.fixture(scope="module")
def folder(served_run, questions, tmp_path_factory) -> Path:
    """Local tasks for both: choices, and words of which the model's own continuation is right for every other one."""
    folder = tmp_path_factory.mktemp("lm_eval")
    (folder / "court.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8")
    trained = load_trained(served_run)
    from pangu_sigma.generation.engine import Engine

    settings = FewShotSettings(max_tokens=WRITTEN)
    texts = [question["question"] for question in questions]
    engine = Engine(trained.model, trained.tokenizer, 4)
    own, _ = write_answers(engine, texts, ["law"] * QUESTIONS, settings, lambda _: None)
    own = [text if text.strip() else "nothing" for text in own]
    words = [
        {"question": text, "answer": answer.strip() if i % 2 else "verdict"}
        for i, (text, answer) in enumerate(zip(texts, own, strict=True))
    ]
    (folder / "words.jsonl").write_text("".join(json.dumps(q) + "\n" for q in words), encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Harness:
    """A version of the harness: the Python that has it, and the arguments by which it gets our tokenizer."""

    python: Path
    tokenizer: str
    folder: Path

    def evaluate(self, model: str, url: str, tasks: str, *options: str, **arguments: object) -> tuple[dict, dict]:
        """Results by task, and of each task the questions with the answers that it got from the server."""
        out = self.folder / f"out-{model}"
        given = {"model": "law", "base_url": url, "max_length": WINDOW, "max_retries": 1, **arguments}
        words = ["-m", "lm_eval", "--model", model, "--tasks", tasks, "--model_args",
                 ",".join(f"{name}={value}" for name, value in given.items()), "--include_path", self.folder.parent,
                 "--output_path", out, "--log_samples", *options]  # fmt: skip
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(self.folder / "hf"),
                   "GIT_DIR": "/nowhere", "OPENAI_API_KEY": "any"}  # fmt: skip
        done = subprocess.run(
            [self.python, *map(str, words)],
            capture_output=True, text=True, cwd=self.folder, timeout=600, env={**os.environ, **offline},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        (results_file,) = out.rglob("results_*.json")
        samples = {}
        for name in tasks.split(","):
            (file,) = out.rglob(f"samples_{name}_*.jsonl")
            samples[name] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return json.loads(results_file.read_text(encoding="utf-8"))["results"], samples


@pytest.fixture(
    scope="module",
    params=[None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("lm-eval-0.4.13", "lm-eval-0.4.9"))],
    ids=lambda name: name or "installed",
)
def harness(request, folder, served_run) -> Harness:
    """The harness of this environment, and in the long variants versions in environments of their own."""
    own = folder / (request.param or "installed")
    own.mkdir()
    if request.param is None:
        if find_spec("lm_eval") is None:
            pytest.skip("lm-eval is not installed: make clients")
        return Harness(Path(sys.executable), "", own)
    if request.param == "lm-eval-0.4.13":
        return Harness(client_python(request.param), "", own)
    # It cannot ask the server for its tokenizer, and takes one from a folder.
    done = command("export", served_run, "--format", "hf", "--out", own / "exported", cwd=own)
    assert done.returncode == 0, done.stderr
    return Harness(client_python(request.param), str(own / "exported"), own)


@pytest.fixture(scope="module")
def results(server, folder, harness) -> dict:
    """What the harness wrote: its results, and each question with the scores that it got from the server."""

    def task(name: str, file: str, **rest) -> None:
        files = {"data_files": {"test": str(folder / file)}}
        values = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **rest}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")

    choices = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    shots = {"fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}, "num_fewshot": SHOTS}
    strip = [{"function": "regex", "regex_pattern": "(.*)"}, {"function": "take_first"}]
    written = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": WRITTEN, "do_sample": False, "temperature": 0.0},
        "filter_list": [{"name": "strip", "filter": strip}],
        "metric_list": [{"metric": "exact_match"}],
    }
    task("court", "court.jsonl", **choices)
    task("shots", "court.jsonl", **choices, **shots)
    task("words", "words.jsonl", **written)
    # Without a tokenizer's name the harness asks the server for its own, so nothing is looked up or downloaded.
    named = {"tokenizer": harness.tokenizer, "trust_remote_code": True} if harness.tokenizer else {}
    metrics, samples = harness.evaluate(
        "local-completions", f"{server.url}/v1/completions", "court,shots,words", "--batch_size", "3", num_concurrent=4,
        **named,
    )  # fmt: skip
    return {"metrics": metrics, "samples": samples["court"]}


@pytest.fixture(scope="module")
def expected(served_run, questions) -> list[list[tuple[float, bool]]]:
    """Of every question and choice: log-probability of the choice after the question, and whether greedy writes it;
    computed without cache, server or harness.
    """
    trained = load_trained(served_run)
    from tests.oracles.recomputing_decoder import RecomputingDecoder  # imports MindSpore, which is set up by now

    decoder = RecomputingDecoder(trained.model)
    domain = trained.model.groups.names.index("law")

    def one(question: str, choice: str) -> tuple[float, bool]:
        # The harness's own rule: a choice's tokens are those of the whole text behind the question's.
        token_ids, before = trained.tokenizer.encode(f"{question} {choice}"), len(trained.tokenizer.encode(question))
        logprobs = log_softmax(decoder.score(tuple(token_ids), domain))[before - 1 : -1]
        ids = np.array(token_ids[before:])
        return float(logprobs[np.arange(ids.size), ids].sum()), bool((logprobs.argmax(axis=1) == ids).all())

    return [[one(q["question"], choice) for choice in q["choices"]] for q in questions]


def test_every_choice_is_scored_as_the_model_scores_it(results, expected):
    assert len(results["samples"]) == QUESTIONS
    for sample in results["samples"]:
        got = [(float(score), greedy in (True, "True")) for score, greedy in sample["filtered_resps"]]
        for (score, greedy), (own, own_greedy) in zip(got, expected[sample["doc_id"]], strict=True):
            assert abs(score - own) < 1e-4 and greedy == own_greedy


def test_the_accuracy_is_the_models(results, questions, expected):
    best = [int(np.argmax([score for score, _ in row])) for row in expected]
    right = np.mean([choice == question["gold"] for choice, question in zip(best, questions, strict=True)])
    assert results["metrics"]["court"]["acc,none"] == pytest.approx(right)


def test_evaluates_own_scores_are_the_harness_scores(results, served_run, folder):
    choices = FewShotSettings(domain="law"), FewShotSettings(domain="law", shots=SHOTS)
    court, shots = (evaluate_tasks(served_run, [folder / "court.jsonl"], settings)["tasks"][0] for settings in choices)
    written = FewShotSettings(domain="law", max_tokens=WRITTEN)
    words = evaluate_tasks(served_run, [folder / "words.jsonl"], written)["tasks"][0]
    pairs = {"acc,none": "accuracy", "acc_norm,none": "accuracy_per_character"}
    for name, task_result in (("court", court), ("shots", shots)):
        for theirs, rule in pairs.items():
            assert task_result["scores"][rule]["value"] == pytest.approx(results["metrics"][name][theirs])
            error = results["metrics"][name][theirs.replace(",", "_stderr,")]
            assert task_result["scores"][rule]["stderr"] == pytest.approx(error)
    theirs = results["metrics"]["words"]
    assert words["scores"]["exact_match"]["value"] == pytest.approx(theirs["exact_match,strip"])
    assert words["scores"]["exact_match"]["value"] >= 0.4
    assert words["scores"]["exact_match"]["stderr"] == pytest.approx(theirs["exact_match_stderr,strip"])
    assert court["truncated"] == shots["truncated"] == words["truncated"] == 0


@pytest.mark.slow
def test_a_task_is_answered_in_a_chat(server, client, harness, results):
    # Written by the fixture `results`: "words".
    _, samples = harness.evaluate(
        "local-chat-completions", f"{server.url}/v1/chat/completions", "words", "--apply_chat_template"
    )
    assert len(samples["words"]) == QUESTIONS
    for sample in samples["words"]:
        turns = [{"role": "user", "content": sample["doc"]["question"]}]
        body = {"model": "law", "messages": turns, "max_tokens": WRITTEN, "temperature": 0, "stop": ["\n"]}
        answer = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        assert sample["resps"] == [[answer]]
