"""Incremental detokenizer: unfinished characters wait, and a stop string ends the text before it."""

from __future__ import annotations

from collections.abc import Sequence

from pangu_sigma.data.tokenizers.token_bytes import LONGEST_BEGINNING, TokenBytes, Utf8Decoder
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer

_LONGEST_UNFINISHED = 3  # bytes of a character


class TextStream:
    """Incremental detokenizer of one answer: what `push` and `close` return, joined, is the text before the stop
    string.

    `prefix_ids` are tokens in front of the answer: some tokenizers write the first word of a text differently. A
    character that they begin and do not finish comes with the answer, whole or as replacement signs.
    """

    def __init__(self, tokenizer: Tokenizer, prefix_ids: Sequence[int], stop: tuple[str, ...] = ()) -> None:
        self._bytes = TokenBytes(tokenizer)
        self._decoder = Utf8Decoder(tokenizer)
        self._stop = stop
        self._pending = ""
        self.stopped = False
        for token_id in _end(tokenizer, prefix_ids):
            self._decoder.push(self._bytes.push(token_id))

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is certain now. Sets `stopped` when a stop string is complete."""
        self._pending += self._decoder.push(self._bytes.push(token_id))
        return self._release(final=False)

    def close(self) -> str:
        """The end of the text: what was still held back, with bytes that never became a character."""
        if self.stopped:
            return ""
        self._pending += self._decoder.push(b"", final=True)
        return self._release(final=True)

    def _release(self, final: bool) -> str:
        stops = [index for index in (self._pending.find(text) for text in self._stop) if index >= 0]
        if stops:
            text, self._pending, self.stopped = self._pending[: min(stops)], "", True
            return text
        keep = 0 if final else self._possible_stop()
        text, self._pending = self._pending[: len(self._pending) - keep], self._pending[len(self._pending) - keep :]
        return text

    def _possible_stop(self) -> int:
        """Length of the longest end of the pending text with which a stop string could begin."""
        longest = max((len(text) - 1 for text in self._stop), default=0)
        for length in range(min(longest, len(self._pending)), 0, -1):
            if any(text.startswith(self._pending[-length:]) for text in self._stop):
                return length
        return 0


def _end(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """The last tokens of a prompt: in them its last character lies, and they are more than leave a text empty."""
    end: list[int] = []
    for token_id in reversed(ids):
        if tokenizer.token_bytes(token_id):
            end.append(token_id)
        if len(end) > _LONGEST_UNFINISHED + LONGEST_BEGINNING:
            break
    return end[::-1]
