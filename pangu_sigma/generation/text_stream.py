"""Incremental detokenizer: unfinished characters wait, and a stop string ends the text before it."""

from __future__ import annotations

from pangu_sigma.data.tokenizers.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# An unfinished character has at most 3 bytes; more replacement signs than that are the model's own invalid bytes.
LONGEST_UNFINISHED = 3


class TextStream:
    """Incremental detokenizer of one answer: what `push` and `close` return, joined, is the text before the stop
    string.

    `prefix_ids` are tokens in front of the answer: some tokenizers write the first word of a text differently.
    """

    def __init__(self, tokenizer: Tokenizer, prefix_ids: tuple[int, ...], stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        # Decoding begins a few tokens back and is moved on, so that a long text is not decoded anew at every token.
        self._ids = list(prefix_ids[-LONGEST_UNFINISHED - 1 :])
        self._decoded = self._clean(self._decode())
        self._pending = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is certain now. Sets `stopped` when a stop string is complete."""
        self._ids.append(token_id)
        text = self._decode()
        clean = self._clean(text)
        self._pending += clean[len(self._decoded) :]
        self._decoded = clean
        if clean == text and len(self._ids) > 16:
            self._restart()
        return self._release(final=False)

    def close(self) -> str:
        """The end of the text: what was still held back, with bytes that never became a character."""
        if self.stopped:
            return ""
        self._pending += self._decode()[len(self._decoded) :]
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

    def _restart(self) -> None:
        self._ids = self._ids[-LONGEST_UNFINISHED - 1 :]
        self._decoded = self._decode()

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids)

    @staticmethod
    def _clean(text: str) -> str:
        """`text` without the replacement signs of a character that may still be finished."""
        end = len(text)
        while end > 0 and len(text) - end < LONGEST_UNFINISHED and text[end - 1] == UNFINISHED:
            end -= 1
        return text[:end]
