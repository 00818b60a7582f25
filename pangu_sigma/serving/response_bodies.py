"""The bodies of answers: choices, chunks, log-probabilities and usage, in OpenAI's two formats."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pangu_sigma.generation import Event, Score
from pangu_sigma.serving.token_text import Offsets, Spelling


@dataclass
class Usage:
    """Tokens of one HTTP request. A prompt counts once, whatever `n` is."""

    prompt: int
    written: int = 0

    def body(self) -> dict[str, int]:
        """OpenAI's object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.written,
            "total_tokens": self.prompt + self.written,
        }


@dataclass(frozen=True)
class Piece:
    """What one event adds to a choice: text, log-probabilities in the format's own form, and how the text ended.

    domains: with the last event of a text whose domain is inferred, those that wrote it and their probabilities.
    """

    text: str
    logprobs: dict[str, list[Any]] | None
    finish: str | None
    domains: dict[str, float] | None = None


def _domains(event: Event) -> dict[str, float] | None:
    return dict(event.domains) if event.finish is not None and event.domains else None


class CompletionChoice:
    """One choice of /v1/completions, event by event.

    With `echo` the prompt's text comes back in front, with its tokens but for the first `hidden` ones, which the server
    itself put there (the document's begin).
    """

    def __init__(self, spelling: Spelling, prompt_text: str, hidden: int, echo: bool, logprobs: int | None) -> None:
        self._spelling = spelling
        self._echo = prompt_text if echo else ""
        self._hidden = hidden
        self._logprobs = logprobs
        self._offsets = Offsets(0 if echo else len(prompt_text))

    def add(self, event: Event) -> Piece:
        """The next event's piece."""
        text, self._echo = self._echo + event.text, ""
        return Piece(text, None if self._logprobs is None else self._table(event), event.finish, _domains(event))

    def _table(self, event: Event) -> dict[str, list[Any]]:
        scores = list(event.prompt_scores[self._hidden :])
        if event.token_id is not None:
            scores.append(Score(event.token_id, event.logprob, event.top))
        table: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for score in scores:
            table["tokens"].append(self._spelling.text(score.token_id))
            table["token_logprobs"].append(score.logprob)
            table["top_logprobs"].append(self._alternatives(score))
            table["text_offset"].append(self._offsets.next(self._spelling.bytes(score.token_id)))
        return table

    def _alternatives(self, score: Score) -> dict[str, float] | None:
        """Likeliest tokens and the token itself; None where nothing comes before the token."""
        if score.logprob is None:
            return None
        found: dict[str, float] = {}
        for token_id, logprob in (*score.top, (score.token_id, score.logprob)):
            found.setdefault(self._spelling.text(token_id), logprob)
        return found


class ChatChoice:
    """One choice of /v1/chat/completions, event by event; blanks before the first word are left out."""

    def __init__(self, spelling: Spelling, logprobs: bool) -> None:
        self._spelling = spelling
        self._logprobs = logprobs
        self._begun = False

    def add(self, event: Event) -> Piece:
        """The next event's piece."""
        text = event.text if self._begun else event.text.lstrip()
        self._begun = self._begun or bool(text)
        table = None
        if self._logprobs:
            own = self._entry(event.token_id, event.logprob)
            table = {"content": [{**own, "top_logprobs": [self._entry(*other) for other in event.top]}]}
        return Piece(text, table, event.finish, _domains(event))

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._spelling.bytes(token_id)
        return {"token": self._spelling.text(token_id), "logprob": logprob, "bytes": list(data) or None}


@dataclass
class Whole:
    """A choice put together from its pieces, for answers that are not streamed."""

    text: str = ""
    logprobs: dict[str, list[Any]] | None = None
    finish: str | None = None
    domains: dict[str, float] | None = None
    _parts: list[str] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Append a piece."""
        self._parts.append(piece.text)
        if piece.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = {name: [] for name in piece.logprobs}
            for name, values in piece.logprobs.items():
                self.logprobs[name] += values
        if piece.finish is not None:
            self.text, self.finish, self.domains = "".join(self._parts), piece.finish, piece.domains
