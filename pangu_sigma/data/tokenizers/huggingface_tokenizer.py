"""Hugging Face tokenizer: a `tokenizer.json` of the `tokenizers` library, as imported models bring theirs.

The file is read by that library alone (an extra of this package): it holds no code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np

from pangu_sigma.data.tokenizers.tokenizer import Tokenizer, refuse_surrogates
from pangu_sigma.errors import UserError
from pangu_sigma.json_reader import LARGE, UnreadableText, decoded, parse_object

# Classes of transformers that write the post-processor themselves -> their default of `add_bos_token`.
_ADDS_BOS = {"GPTNeoXTokenizer": False, "LlamaTokenizer": True, "CodeLlamaTokenizer": True, "GemmaTokenizer": True}
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class _Vocabulary:
    """The library's vocabulary with the methods of a SentencePieceProcessor; -1 where it has no such id."""

    def __init__(self, model: bytes, origin: str) -> None:
        if find_spec("tokenizers") is None:
            raise UserError(f"{origin} needs the package tokenizers: pip install 'pangu-sigma[tokenizers]'")
        import tokenizers

        try:
            values = parse_object(model, LARGE)
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
        self.decoders = frozenset(_decoder_types(values.get("decoder")))

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


def _decoder_types(decoder: Any) -> Iterator[str]:
    """The types of a file's decoder and of those that it is a sequence of; None has none."""
    if decoder is not None:
        yield decoder["type"]
        for one in decoder.get("decoders", ()):
            yield from _decoder_types(one)


def _byte_alphabet() -> dict[str, int]:
    """The byte of each character in which byte-level BPE spells its pieces: printable Latin-1 characters are their own
    byte, the others follow from U+0100 on (Radford et al. 2019, GPT-2's encoder)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


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

    @cached_property
    def begin_ids(self) -> tuple[int, ...]:
        """What transformers puts in front of a text: the file's post-processor, or for classes that make that anew the
        bos if `add_bos_token` says so."""
        settings = parse_object(self.companions.get("tokenizer_config.json", b"{}"))
        default = _ADDS_BOS.get(str(settings.get("tokenizer_class")).removesuffix("Fast"))
        if default is not None:
            bos = settings.get("bos_token")
            bos = bos.get("content") if isinstance(bos, dict) else bos
            adds = settings.get("add_bos_token", default) is True and isinstance(bos, str)
            index = self._pieces.piece_to_id(bos) if adds else -1
            return (index,) if index >= 0 else ()
        whole = self._pieces.library.encode("a", add_special_tokens=True)
        first = next((i for i, special in enumerate(whole.special_tokens_mask) if not special), 0)
        return tuple(whole.ids[:first])

    @cached_property
    def _with_special(self):
        """The library's tokenizer that reads special pieces in a text."""
        library = self._open(self.model, "the tokenizer").library
        library.encode_special_tokens = False
        return library

    def encode_with_special(self, text: str) -> list[int]:
        refuse_surrogates(text)
        return self._with_special.encode(text, add_special_tokens=False).ids

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

    @property
    def replaces_each_byte(self) -> bool:  # type: ignore[override]
        """Not where pieces are spelt in bytes: there a broken character gets one sign."""
        return "ByteLevel" not in self._pieces.decoders

    @property
    def decodes_by_context(self) -> bool:  # type: ignore[override]
        """Where the mark of a word's end becomes a blank only before another word."""
        return not self._pieces.decoders.isdisjoint({"BPEDecoder", "CTC"})

    @cached_property
    def _alphabet(self) -> dict[str, int]:
        return _byte_alphabet()

    def _bytes_of_piece(self, token_id: int) -> bytes | None:
        piece = self.piece(token_id)
        if "ByteLevel" in self._pieces.decoders and all(letter in self._alphabet for letter in piece):
            return bytes(self._alphabet[letter] for letter in piece)
        if "ByteFallback" in self._pieces.decoders and (byte := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        return None

    def _checked(self, text: str, ids: list[int]) -> list[int]:
        if any(index in self._reserved for index in ids):
            raise UserError(
                f"the tokenizer makes its reserved id out of the text {text[:40]!r}; give another eod_id or pad_id"
            )
        return ids
