"""Text, bytes and offset of each token of a text, as log-probabilities tell them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pangu_sigma.data.tokenizers.token_bytes import TokenBytes, Utf8Decoder
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.generation.text_stream import TextStream


@dataclass(frozen=True)
class TokenText:
    """One token in its text: the bytes that it adds (none for a special token), and how it is spelt.

    text: the token's text; `bytes:\\xe4\\xbd` where the bytes alone are no characters; a special token's name.
    """

    token_id: int
    text: str
    bytes: bytes


class TokenTexts:
    """Token texts of one text, while its tokens come one by one."""

    def __init__(self, tokenizer: Tokenizer, before: Iterable[int] = (), copied_from: TokenTexts | None = None) -> None:
        self._tokenizer = tokenizer
        self._bytes = copied_from._bytes.copy() if copied_from else TokenBytes(tokenizer)
        self._decoder = copied_from._decoder.copy() if copied_from else Utf8Decoder(tokenizer)
        for token_id in before:
            self.push(token_id)

    def copy(self) -> TokenTexts:
        """Another one at the same place of the text."""
        return TokenTexts(self._tokenizer, copied_from=self)

    def move_to(self, length: int) -> None:
        """Count on from `length` characters: those of a text that the tokenizer does not give back as it was."""
        self._decoder.length = length

    def token(self, token_id: int) -> TokenText:
        """A token as it would stand at this place of the text."""
        data = self._bytes.peek(token_id)
        return TokenText(token_id, spelt(data) if data else self._tokenizer.piece(token_id), data)

    def push(self, token_id: int) -> int:
        """Go behind a token; return the offset, in characters of the text, of the character in which it begins."""
        return self._decoder.offset_of(self._bytes.push(token_id))


@dataclass(frozen=True)
class PromptText:
    """Text of a prompt: its finished characters, and what becomes of bytes after them if nothing follows."""

    finished: str
    unfinished: str = ""

    @classmethod
    def of(cls, tokenizer: Tokenizer, ids: Iterable[int]) -> PromptText:
        """The text of ids."""
        stream = TextStream(tokenizer, ())
        return cls("".join(stream.push(token_id) for token_id in ids), stream.close())


def spelt(data: bytes) -> str:
    """The text of bytes; `bytes:\\xe4\\xbd` where they are no characters, as OpenAI's completions have it."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return _in_bytes(data)


def spelt_apart(own: TokenText, others: Sequence[TokenText]) -> Mapping[int, str]:
    """A spelling for each id, none twice: those that show like one before them are spelt in bytes, or as
    `token_id:ID`."""
    taken: dict[str, int] = {}
    for token in (own, *others):
        if token.token_id not in taken.values():
            taken[next(name for name in _spellings(token) if name not in taken)] = token.token_id
    return {token_id: name for name, token_id in taken.items()}


def _spellings(token: TokenText) -> Iterator[str]:
    yield token.text
    if token.bytes:
        yield _in_bytes(token.bytes)
    yield f"token_id:{token.token_id}"


def _in_bytes(data: bytes) -> str:
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
