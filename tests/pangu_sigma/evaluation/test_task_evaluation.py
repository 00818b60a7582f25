"""Questions asked of a trained model: scores beside a plain computation, and the command."""

import json
import random

import numpy as np
import pytest

from pangu_sigma.errors import UserError
from pangu_sigma.evaluation.task_evaluation import FewShotSettings, encode_pair, read_tasks, run_tasks
from pangu_sigma.generation import prompt_ids
from pangu_sigma.generation.sampling import log_softmax
from pangu_sigma.trained_model import load_trained
from tests.pangu_sigma.conftest import WORDS
from tests.pangu_sigma.finetuning.conftest import write_jsonl
from tests.pangu_sigma.training.training_process import assert_refused, command


def questions(count: int) -> list[dict]:
    draw = random.Random(3)
    words = WORDS["law"].split()
    return [
        {
            "question": " ".join(draw.choices(words, k=draw.randrange(2, 5))),
            "choices": [" ".join(draw.choices(words, k=draw.randrange(1, 3))) for _ in range(3)],
            "gold": draw.randrange(3),
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def trained(taught):
    return load_trained(taught)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_jsonl(folder / "court.jsonl", questions(9))
    write_jsonl(folder / "short.jsonl", [{"question": q["question"], "answer": q["choices"][0]} for q in questions(5)])
    return folder


def task_result(trained, files, **settings):
    settings = FewShotSettings(**{"domain": "law", **settings})
    tasks, pools = read_tasks([files / "court.jsonl"], settings)
    return run_tasks(trained, tasks, pools, settings)[0]


def test_every_choice_is_as_likely_as_the_model_finds_it_alone(trained, files):
    from tests.oracles.recomputing_decoder import RecomputingDecoder

    result = task_result(trained, files)
    decoder, domain = RecomputingDecoder(trained.model), trained.model.groups.names.index("law")
    for question, likelihoods in zip(result.task.questions, result.likelihoods, strict=True):
        for choice, likelihood in zip(question.choices, likelihoods, strict=True):
            before, ids = encode_pair(trained.tokenizer, question.text, f" {choice}")
            rows = log_softmax(decoder.score((*before, *ids), domain))[len(before) - 1 : -1]
            own = float(rows[np.arange(len(ids)), ids].sum())
            assert abs(likelihood.logprob - own) < 1e-4 and likelihood.tokens == len(ids)


def test_a_text_longer_than_the_window_loses_its_beginning_and_is_counted(trained, files):
    result = task_result(trained, files, shots=6)
    assert result.truncated > 0 and len(result.scores) == 9
    assert task_result(trained, files).truncated == 0


def test_questions_bring_their_domain_or_it_is_inferred(trained, files, tmp_path):
    law, code = task_result(trained, files), task_result(trained, files, domain="code")
    assert [[c.logprob for c in q] for q in law.likelihoods] != [[c.logprob for c in q] for q in code.likelihoods]
    mixed = [{**q, "domain": "law" if i % 2 else "code"} for i, q in enumerate(questions(9))]
    write_jsonl(tmp_path / "court.jsonl", mixed)
    for i, likelihoods in enumerate(task_result(trained, tmp_path, domain=None).likelihoods):
        expected = (law if i % 2 else code).likelihoods[i]
        assert [c.logprob for c in likelihoods] == pytest.approx([c.logprob for c in expected], abs=1e-5)
    assert len(task_result(trained, files, domain="auto").scores) == 9


def test_the_inferred_domain_is_the_one_that_finds_the_text_likeliest(trained):
    """As the posterior of evaluation's token log probabilities has it, one text at a time."""
    from pangu_sigma.evaluation.inferred_domains import likeliest_domains
    from pangu_sigma.model.scoring import Scorer

    texts = ["def return if else for in range", "court clause judge appeal", "moon night", "silver dream " * 30]
    ids = [prompt_ids(trained.tokenizer, text) for text in texts]
    model, plain, expected = trained.model, Scorer(trained.model, 1), []
    length = model.config.data.sequence_length
    for text in ids:
        last = text[-length - 1 :]
        row = np.full((1, length + 1), model.eod_id, np.int32)
        row[0, : len(last)] = last
        losses = [plain.losses(row, np.full(1, group, np.int32))[0] for group in range(len(model.groups.names))]
        expected.append(model.groups.names[int(np.argmin([loss[: len(last) - 1].sum() for loss in losses]))])
    assert likeliest_domains(model, ids) == expected


def test_the_command_prints_scores_with_their_standard_errors(taught, files, tmp_path):
    tasks = ["--tasks", files / "court.jsonl", "--tasks", files / "short.jsonl"]
    options = ["--domain", "law", "--shots", 1, "--max-tokens", 8, "--json"]
    done = command("evaluate", taught, *tasks, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    court, short = json.loads(done.stdout)["tasks"]
    assert court["kind"] == "multiple_choice" and court["questions"] == 9
    assert set(court["scores"]) == {"accuracy", "accuracy_per_character", "accuracy_per_token"}
    assert 0 <= court["scores"]["accuracy"]["value"] <= 1 and court["scores"]["accuracy"]["stderr"] is not None
    assert short["kind"] == "exact_match" and short["questions"] == 5 and set(short["scores"]) == {"exact_match"}
    done = command("evaluate", taught, *tasks[:2], cwd=tmp_path)
    assert_refused(done, "the model has the domains code, law, poems: choose one as domain")
    assert_refused(command("evaluate", taught, "--shots", 2, cwd=tmp_path), "add --tasks FILE")
    assert_refused(command("evaluate", taught, "--tasks", "gone.jsonl", cwd=tmp_path), "the task gone.jsonl cannot be")


def test_an_answer_needs_room_for_its_question(trained, files):
    settings = FewShotSettings(domain="law", max_tokens=48)
    tasks, pools = read_tasks([files / "short.jsonl"], settings)
    with pytest.raises(UserError, match="max_tokens=48 leaves no room for a question in the model's window of 48"):
        run_tasks(trained, tasks, pools, settings)
