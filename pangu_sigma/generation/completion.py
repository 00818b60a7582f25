"""Completions: run requests on an engine to their end and collect the text of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pangu_sigma.errors import UserError
from pangu_sigma.generation.request import Event, Request

if TYPE_CHECKING:
    from pangu_sigma.generation.engine import Engine


@dataclass(repr=False)
class Completion:
    """Result of one request: `text` without the prompt, every token's event, why it ended; `error` is set where
    it failed."""

    text: str = ""
    events: list[Event] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None

    def __repr__(self) -> str:
        failed = "" if self.error is None else f", error={self.error!r}"
        return f"Completion({self.text!r}, tokens={len(self.events)}, finish={self.finish!r}{failed})"


def complete(
    engine: Engine,
    requests: Iterable[Request],
    on_event: Callable[[int, Event, Completion], None] | None = None,
    keep_going: bool = False,
) -> list[Completion]:
    """Run requests to their end and return their completions in order.

    `on_event(index, event, completion so far)` is called for every event. A request that fails ends all with UserError,
    or where the fault is the program's with its exception; with `keep_going` it ends only itself, and its completion
    has the error.
    """
    completions: list[Completion] = []
    index_of: dict[int, int] = {}
    for index, request in enumerate(requests):
        index_of[engine.add(request)] = index
        completions.append(Completion())
    while not engine.idle:
        for event in engine.step():
            index = index_of[event.request_id]
            completion = completions[index]
            completion.text += event.text
            completion.finish, completion.error = event.finish, event.error
            if event.error is None:
                completion.events.append(event)
            elif not keep_going:
                for request_id in index_of:
                    engine.cancel(request_id)
                raise event.exception or UserError(event.error)
            if on_event:
                on_event(index, event, completion)
    return completions
