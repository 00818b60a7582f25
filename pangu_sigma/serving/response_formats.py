"""The two kinds of answer around their choices: whole bodies and the chunks of a stream, as OpenAI writes them."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from pangu_sigma.serving.response_bodies import Piece, Usage, Whole


def _told(end: Whole | Piece) -> dict[str, Any]:
    """The inferred domains, an extension of OpenAI's format; nothing where the domain was given."""
    return {"domains": end.domains} if end.domains else {}


class Form(ABC):
    """One answer's frame: the same id and time in all its chunks."""

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, model: str) -> None:
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Whole], usage: Usage) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        bodies = [
            {
                "index": index,
                **self._whole(choice),
                "logprobs": choice.logprobs,
                "finish_reason": choice.finish,
                **_told(choice),
            }
            for index, choice in enumerate(choices)
        ]
        return {**self._head, "object": self.kind, "choices": bodies, "usage": usage.body()}

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of choice `index`."""
        return self._chunk([self._choice(index, self._part(piece.text), piece)])

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says of choice `index` before its first piece, if anything."""
        return None

    def closing(self, usage: Usage) -> dict[str, Any]:
        """The chunk without choices that tells the usage."""
        return {**self._chunk([]), "usage": usage.body()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": choices}

    def _choice(self, index: int, part: dict[str, Any], piece: Piece | None = None) -> dict[str, Any]:
        if piece is None:
            return {"index": index, **part, "logprobs": None, "finish_reason": None}
        return {
            "index": index, **part, "logprobs": piece.logprobs, "finish_reason": piece.finish, **_told(piece)
        }  # fmt: skip

    @abstractmethod
    def _whole(self, choice: Whole) -> dict[str, Any]:
        """A choice's text in this form."""

    @abstractmethod
    def _part(self, text: str) -> dict[str, Any]:
        """A piece's text in this form."""


class CompletionForm(Form):
    """/v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _whole(self, choice: Whole) -> dict[str, Any]:
        return {"text": choice.text}

    def _part(self, text: str) -> dict[str, Any]:
        return {"text": text}


class ChatForm(Form):
    """/v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any]:
        """The role, which stands in the first chunk only."""
        return self._chunk([self._choice(index, {"delta": {"role": "assistant", "content": ""}})])

    def _whole(self, choice: Whole) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": choice.text, "refusal": None}}

    def _part(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}
