"""Requests run to their end: what came of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pangu_sigma.errors import UserError
from pangu_sigma.generation.request import Event, Request

if TYPE_CHECKING:
    from pangu_sigma.generation.engine import Engine


@dataclass
class Answer:
    """What came of one request: `text` without the prompt, every token's event, why it ended; `error` says what made
    it end before its time."""

    text: str = ""
    events: list[Event] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None


def complete(
    engine: Engine,
    requests: Iterable[Request],
    heard: Callable[[int, Event, Answer], None] | None = None,
    go_on: bool = False,
) -> list[Answer]:
    """Run requests to their end and return their answers in order.

    `heard(number, event, answer so far)` is told of every event. A request that fails ends all with UserError, or with
    `go_on` only itself: then its answer has the error.
    """
    answers: list[Answer] = []
    number_of: dict[int, int] = {}
    for number, request in enumerate(requests):
        number_of[engine.add(request)] = number
        answers.append(Answer())
    while not engine.idle:
        for event in engine.step():
            number = number_of[event.request_id]
            answer = answers[number]
            answer.text += event.text
            answer.finish, answer.error = event.finish, event.error
            if event.error is None:
                answer.events.append(event)
            elif not go_on:
                for left in number_of:
                    engine.cancel(left)
                raise UserError(event.error)
            if heard:
                heard(number, event, answer)
    return answers
