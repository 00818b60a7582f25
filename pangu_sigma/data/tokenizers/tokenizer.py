"""Tokenizer interface: text to vocabulary ids and back, with a fingerprint of everything that decides the ids.

Every tokenizer states its end-of-document and padding ids, and never makes either of them out of text: a document that
contains the letters ``<eod>`` is encoded as those letters. `tokenizer_registry` knows the kinds and loads them.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from pangu_sigma.data.corpus_files import has_lone_surrogate
from pangu_sigma.errors import UserError, argument
from pangu_sigma.monitor.result_files import atomic_file

FORMAT_VERSION = 1
MODEL_FILE = "tokenizer.model"
INFO_FILE = "tokenizer.json"  # beside the model: kind, ids, fingerprint
# What ends documents in vocabularies that people use, the more special first; a model file's own word for it, and the
# </s> of Llama's family, come after them.
EOD_PIECES = (
    "<eod>", "<|endoftext|>", "<eot>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<|endofdocument|>", "<eos>"
)  # fmt: skip
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoding makes of bytes that are no character
_NO_EOD = ("<unk>", "<s>", "<pad>", "<bos>")  # not proposed as an end of documents


class Tokenizer(ABC):
    """Text to vocabulary ids and back: the interface that data, training, generation and export use.

    Attributes: ``kind`` (name in the configuration), ``vocab_size``, ``eod_id`` (ends every document), ``pad_id``
    (fills the last held-out sequence), ``fingerprint`` (sha256 hex of everything that decides the ids), ``companions``
    (files beside it, by name, that decide no id: see `hugging_face_files`).
    """

    kind: str
    replaces_each_byte = True  # whether decoding writes a replacement sign for each byte that is no character
    decodes_by_context = False  # whether a token's text depends on the token before it (beyond a text's beginning)

    def __init__(
        self, model: bytes, eod_id: int | str | None = None, pad_id: int | None = None, origin: str = "the given model"
    ):
        """`eod_id`: the id or the piece that ends documents; None takes the usual one. Raises UserError where it has
        none, or no such one; `origin` says which file is meant."""
        self.model = model
        self.companions: Mapping[str, bytes] = {}
        self._pieces = self._open(model, origin)
        self.vocab_size: int = self._pieces.get_piece_size()
        self.eod_id: int = self._find_eod(origin) if eod_id is None else self._given_eod(eod_id, origin)
        self.pad_id: int = self._find_pad() if pad_id is None else self._check("pad_id", pad_id)
        self._reserved = (self.eod_id, self.pad_id)
        settings = f"{self.kind}|{self.eod_id}|{self.pad_id}|{self._rules()}|".encode()
        self.fingerprint: str = hashlib.sha256(settings + model).hexdigest()

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Vocabulary ids of ``text``, without an end-of-document id. UserError for half a surrogate pair."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; end-of-document and padding give nothing. ValueError for an id outside the vocabulary."""

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """Ids that the tokenizer itself puts in front of a text (bos), where it does."""
        return ()

    def encode_with_special(self, text: str) -> list[int]:
        """As ``encode``, but special pieces that are spelt in the text become their ids: for a template's text."""
        return self.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """``encode`` of every text, as int32 arrays; faster than one at a time."""
        return [np.asarray(self.encode(text), dtype=np.int32) for text in texts]

    def piece(self, token_id: int) -> str:
        """The vocabulary entry of one id, as the model file spells it."""
        return self._pieces.id_to_piece(self._check("id", token_id))

    def token_bytes(self, token_id: int, before: tuple[int, ...] | None = None) -> bytes:
        """The UTF-8 bytes that an id adds to a text behind the ids `before` (None: anywhere but at its beginning).

        Exact where they are a part of a character; none for end-of-document, padding and control pieces.
        """
        if before is None:
            if token_id not in self._bytes_inside:
                self._bytes_inside[token_id] = self.token_bytes(token_id, self._some_text)
            return self._bytes_inside[token_id]
        text = self.decode([*before, token_id])[len(self.decode(before)) :]
        exact = self._bytes_of_piece(token_id) if UNFINISHED in text else None
        return text.encode("utf-8") if exact is None else exact

    @cached_property
    def _bytes_inside(self) -> dict[int, bytes]:
        return {}

    @cached_property
    def _some_text(self) -> tuple[int, ...]:
        """Ids of a text that is not empty."""
        for ids in (self.encode("a"), *([index] for index in range(self.vocab_size))):
            text = self.decode(ids)
            if text and UNFINISHED not in text:
                return tuple(ids)
        return ()

    def _bytes_of_piece(self, token_id: int) -> bytes | None:
        """The bytes of an id that stands for bytes instead of characters, None for others."""
        return None

    def ids_without_piece(self, rows: int) -> np.ndarray:
        """The ids int64 [N] below `rows`, a model's vocabulary, that stand for no piece: no text has them."""
        return np.arange(self.vocab_size, rows)

    def files(self) -> dict[str, bytes]:
        """``tokenizer.model`` and ``tokenizer.json``, which ``load_tokenizer`` reads, and the companions."""
        info = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "eod_id": self.eod_id,
            "pad_id": self.pad_id,
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
        }
        own = {INFO_FILE: (json.dumps(info, indent=2) + "\n").encode(), MODEL_FILE: self.model}
        return own | dict(self.companions)

    def save(self, folder: str | Path) -> None:
        """Write the files into ``folder``, each whole or not at all, ``tokenizer.json`` last: where it is, both are."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in reversed(self.files().items()):
            with atomic_file(Path(folder) / name) as temporary:
                temporary.write_bytes(content)

    @abstractmethod
    def _open(self, model: bytes, origin: str):
        """The vocabulary: a SentencePieceProcessor, or an object with its methods. UserError for a wrong file."""

    def _rules(self) -> str:
        """What decides the ids besides the model file (versions of a word splitter, for example)."""
        return ""

    def _find_eod(self, origin: str) -> int:
        for piece in EOD_PIECES:
            if (index := self._index(piece)) is not None:
                return index
        if self._pieces.eos_id() >= 0:
            return self._pieces.eos_id()
        if (index := self._index("</s>")) is not None:
            return index
        raise UserError(
            f"{origin} has no piece that usually ends documents ({', '.join(EOD_PIECES)}, </s>): {self._name_one()}"
        )

    def _given_eod(self, given: int | str, origin: str) -> int:
        index = given if isinstance(given, int) else self._index(given)
        if index is None or not 0 <= index < self.vocab_size:
            what = "id" if isinstance(given, int) else "piece"
            raise UserError(f"{origin} has no {what} {given}: {self._name_one()}")
        return index

    def _name_one(self) -> str:
        special = [name for name in self._pieces.special_pieces() if name not in _NO_EOD]
        has = f"; its special pieces are {', '.join(special[:20])}" if special else "; it has no special pieces"
        key = f"data.tokenizer.eod, or of an import {argument('eod_id')}"
        return f"give the piece or the id of its end of documents ({key}){has}"

    def _index(self, piece: str) -> int | None:
        """Id of an entry of the vocabulary, None where there is none that is spelt so."""
        index = self._pieces.piece_to_id(piece)
        return index if index >= 0 and self._pieces.id_to_piece(index) == piece else None

    @property
    def unk_id(self) -> int | None:
        """Id of the piece that stands for characters which the vocabulary cannot write; None if it has none."""
        return self._pieces.unk_id() if self._pieces.unk_id() >= 0 else None

    def _find_pad(self) -> int:
        """The model's own padding; else ``<s>``, which this product never feeds; else the end-of-document id."""
        if self._pieces.pad_id() >= 0:
            return self._pieces.pad_id()
        if (index := self._index("<pad>")) is not None:
            return index
        return self._pieces.bos_id() if self._pieces.bos_id() >= 0 else self.eod_id

    def _check(self, what: str, index: int) -> int:
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"{what} {index} is outside the vocabulary of {self.vocab_size} ids")
        return int(index)


def refuse_surrogates(text: str) -> None:
    """UserError when the text holds half a surrogate pair, which UTF-8 and so no model can say."""
    if has_lone_surrogate(text):
        raise UserError(f"the text {text[:40]!r} holds half a surrogate pair (\\ud800–\\udfff alone); repair the text")
