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
from pangu_sigma.generation.token_text import PromptText, TokenTexts, spelt_apart


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
    itself put there (the document's begin). texts: at the place where the first token that is told begins, None
    without log-probabilities.
    """

    def __init__(self, prompt: PromptText, hidden: int, echo: bool, texts: TokenTexts | None) -> None:
        self._prompt: PromptText | None = prompt if echo else None
        self._hidden = hidden
        self._texts = texts

    def add(self, event: Event) -> Chunk:
        """The next event's chunk."""
        prompt, self._prompt = self._prompt, None
        logprobs = None if self._texts is None else self._logprobs_table(self._texts, event, prompt)
        text = event.text
        if prompt is not None:
            # A last character that the prompt does not finish comes with the answer, if there is one.
            text = prompt.finished + (prompt.unfinished if event.token_id is None else text)
        return Chunk(text, logprobs, event.finish, _final_domains(event))

    def _logprobs_table(self, texts: TokenTexts, event: Event, prompt: PromptText | None) -> dict[str, list[Any]]:
        table: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

        def add(score: Score, longest: int | None = None) -> None:
            table["tokens"].append(texts.token(score.token_id).text)
            table["token_logprobs"].append(score.logprob)
            table["top_logprobs"].append(_alternatives(texts, score))
            offset = texts.push(score.token_id)
            table["text_offset"].append(offset if longest is None else min(offset, longest))

        if prompt is not None:
            for score in event.prompt_scores[self._hidden :]:
                add(score, len(prompt.finished))
            texts.move_to(len(prompt.finished))
        if event.token_id is not None:
            add(Score(event.token_id, event.logprob, event.top))
        return table


def _alternatives(texts: TokenTexts, score: Score) -> dict[str, float] | None:
    """Likeliest tokens and the token itself, each under a name of its own; None where nothing comes before it."""
    if score.logprob is None:
        return None
    listed = dict((*score.top, (score.token_id, score.logprob)))
    names = spelt_apart(texts.token(score.token_id), [texts.token(token_id) for token_id in listed])
    return {names[token_id]: logprob for token_id, logprob in listed.items()}


class ChatChoice:
    """One choice of /v1/chat/completions, event by event; blanks before the first word are left out, of the bytes of
    its tokens too.

    texts: at the place where the answer begins, None without log-probabilities.
    """

    def __init__(self, texts: TokenTexts | None) -> None:
        self._texts = texts
        self._begun = self._bytes_begun = False

    def add(self, event: Event) -> Chunk:
        """The next event's chunk."""
        text = event.text if self._begun else event.text.lstrip()
        self._begun = self._begun or bool(text)
        table = None
        if self._texts is not None:
            own = _entry(self._texts, event.token_id, event.logprob)
            own["bytes"] = self._without_first_blanks(own["bytes"])
            table = {"content": [{**own, "top_logprobs": [_entry(self._texts, *other) for other in event.top]}]}
            self._texts.push(event.token_id)
        return Chunk(text, table, event.finish, _final_domains(event))

    def _without_first_blanks(self, data: list[int] | None) -> list[int] | None:
        if data is None or self._bytes_begun:
            return data
        with suppress(UnicodeDecodeError):  # a part of a character, which is no blank
            data = list(bytes(data).decode("utf-8").lstrip().encode("utf-8"))
        self._bytes_begun = bool(data)
        return data


def _entry(texts: TokenTexts, token_id: int, logprob: float) -> dict[str, Any]:
    token = texts.token(token_id)
    return {"token": token.text, "logprob": logprob, "bytes": list(token.bytes) or None}


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
