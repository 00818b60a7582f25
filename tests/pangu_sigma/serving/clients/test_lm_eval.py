"""lm-evaluation-harness with its `local-completions` model, as its command line runs it, on a local task."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml

from pangu_sigma.generation.sampling import log_softmax
from pangu_sigma.load import load_trained
from tests.pangu_sigma.conftest import WORDS
from tests.pangu_sigma.serving.conftest import WINDOW

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: make clients")
QUESTIONS, CHOICES = 12, 3


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
def results(server, questions, tmp_path_factory) -> dict:
    """What the harness wrote: its results, and each question with the scores that it got from the server."""
    folder = tmp_path_factory.mktemp("lm_eval")
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8")
    task = {
        "task": "court",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / "court.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    # The harness asks the server for its tokenizer, so nothing is looked up or downloaded.
    arguments = f"model=law,base_url={server.url}/v1/completions,max_length={WINDOW},num_concurrent=4,max_retries=1"
    words = ["--model", "local-completions", "--model_args", arguments, "--tasks", "court", "--include_path", folder,
             "--output_path", folder / "out", "--log_samples", "--batch_size", "3"]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "GIT_DIR": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *map(str, words)],
        capture_output=True, text=True, cwd=folder, timeout=300, env={**os.environ, **offline},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (samples,) = Path(folder / "out").rglob("samples_court_*.jsonl")
    (whole,) = Path(folder / "out").rglob("results_*.json")
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    return {"metrics": json.loads(whole.read_text(encoding="utf-8"))["results"]["court"], "samples": lines}


@pytest.fixture(scope="module")
def expected(served_run, questions) -> list[list[tuple[float, bool]]]:
    """Of every question and choice: log-probability of the choice after the question, and whether greedy writes it;
    computed without cache, server or harness.
    """
    trained = load_trained(served_run)
    from pangu_sigma.generation.recompute import RecomputingDecoder  # imports MindSpore, which is set up by now

    decoder = RecomputingDecoder(trained.model)
    domain = trained.model.groups.names.index("law")

    def one(question: str, choice: str) -> tuple[float, bool]:
        # The harness's own rule: a choice's tokens are those of the whole text behind the question's.
        whole, before = trained.tokenizer.encode(f"{question} {choice}"), len(trained.tokenizer.encode(question))
        logprobs = log_softmax(decoder.score(tuple(whole), domain))[before - 1 : -1]
        ids = np.array(whole[before:])
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
    assert results["metrics"]["acc,none"] == pytest.approx(right)
