"""PanGu-α tokenizer, as published: jieba words, then the SentencePiece model ``vocab.model`` (40,000 pieces).

Scheme of huawei-noah/Pretrained-Language-Model, PanGu-α: cut with jieba, write a space as U+2582 and a line end as
U+2583, join the words with spaces, encode. Decoding drops the spaces and turns the two signs back. The vocabulary has
no byte fallback and normalises (NFKC), so a text is not always recovered exactly.
"""

import logging
from collections.abc import Iterable
from functools import cached_property

import jieba

from pangu_sigma.data.tokenizers.sentencepiece_tokenizer import SentencePieceModel
from pangu_sigma.data.tokenizers.tokenizer import refuse_surrogates
from pangu_sigma.errors import UserError

DEFAULT_EOD = "<eot>"  # id 9: what PanGu-α's released training code used; later code also used <pad> (6)
_TO_SIGNS = str.maketrans(" \n", "\u2582\u2583")
_TO_TEXT = str.maketrans("\u2582\u2583", " \n", " ")


class PanguAlphaTokenizer(SentencePieceModel):
    """jieba + SentencePiece as PanGu-α was trained; `eod_id` defaults to ``<eot>`` (9), `pad_id` to ``<pad>`` (6)."""

    kind = "pangu_alpha"

    @cached_property
    def _jieba(self) -> jieba.Tokenizer:
        # An instance of its own: jieba's module-wide one may have got a user's dictionary, which changes the ids.
        jieba.setLogLevel(logging.WARNING)
        return jieba.Tokenizer()

    def encode(self, text: str) -> list[int]:
        refuse_surrogates(text)
        words = (word.translate(_TO_SIGNS) for word in self._jieba.cut(text))
        return self._encode_text(" ".join(words))

    def decode(self, ids: Iterable[int]) -> str:
        return super().decode(ids).translate(_TO_TEXT)

    def _rules(self) -> str:
        return f"jieba {jieba.__version__}"

    def _find_eod(self, origin: str) -> int:
        index = self._index(DEFAULT_EOD)
        if index is None:
            raise UserError(
                f"{origin} has no piece {DEFAULT_EOD}: it is not PanGu-α's vocab.model; use kind sentencepiece"
            )
        return index
