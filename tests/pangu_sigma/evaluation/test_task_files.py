"""Task files: what a line must be, solved questions in front, and the arithmetic of scores."""

import json
import math

import pytest

from pangu_sigma.errors import UserError
from pangu_sigma.evaluation.task_files import Question, context, read_task
from pangu_sigma.evaluation.task_scores import Likelihood, choice_scores, exact_match, mean_with_error

CHOICE = {"question": "a b", "choices": ["c", "dd"], "gold": 1}
ANSWER = {"question": "a b", "answer": "c"}


def task_of(tmp_path, *lines):
    path = tmp_path / "task.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return read_task(path)


def test_both_kinds_are_read(tmp_path):
    task = task_of(tmp_path, CHOICE, {**CHOICE, "gold": 0, "domain": "law", "note": 1})
    assert task.name == "task" and task.multiple_choice and task.questions[0].solution == "dd"
    assert task.questions[1] == Question("a b", ("c", "dd"), 0, domain="law")
    task = task_of(tmp_path, ANSWER, {**ANSWER, "answer": ["c", "C"]})
    assert not task.multiple_choice and task.questions[1].answers == ("c", "C")


@pytest.mark.parametrize(
    "lines, sentence",
    [
        ([], "holds no question; write"),
        ([CHOICE, "{,}\n"], ":2: the line is not valid JSON"),
        ([CHOICE, {"question": "a"}], ":2: a question has either choices or an answer"),
        ([{**CHOICE, "answer": "b"}], ":1: a question has either choices or an answer"),
        ([CHOICE, ANSWER], ":2: the first question has choices and this one has not"),
        ([{**CHOICE, "question": " "}], ":1: the field 'question' holds no text"),
        ([{**CHOICE, "choices": ["a"]}], ":1: the field 'choices' is no list of two or more texts"),
        ([{**CHOICE, "gold": 2}], ":1: the field 'gold' must be the right choice's index, 0 to 1"),
        ([{**CHOICE, "gold": True}], ":1: the field 'gold' must be"),
        ([{**ANSWER, "answer": []}], ":1: the field 'answer' is no text and no list of texts"),
        ([{**ANSWER, "domain": 3}], ":1: the field 'domain' is no name"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, lines, sentence):
    with pytest.raises(UserError) as raised:
        task_of(tmp_path, *lines)
    assert sentence in str(raised.value)


def test_blank_lines_are_passed_over_and_lines_keep_their_numbers(tmp_path):
    assert len(task_of(tmp_path, CHOICE, "\n", CHOICE, " \n").questions) == 2
    with pytest.raises(UserError, match=":3: the first question has choices"):
        task_of(tmp_path, CHOICE, "\n", ANSWER)


def test_solved_questions_come_in_order_without_the_question_itself():
    pool = [Question(f"q{i}", answers=(f"a{i}",)) for i in range(4)]
    assert context(pool[0], pool, 0) == "q0"
    assert context(pool[0], pool, 2) == "q1 a1\n\nq2 a2\n\nq0"
    assert context(pool[2], pool, 2) == "q0 a0\n\nq1 a1\n\nq2"
    with pytest.raises(UserError, match="shots=4 needs as many other questions, and there are 3"):
        context(pool[0], pool, 4)


def test_length_may_decide_between_choices():
    question = Question("?", ("ab", "abcdefgh", "abcd"), gold=1)
    likelihoods = [Likelihood(-2.0, 1), Likelihood(-4.0, 2), Likelihood(-3.0, 3)]
    # per character -1, -0.5, -0.75; per token -2, -2, -1
    assert choice_scores(question, likelihoods) == {
        "accuracy": 0.0, "accuracy_per_character": 1.0, "accuracy_per_token": 0.0,
    }  # fmt: skip


def test_an_answer_matches_exactly_but_for_the_blanks_around_it():
    question = Question("?", answers=("Paris ", "Lutetia"))
    matches = [exact_match(question, text)["exact_match"] for text in (" Paris\n", "paris", "Lutetia", "Par is")]
    assert matches == [1.0, 0.0, 1.0, 0.0]


def test_the_standard_error_is_that_of_a_sample():
    assert mean_with_error([1.0, 0.0, 1.0, 1.0]) == {"value": 0.75, "stderr": pytest.approx(math.sqrt(0.25 / 4))}
    assert mean_with_error([1.0]) == {"value": 1.0, "stderr": None}
