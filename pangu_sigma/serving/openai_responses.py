"""Response bodies of OpenAI's completions and chat API: choices, log-probabilities, usage; whole or in chunks.

A `ResponseFormat` is the frame of one answer (id, time, model), with a subclass for each of the two API paths. Inside
it a choice object (`CompletionChoice`, `ChatChoice`) turns the engine's events into chunks. A streamed answer sends
them as they are; any other collects each choice's chunks in an `Answer`.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pangu_sigma.generation import Event, Score
from pangu_sigma.serving.token_text import Offsets, TokenText


@dataclass
class Usage:
    """Token counts of one HTTP request. A prompt counts once, whatever `n` is."""

    prompt: int
    written: int = 0

    def body(self) -> dict[str, int]:
        """OpenAI's `usage` object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.written,
            "total_tokens": self.prompt + self.written,
        }


@dataclass(frozen=True)
class Chunk:
    """Increment of a choice, made of one event: text, log-probabilities in the format's own form, the finish reason.

    domains: with the last event of a text whose domain is inferred, those that wrote it and their probabilities.
    """

    text: str
    logprobs: dict[str, list[Any]] | None
    finish: str | None
    domains: dict[str, float] | None = None


@dataclass
class Answer:
    """Full text of a choice, put together from its chunks, for responses that are not streamed."""

    text: str = ""
    logprobs: dict[str, list[Any]] | None = None
    finish: str | None = None
    domains: dict[str, float] | None = None
    _texts: list[str] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        """Append a chunk; `text` is there after the one with a finish reason."""
        self._texts.append(chunk.text)
        if chunk.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = {name: [] for name in chunk.logprobs}
            for name, values in chunk.logprobs.items():
                self.logprobs[name] += values
        if chunk.finish is not None:
            self.text, self.finish, self.domains = "".join(self._texts), chunk.finish, chunk.domains


class CompletionChoice:
    """One choice of /v1/completions, event by event.

    With `echo` the prompt's text comes back in front, with its tokens but for the first `hidden` ones, which the server
    itself put there (the document's begin).
    """

    def __init__(
        self, token_text: TokenText, prompt_text: str, prompt_ids: Sequence[int], hidden: int, echo: bool,
        logprobs: int | None,
    ) -> None:  # fmt: skip
        self._token_text = token_text
        self._echo = prompt_text if echo else ""
        self._hidden = hidden
        self._logprobs = logprobs
        before = () if echo or logprobs is None else prompt_ids
        # A text's length is its own, whatever its tokens have normalised; ids may end amid a character.
        self._offsets = Offsets(token_text, before, len(prompt_text) if before and hidden else None)

    def add(self, event: Event) -> Chunk:
        """The next event's chunk."""
        text, self._echo = self._echo + event.text, ""
        logprobs = None if self._logprobs is None else self._logprobs_table(event)
        return Chunk(text, logprobs, event.finish, _final_domains(event))

    def _logprobs_table(self, event: Event) -> dict[str, list[Any]]:
        scores = list(event.prompt_scores[self._hidden :])
        if event.token_id is not None:
            scores.append(Score(event.token_id, event.logprob, event.top))
        table: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for score in scores:
            table["tokens"].append(self._token_text.text(score.token_id))
            table["token_logprobs"].append(score.logprob)
            table["top_logprobs"].append(self._alternatives(score))
            table["text_offset"].append(self._offsets.next(score.token_id))
        return table

    def _alternatives(self, score: Score) -> dict[str, float] | None:
        """Likeliest tokens and the token itself; None where nothing comes before the token."""
        if score.logprob is None:
            return None
        logprobs = dict((*score.top, (score.token_id, score.logprob)))
        texts = self._token_text.texts_apart(score.token_id, logprobs)
        return {texts[token_id]: logprob for token_id, logprob in logprobs.items()}


class ChatChoice:
    """One choice of /v1/chat/completions, event by event; blanks before the first word are left out, of the tokens'
    bytes too."""

    def __init__(self, token_text: TokenText, logprobs: bool) -> None:
        self._token_text = token_text
        self._logprobs = logprobs
        self._begun = self._bytes_begun = False

    def add(self, event: Event) -> Chunk:
        """The next event's chunk."""
        text = event.text if self._begun else event.text.lstrip()
        self._begun = self._begun or bool(text)
        table = None
        if self._logprobs:
            own = self._entry(event.token_id, event.logprob)
            if own["bytes"]:
                own["bytes"] = self._without_first_blanks(bytes(own["bytes"]))
            table = {"content": [{**own, "top_logprobs": [self._entry(*other) for other in event.top]}]}
        return Chunk(text, table, event.finish, _final_domains(event))

    def _without_first_blanks(self, data: bytes) -> list[int]:
        """The bytes that a written token has in the text."""
        if not self._bytes_begun:
            with suppress(UnicodeDecodeError):  # a part of a character, which is no blank
                data = data.decode("utf-8").lstrip().encode("utf-8")
            self._bytes_begun = bool(data)
        return list(data)

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._token_text.bytes(token_id)
        return {"token": self._token_text.text(token_id), "logprob": logprob, "bytes": list(data) or None}


class ResponseFormat(ABC):
    """Frame of one response: the same id and time in all its chunks."""

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, model: str) -> None:
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def full_body(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        choices = [
            {
                "index": index,
                **self._answer_field(answer.text),
                "logprobs": answer.logprobs,
                "finish_reason": answer.finish,
                **_domains_field(answer),
            }
            for index, answer in enumerate(answers)
        ]
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage.body()}

    def chunk_body(self, index: int, chunk: Chunk) -> dict[str, Any]:
        """A stream's object for a chunk of choice `index`."""
        return self._stream_body([self._choice(index, self._delta_field(chunk.text), chunk)])

    def opening_body(self, index: int) -> dict[str, Any] | None:
        """A stream's object before the first chunk of choice `index`, if the format has one."""
        return None

    def usage_body(self, usage: Usage) -> dict[str, Any]:
        """A stream's last object, which has the usage and no choices."""
        return {**self._stream_body([]), "usage": usage.body()}

    def _stream_body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": choices}

    def _choice(self, index: int, delta: dict[str, Any], chunk: Chunk | None = None) -> dict[str, Any]:
        if chunk is None:
            return {"index": index, **delta, "logprobs": None, "finish_reason": None}
        return {
            "index": index,
            **delta,
            "logprobs": chunk.logprobs,
            "finish_reason": chunk.finish,
            **_domains_field(chunk),
        }

    @abstractmethod
    def _answer_field(self, text: str) -> dict[str, Any]:
        """Where a choice of this format keeps its full text."""

    @abstractmethod
    def _delta_field(self, text: str) -> dict[str, Any]:
        """Where a choice of this format keeps a chunk's text."""


class CompletionFormat(ResponseFormat):
    """Responses of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _answer_field(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta_field(self, text: str) -> dict[str, Any]:
        return {"text": text}


class ChatFormat(ResponseFormat):
    """Responses of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening_body(self, index: int) -> dict[str, Any]:
        """The role, which stands in the first object only."""
        return self._stream_body([self._choice(index, {"delta": {"role": "assistant", "content": ""}})])

    def _answer_field(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta_field(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


def _final_domains(event: Event) -> dict[str, float] | None:
    return dict(event.domains) if event.finish is not None and event.domains else None


def _domains_field(choice: Answer | Chunk) -> dict[str, Any]:
    """The inferred domains, an extension of OpenAI's format; nothing where the domain was given."""
    return {"domains": choice.domains} if choice.domains else {}
