"""Task files: JSONL whose lines are questions, all with choices or all with answers, and the texts made of them.

{"question": TEXT, "choices": [TEXT, TEXT, …], "gold": INDEX} is answered by the likeliest choice, {"question": TEXT,
"answer": TEXT or [TEXT, …]} by what the model writes. Either may have a "domain"; other keys are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pangu_sigma.data.corpus_files import has_lone_surrogate, json_lines, json_object
from pangu_sigma.errors import UserError, argument

CHOICES = '{"question": "…", "choices": ["…", "…"], "gold": 0}'
ANSWER = '{"question": "…", "answer": "…"}'
# As lm-evaluation-harness puts questions together, unless its task says otherwise.
BEFORE_ANSWER = " "
BETWEEN_SHOTS = "\n\n"


@dataclass(frozen=True)
class Question:
    """One question: with `choices`, of which `gold` is right, or with the `answers` that are accepted."""

    text: str
    choices: tuple[str, ...] = ()
    gold: int = 0
    answers: tuple[str, ...] = ()
    domain: str | None = None

    @property
    def solution(self) -> str:
        """The right answer, as a solved question shows it."""
        return self.choices[self.gold] if self.choices else self.answers[0]


@dataclass(frozen=True)
class Task:
    """The questions of one file, in order; `name` is the file's without its ending."""

    name: str
    file: Path
    questions: tuple[Question, ...]

    @property
    def multiple_choice(self) -> bool:
        """Whether the questions have choices."""
        return bool(self.questions[0].choices)


def read_task(file: Path) -> Task:
    """Read a task file. Raises UserError naming the line that is no question or of another kind than the first."""
    lines = json_lines(file, f"the task {file}", "name a .jsonl file")
    if not lines:
        raise UserError(f"the task {file} holds no question; write {CHOICES} or {ANSWER} a line")
    questions = tuple(_question(line, f"{file}:{line_number}") for line_number, line in lines)
    for (line_number, _), question in zip(lines, questions, strict=True):
        if bool(question.choices) != bool(questions[0].choices):
            first = "choices" if questions[0].choices else "an answer"
            raise UserError(
                f"{file}:{line_number}: the first question has {first} and this one has not; give each kind a file of "
                "its own"
            )
    return Task(file.stem, file, questions)


def _question(line: str, source: str) -> Question:
    record = json_object(line, source, f"{CHOICES} or {ANSWER}")
    if ("choices" in record) == ("answer" in record):
        raise UserError(f"{source}: a question has either choices or an answer; write {CHOICES} or {ANSWER}")
    text, domain = record.get("question"), record.get("domain")
    if not _is_text(text):
        raise UserError(f"{source}: the field 'question' holds no text; write {CHOICES} or {ANSWER}")
    if not (domain is None or _is_text(domain)):
        raise UserError(f"{source}: the field 'domain' is no name; write a domain of the model or leave it out")
    if "choices" in record:
        choices, gold = record["choices"], record.get("gold")
        if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
            raise UserError(f"{source}: the field 'choices' is no list of two or more texts; write {CHOICES}")
        if type(gold) is not int or not 0 <= gold < len(choices):
            raise UserError(f"{source}: the field 'gold' must be the right choice's index, 0 to {len(choices) - 1}")
        return Question(text, tuple(choices), gold, domain=domain)
    answers = record["answer"] if isinstance(record["answer"], list) else [record["answer"]]
    if not answers or not all(map(_is_text, answers)):
        raise UserError(f"{source}: the field 'answer' is no text and no list of texts; write {ANSWER}")
    return Question(text, answers=tuple(answers), domain=domain)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and not has_lone_surrogate(value)


def context(question: Question, pool: Sequence[Question], shots: int) -> str:
    """The text in front of the answer: the first `shots` questions of `pool` but this one, solved, and then it.

    Raises UserError where the pool has too few.
    """
    different = (other for other in pool if (other.text, other.solution) != (question.text, question.solution))
    others = list(islice(different, shots))
    if len(others) < shots:
        raise UserError(
            f"{argument('shots', shots)} needs as many other questions, and there are {len(others)}: set it lower"
        )
    solved = [f"{other.text}{BEFORE_ANSWER}{other.solution}{BETWEEN_SHOTS}" for other in others]
    return "".join(solved) + question.text
