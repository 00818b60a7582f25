"""Task scores: accuracy and exact match from log-probabilities and written answers, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pangu_sigma.evaluation.task_files import Question


@dataclass(frozen=True)
class Likelihood:
    """Likelihood of one choice: log-probability (nats) of its tokens, and their number."""

    logprob: float
    tokens: int


def choice_scores(question: Question, likelihoods: Sequence[Likelihood]) -> dict[str, float]:
    """1 or 0 by rule: the likeliest choice, by raw log-probability, per character of the choice, and per token.

    The first of equals wins. Raw and per character are lm-evaluation-harness' acc and acc_norm.
    """
    raw = np.array([choice.logprob for choice in likelihoods])
    characters = np.array([len(choice) for choice in question.choices], np.float64)
    tokens = np.array([choice.tokens for choice in likelihoods], np.float64)
    by_rule = {"accuracy": raw, "accuracy_per_character": raw / characters, "accuracy_per_token": raw / tokens}
    return {rule: float(int(np.argmax(values)) == question.gold) for rule, values in by_rule.items()}


def exact_match(question: Question, written: str) -> dict[str, float]:
    """1 if the model wrote an accepted answer, white space around both left out, else 0."""
    return {"exact_match": float(written.strip() in {answer.strip() for answer in question.answers})}


def mean_with_error(values: Sequence[float]) -> dict[str, float | None]:
    """The mean of 0s and 1s, and its standard error: sample standard deviation / sqrt(n), None for one value."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return {"value": mean, "stderr": None}
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return {"value": mean, "stderr": math.sqrt(variance / len(values))}
