"""Hugging Face tokenizer: a `tokenizer.json` of the `tokenizers` library, as imported models bring theirs.

The file is read by that library alone (an extra of this package): it holds no code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np

from pangu_sigma.data.tokenizers.tokenizer import Tokenizer, refuse_surrogates
from pangu_sigma.errors import UserError
from pangu_sigma.json_reader import LARGE, UnreadableText, decoded, parse_object

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def _kinds(decoder: Any) -> frozenset[str]:
    """Types of a decoder and of those that a sequence has inside."""
    if not isinstance(decoder, dict):
        return frozenset()
    inner = decoder.get("decoders")
    kinds = [_kinds(part) for part in inner] if isinstance(inner, list) else []
    return frozenset({str(decoder.get("type"))}).union(*kinds)


def _byte_alphabet() -> dict[str, int]:
    """Letter -> byte of byte-level BPE (GPT-2's): printable letters of Latin-1 stand for themselves, those from U+0100
    on for the other bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class _Vocabulary:
    """The library's vocabulary with the methods of a SentencePieceProcessor; -1 where it has no such id."""

    def __init__(self, model: bytes, origin: str) -> None:
        if find_spec("tokenizers") is None:
            raise UserError(f"{origin} needs the package tokenizers: pip install 'pangu-sigma[tokenizers]'")
        import tokenizers

        try:
            self.decoders = _kinds(parse_object(model, LARGE).get("decoder"))
            self.library = tokenizers.Tokenizer.from_str(decoded(model, LARGE.bytes))
        except (KeyboardInterrupt, SystemExit):
            raise
        except UnreadableText as error:
            raise UserError(f"{error.at(origin)}: give a tokenizer.json of Hugging Face's tokenizers") from error
        except BaseException as error:  # the library raises nothing narrower, and a panic of Rust is no Exception
            raise UserError(f"{origin} is no tokenizer.json of Hugging Face's tokenizers: give another file") from error
        # Text never becomes a special id, whatever its letters spell; and nothing is padded or cut.
        self.library.encode_special_tokens = True
        self.library.no_padding()
        self.library.no_truncation()
        self.version = tokenizers.__version__

    def get_piece_size(self) -> int:
        # Not their count: ids may have gaps.
        return max(self.library.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def piece_to_id(self, piece: str) -> int:
        index = self.library.token_to_id(piece)
        return -1 if index is None else index

    def id_to_piece(self, index: int) -> str:
        return self.library.id_to_token(index) or ""

    def special_pieces(self) -> list[str]:
        added = self.library.get_added_tokens_decoder()
        return [token.content for _, token in sorted(added.items()) if token.special]

    def unk_id(self) -> int:
        named = getattr(self.library.model, "unk_token", None)
        ids = (self.piece_to_id(piece) for piece in (named, "<unk>", "[UNK]", "<|unk|>") if piece)
        return next((index for index in ids if index >= 0), -1)

    def eos_id(self) -> int:
        return -1

    bos_id = eos_id

    def pad_id(self) -> int:
        ids = (self.piece_to_id(piece) for piece in ("<|padding|>", "<pad>", "[PAD]"))
        return next((index for index in ids if index >= 0), -1)


class HuggingFaceTokenizer(Tokenizer):
    """Ids as the `tokenizers` library gives them, without the special ids that a post-processor would add."""

    kind = "huggingface"

    def _open(self, model: bytes, origin: str) -> _Vocabulary:
        return _Vocabulary(model, origin)

    def ids_without_piece(self, rows: int) -> np.ndarray:
        return np.setdiff1d(np.arange(rows), list(self._pieces.library.get_vocab(with_added_tokens=True).values()))

    def encode(self, text: str) -> list[int]:
        refuse_surrogates(text)
        return self._checked(text, self._pieces.library.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            refuse_surrogates(text)
        encodings = self._pieces.library.encode_batch(list(texts), add_special_tokens=False)
        return [
            np.asarray(self._checked(text, encoding.ids), dtype=np.int32)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        kept = [self._check("id", int(index)) for index in ids if index not in self._reserved]
        return self._pieces.library.decode(kept, skip_special_tokens=False)

    @cached_property
    def _letters(self) -> dict[str, int]:
        return _byte_alphabet()

    def token_bytes(self, token_id: int) -> bytes:
        """See `Tokenizer`; byte-level pieces and those of byte fallback are their bytes, whole characters or not."""
        piece = self.piece(token_id)
        if token_id in self._reserved or not piece:
            return b""
        if "ByteLevel" in self._pieces.decoders:
            # As the library's decoder: a piece with any other letter is taken as it is spelt.
            known = all(letter in self._letters for letter in piece)
            return bytes(self._letters[letter] for letter in piece) if known else piece.encode("utf-8")
        if "ByteFallback" in self._pieces.decoders and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        return super().token_bytes(token_id)

    def _checked(self, text: str, ids: list[int]) -> list[int]:
        if any(index in self._reserved for index in ids):
            raise UserError(
                f"the tokenizer makes its reserved id out of the text {text[:40]!r}; give another eod_id or pad_id"
            )
        return ids
