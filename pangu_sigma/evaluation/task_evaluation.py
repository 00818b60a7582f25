"""Task evaluation, few-shot: a trained model answers the questions of task files (`evaluate MODEL --tasks FILE`).

Choices are scored as lm-evaluation-harness does, so that the numbers are the same: the log-probability of the choice's
tokens behind the question's, the tokens being those of the whole text behind the question's own. Short texts share the
rows of a batch; attention and positions restart after the end-of-document token between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pangu_sigma.data.packed_rows import pack_in_order
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.errors import UserError, argument
from pangu_sigma.evaluation.task_files import BEFORE_ANSWER, Question, Task, context, read_task
from pangu_sigma.evaluation.task_scores import Likelihood, choice_scores, exact_match, mean_with_error
from pangu_sigma.generation.request import AUTO, Request, Sampling, document_begin, pick_domain, prompt_ids
from pangu_sigma.monitor.progress import progress
from pangu_sigma.trained_model import TrainedModel, load_trained

Advance = Callable[[int], None]
SLOTS = 8


@dataclass(frozen=True)
class FewShotSettings:
    """Few-shot settings: `shots` solved questions in front, from `shots_file` or the task itself; the `domain` whose
    experts answer (or `auto`); `max_tokens` and `stop` strings of written answers.
    """

    shots: int = 0
    shots_file: Path | None = None
    domain: str | None = None
    max_tokens: int = 64
    stop: tuple[str, ...] = ("\n",)

    def __post_init__(self) -> None:
        if self.shots < 0 or self.max_tokens < 1:
            raise UserError(f"shots is {self.shots} and max_tokens {self.max_tokens}: give at least 0 and 1")


@dataclass(frozen=True)
class TaskResult:
    """Result of one task: every question's scores, and its choices' likelihoods or what was written."""

    task: Task
    scores: list[dict[str, float]]
    likelihoods: list[list[Likelihood]]
    written: list[str]
    truncated: int

    def summary(self) -> dict:
        """The task's figures as plain values."""
        rules = self.scores[0]
        return {
            "task": self.task.name,
            "file": str(self.task.file),
            "kind": "multiple_choice" if self.task.multiple_choice else "exact_match",
            "questions": len(self.scores),
            "truncated": self.truncated,
            "scores": {rule: mean_with_error([question[rule] for question in self.scores]) for rule in rules},
        }


def evaluate_tasks(
    path: Path,
    files: Sequence[Path],
    settings: FewShotSettings = FewShotSettings(),  # noqa: B008 - frozen
) -> dict:
    """Every task's scores with standard errors; whatever is wrong with the files is found before the model is loaded.

    Returns {"step", "shots", "domain", "tasks": [see `TaskResult.summary`]}. Raises UserError.
    """
    tasks, pools = read_tasks(files, settings)
    trained = load_trained(path)
    results = run_tasks(trained, tasks, pools, settings)
    return {
        "step": trained.checkpoint.step,
        "shots": settings.shots,
        "domain": settings.domain,
        "tasks": [result.summary() for result in results],
    }


def read_tasks(files: Sequence[Path], settings: FewShotSettings) -> tuple[list[Task], list[Sequence[Question]]]:
    """The tasks, and for each the questions that solved ones are taken from."""
    tasks = [read_task(file) for file in files]
    shared = read_task(settings.shots_file).questions if settings.shots_file else None
    pools = [task.questions if shared is None else shared for task in tasks]
    for task, pool in zip(tasks, pools, strict=True):
        for question in task.questions:
            context(question, pool, settings.shots)
    return tasks, pools


def run_tasks(
    trained: TrainedModel, tasks: Sequence[Task], pools: Sequence[Sequence[Question]], settings: FewShotSettings
) -> list[TaskResult]:
    """Run every task, behind a progress bar."""
    likelihood = engine = None
    results = []
    for task, pool in zip(tasks, pools, strict=True):
        texts = [context(question, pool, settings.shots) for question in task.questions]
        domains = _domains(trained, task, texts, settings)
        with progress(f"ask {task.name}", len(texts), unit="questions") as job:
            if task.multiple_choice:
                likelihood = likelihood or ChoiceLikelihood(trained)
                answered = likelihood(task.questions, texts, domains, job.advance)
                scores = [choice_scores(q, choices) for q, choices in zip(task.questions, answered, strict=True)]
                results.append(TaskResult(task, scores, answered, [], likelihood.truncated))
            else:
                from pangu_sigma.generation.engine import Engine

                engine = engine or Engine(trained.model, trained.tokenizer, SLOTS)
                written, truncated = write_answers(engine, texts, domains, settings, job.advance)
                scores = [exact_match(q, text) for q, text in zip(task.questions, written, strict=True)]
                results.append(TaskResult(task, scores, [], written, truncated))
    return results


def _domains(trained: TrainedModel, task: Task, texts: Sequence[str], settings: FewShotSettings) -> list[str]:
    names = trained.model.groups.names
    if settings.domain == AUTO and AUTO not in names:
        from pangu_sigma.evaluation.inferred_domains import likeliest_domains

        guessed = likeliest_domains(trained.model, [prompt_ids(trained.tokenizer, text) for text in texts])
        return [question.domain or name for question, name in zip(task.questions, guessed, strict=True)]
    return [pick_domain(names, question.domain or settings.domain) for question in task.questions]


class ChoiceLikelihood:
    """Log-probabilities of choices behind their questions, many texts to a batch. `truncated` counts, of the last
    call, the texts whose beginning was cut off because they are longer than the model's window.
    """

    def __init__(self, trained: TrainedModel) -> None:
        from pangu_sigma.model.scoring import Scorer

        model = trained.model.config.model
        if model.sparse_prefixes and not model.router_spec.causal:
            raise UserError(
                f"the model's router ({model.router_setting}) looks at later tokens, so it has no "
                "probability of a choice behind a question: use it with evaluate alone"
            )
        self.tokenizer, self.names = trained.tokenizer, trained.model.groups.names
        self.rows = trained.model.config.evaluate.batch_size
        self.scorer = Scorer(trained.model, self.rows)
        self.truncated = 0

    def __call__(
        self, questions: Sequence[Question], texts: Sequence[str], domains: Sequence[str], advance: Advance
    ) -> list[list[Likelihood]]:
        """The likelihoods of every question's choices; `advance(questions)` is called as they are done."""
        self.truncated = 0
        likelihoods: list[list[Likelihood]] = [[] for _ in questions]
        for name in dict.fromkeys(domains):
            indices = [index for index, domain in enumerate(domains) if domain == name]
            parts = [
                (index, *self._truncate(*encode_pair(self.tokenizer, texts[index], BEFORE_ANSWER + choice)))
                for index in indices
                for choice in questions[index].choices
            ]
            for (index, _, answer), logprob in zip(parts, self._logprobs(parts, name), strict=True):
                likelihoods[index].append(Likelihood(logprob, len(answer)))
                if len(likelihoods[index]) == len(questions[index].choices):
                    advance(1)
        return likelihoods

    def _truncate(self, before: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        """The last S + 1 tokens of a longer text. Raises UserError where that leaves nothing of the question."""
        over = len(before) + len(answer) - self.scorer.length - 1
        if over <= 0:
            return before, answer
        if over >= len(before):
            raise UserError(
                f"a choice of {len(answer)} tokens does not fit the model's window of {self.scorer.length}: shorten it"
            )
        self.truncated += 1
        return before[over:], answer

    def _logprobs(self, parts: Sequence[tuple[int, list[int], list[int]]], name: str) -> Iterator[float]:
        # A text that fills the row to its end needs no end-of-document token behind it, hence one more in both.
        lengths = np.array([len(before) + len(answer) + 1 for _, before, answer in parts])
        starts = pack_in_order(lengths, self.scorer.length + 2)
        domain = np.full(self.rows, self.names.index(name), np.int32)
        for first in range(0, len(starts) - 1, self.rows):
            tokens = np.full((self.rows, self.scorer.length + 1), self.tokenizer.eod_id, np.int32)
            spans = []
            for row, (a, b) in enumerate(zip(starts[first:-1], starts[first + 1 :], strict=True)):
                if row == self.rows:
                    break
                start = 0
                for _, before, answer in parts[a:b]:
                    end = start + len(before) + len(answer)
                    tokens[row, start:end] = before + answer
                    # The loss of the token at position p stands at p - 1.
                    spans.append((row, start + len(before) - 1, end - 1))
                    start = end + 1
            losses = self.scorer.losses(tokens, domain).astype(np.float64)
            if not np.isfinite(losses).all():
                raise UserError(
                    "the model computes numbers that are not finite, as its weights come from a diverged run: use an "
                    "earlier checkpoint"
                )
            for row, begin, end in spans:
                yield -float(losses[row, begin:end].sum())


def encode_pair(tokenizer: Tokenizer, before: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of a question and of the answer behind it, by lm-evaluation-harness' rule: blanks at the question's end
    belong to the answer, whose ids are those of the whole text behind the question's.
    """
    stripped = before.rstrip()
    answer = before[len(stripped) :] + answer
    ids = tokenizer.encode(stripped)
    return ids, tokenizer.encode(stripped + answer)[len(ids) :] or tokenizer.encode(answer)


def write_answers(
    engine, texts: Sequence[str], domains: Sequence[str], settings: FewShotSettings, advance: Advance
) -> tuple[list[str], int]:
    """Answers that the model writes behind every text, by greedy decoding, and how many texts lost their beginning to
    fit.

    Raises UserError where max_tokens leave the question no room.
    """
    from pangu_sigma.generation.completion import complete

    begin = document_begin(engine.tokenizer)
    room = engine.window - settings.max_tokens - len(begin) + 1  # the end of the document before is outside
    if room < 1:
        raise UserError(
            f"{argument('max_tokens', settings.max_tokens)} leaves no room for a question in the model's window of "
            f"{engine.window}: set it lower"
        )
    sampling = Sampling(max_tokens=settings.max_tokens, temperature=0.0, stop=settings.stop)
    requests, truncated = [], 0
    for text, domain in zip(texts, domains, strict=True):
        ids = engine.tokenizer.encode(text)
        truncated += len(ids) > room
        requests.append(Request((*begin, *ids[-room:]), domain, sampling))

    def on_event(_, event, __) -> None:
        if event.finish:
            advance(1)

    return [completion.text for completion in complete(engine, requests, on_event)], truncated


def tasks_table(result: dict) -> str:
    """The figures of `evaluate_tasks` as an aligned table: share in % and its standard error."""
    from pangu_sigma.monitor.text_tables import text_table

    rows = []
    for task in result["tasks"]:
        for rule, score in task["scores"].items():
            error = "–" if score["stderr"] is None else f"± {100 * score['stderr']:.2f}"
            rows.append([task["task"], rule, f"{100 * score['value']:.2f}", error, f"{task['questions']:,}"])
    truncated = [f"{task['task']}: {task['truncated']} texts were cut to the window" for task in result["tasks"]]
    truncated = [line for line, task in zip(truncated, result["tasks"], strict=True) if task["truncated"]]
    return "\n".join([text_table(["task", "score", "%", "stderr", "questions"], rows, left=2), *truncated])
