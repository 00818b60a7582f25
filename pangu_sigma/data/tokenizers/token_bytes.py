"""Exact bytes of the tokens of a text, and the text of bytes: both token by token, parts of characters among them."""

from __future__ import annotations

import codecs
import copy
from collections.abc import Iterable

from pangu_sigma.data.tokenizers.tokenizer import UNFINISHED, Tokenizer

# More tokens than any tokenizer writes without a letter of them showing because a text begins with them.
LONGEST_BEGINNING = 16


class TokenBytes:
    """Bytes that each token of one text adds to it: joined, they are the text's UTF-8.

    Where a text begins, some tokenizers leave a blank of the first word out, so what a token adds depends on whether
    any text comes before it.
    """

    def __init__(self, tokenizer: Tokenizer, before: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._beginning: list[int] | None = []  # None once the text has begun
        self._last: int | None = None
        for token_id in before:
            self.push(token_id)

    def push(self, token_id: int) -> bytes:
        """The bytes of the next token; none for one that shows nothing."""
        data = self.peek(token_id)
        if data:
            self._beginning = None
            self._last = token_id
        elif self._beginning is not None and self._tokenizer.token_bytes(token_id):
            self._beginning = [*self._beginning, token_id][-LONGEST_BEGINNING:]
        return data

    def peek(self, token_id: int) -> bytes:
        """What `push` would return."""
        if self._beginning is not None:
            return self._tokenizer.token_bytes(token_id, tuple(self._beginning))
        if self._tokenizer.decodes_by_context and self._last is not None:
            return self._tokenizer.token_bytes(token_id, (self._last,))
        return self._tokenizer.token_bytes(token_id)

    def copy(self) -> TokenBytes:
        """Another one at the same place of the text."""
        return copy.copy(self)


class Utf8Decoder:
    """Incremental decoder of UTF-8 in which invalid bytes become replacement signs, as the tokenizer's `decode` puts
    them: one for each byte, or one for each broken character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._sign_for_each_byte = tokenizer.replaces_each_byte
        self.length = 0  # characters returned so far
        self.pending = b""  # bytes of a character that may still be finished

    def push(self, data: bytes, final: bool = False) -> str:
        """The characters that are certain now; with `final`, also of what was never finished."""
        rest, parts = self.pending + data, []
        while True:
            try:
                text, used = codecs.utf_8_decode(rest, "strict", final)
            except UnicodeDecodeError as error:
                signs = error.end - error.start if self._sign_for_each_byte else 1
                parts += [rest[: error.start].decode("utf-8"), UNFINISHED * signs]
                rest = rest[error.end :]
                continue
            parts.append(text)
            self.pending = rest[used:]
            text = "".join(parts)
            self.length += len(text)
            return text

    def offset_of(self, data: bytes) -> int:
        """The offset, in characters of the text, of the character in which a token's bytes begin; then push them."""
        if not data:
            return self.length
        before, text = self.length, self.push(data[:1])
        offset = before + len(text) - (0 if self.pending else 1)
        self.push(data[1:])
        return offset

    def copy(self) -> Utf8Decoder:
        """Another one at the same place of the text."""
        return copy.copy(self)
