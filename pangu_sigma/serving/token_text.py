"""Text of single tokens, as the `logprobs` of an answer write them: the text, or the byte of a part of a character."""

from __future__ import annotations

import codecs
import re
from functools import lru_cache

from pangu_sigma.data.tokenizers.tokenizer import Tokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenText:
    """Text of token ids as OpenAI's API writes it: single bytes as `bytes:\\xe2`, special tokens by name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._reserved = (tokenizer.eod_id, tokenizer.pad_id)
        # A token is decoded behind this text: some tokenizers drop the space of a text's first word.
        self._before = tokenizer.encode("a")
        self._before_text = tokenizer.decode(self._before)
        self._cached = lru_cache(maxsize=1 << 16)(self._text_and_bytes)

    def text(self, token_id: int) -> str:
        """The token's text; different ids have different texts (as far as the tokenizer's pieces do)."""
        return self._cached(token_id)[0]

    def bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that the token adds to a text; none for a special token."""
        return self._cached(token_id)[1]

    def _text_and_bytes(self, token_id: int) -> tuple[str, bytes]:
        piece = self._tokenizer.piece(token_id)
        if token_id in self._reserved:
            return piece, b""
        if match := _BYTE_PIECE.fullmatch(piece):
            byte = int(match[1], 16)
            return f"bytes:\\x{byte:02x}", bytes([byte])
        text = self._tokenizer.decode([*self._before, token_id])[len(self._before_text) :]
        return (text, text.encode("utf-8")) if text else (piece, b"")


class Offsets:
    """Character offsets of tokens in a text, while they come one by one."""

    def __init__(self, start: int = 0) -> None:
        self._offset = start
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def next(self, data: bytes) -> int:
        """The offset of a token that adds `data`; a character of several tokens begins with its first."""
        begin = self._offset
        self._offset += len(self._decoder.decode(data))
        return begin
