"""Conversations as prompts: by the chat template that came with the model, or by our plain one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pangu_sigma.data import chat_template
from pangu_sigma.data.imported_chat_template import imported_template
from pangu_sigma.data.tokenizers.hugging_face_files import end_ids
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.generation.request import prompt_ids


@dataclass(frozen=True)
class ChatPrompt:
    """Ids of a conversation, the end of a document in front, and the texts and ids that end its answer."""

    ids: tuple[int, ...]
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]


class ChatPrompts:
    """Makes the prompts of a model's conversations. Raises UserError for an imported template that is broken."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._template = imported_template(tokenizer)
        self._end_ids = end_ids(tokenizer.companions, tokenizer.vocab_size)

    def prompt(self, turns: Sequence[tuple[str, str]]) -> ChatPrompt:
        """The prompt of a conversation of (role, text); an assistant's last turn is continued. Raises UserError."""
        if self._template is None:
            ids = prompt_ids(self._tokenizer, chat_template.as_text(turns))
            return ChatPrompt(ids, chat_template.stops(turns), self._end_ids)
        written = self._tokenizer.encode_with_special(self._template.render(turns))
        # The template writes its own bos; an end of a document in front is there already where that is it.
        eod = self._tokenizer.eod_id
        return ChatPrompt(tuple(written if written[:1] == [eod] else [eod, *written]), (), self._end_ids)
