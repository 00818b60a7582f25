"""Text of single tokens, as the `logprobs` of an answer write them: the text, or the bytes of a part of a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from functools import lru_cache

from pangu_sigma.data.tokenizers.tokenizer import Tokenizer


class TokenText:
    """Text of token ids as OpenAI's API writes it: what is no character alone as `bytes:\\xe2\\x82`, special tokens by
    name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cached = lru_cache(maxsize=1 << 16)(self._text_and_bytes)

    def text(self, token_id: int) -> str:
        """How the token is written in a list of tokens."""
        return self._cached(token_id)[0]

    def bytes(self, token_id: int, first: bool = False) -> bytes:
        """The UTF-8 bytes that the token adds to a text, or (`first`) begins it with; none for a special token."""
        data = self._cached(token_id)[1]
        # Some tokenizers begin a text's first word with a blank, which its text does not have.
        if first and data[:1] == b" " and not self._tokenizer.decode([token_id]).startswith(" "):
            return data[1:]
        return data

    def texts_apart(self, own: int, others: Iterable[int]) -> dict[int, str]:
        """The texts of a token and of others beside it; one that shows like another is written as `token_id:7`."""
        texts = {own: self.text(own)}
        for token_id in others:
            if token_id not in texts:
                text = self.text(token_id)
                texts[token_id] = f"token_id:{token_id}" if text in texts.values() else text
        return texts

    def _text_and_bytes(self, token_id: int) -> tuple[str, bytes]:
        data = self._tokenizer.token_bytes(token_id)
        piece = self._tokenizer.piece(token_id)
        if not data:
            return piece, data
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text = ""
        # A byte piece of an ASCII letter is another token than the letter's own.
        if not text or (len(data) == 1 and piece == f"<0x{data[0]:02X}>"):
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data
        return text, data


class Offsets:
    """Character offsets of tokens in a text, while they come one by one.

    before: ids of the text in front of the first token. start: its length in characters, where it is known otherwise.
    """

    def __init__(self, token_text: TokenText, before: Iterable[int] = (), start: int | None = None) -> None:
        self._token_text = token_text
        self._offset = 0
        self._begun = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in before:
            self.next(token_id)
        if start is not None:
            self._offset = start

    def next(self, token_id: int) -> int:
        """The offset of a token; a character of several tokens begins with its first."""
        begin = self._offset
        data = self._token_text.bytes(token_id, first=not self._begun)
        self._begun = self._begun or bool(self._token_text.bytes(token_id))
        self._offset += len(self._decoder.decode(data))
        return begin
