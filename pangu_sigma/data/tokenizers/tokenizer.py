"""The tokenizer interface, and the SentencePiece tokenizer behind it.

Every tokenizer states its end-of-document and padding ids, and never makes either of them out of text: a document that
contains the letters ``<eod>`` is encoded as those letters.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import sentencepiece

from pangu_sigma.data.corpus_files import has_lone_surrogate
from pangu_sigma.errors import UserError

FORMAT_VERSION = 1
MODEL_FILE = "tokenizer.model"
INFO_FILE = "tokenizer.json"  # beside the model: kind, ids, fingerprint
_SPACE = "\u2581"  # SentencePiece's own sign for a space; as a character of the text it needs care
_THREADS = 2


class Tokenizer(ABC):
    """Text to vocabulary ids and back.

    Attributes: ``kind`` (name in the configuration), ``vocab_size``, ``eod_id`` (ends every document), ``pad_id``
    (fills the last held-out sequence), ``fingerprint`` (sha256 hex of everything that decides the ids).
    """

    kind: str

    def __init__(self, model: bytes, eod_id: int | None, pad_id: int | None, origin: str = "the given model"):
        self.model = model
        self._pieces = self._open(model, origin)
        self.vocab_size: int = self._pieces.get_piece_size()
        self.eod_id: int = self._find_eod(origin) if eod_id is None else self._check("eod_id", eod_id)
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

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """``encode`` of every text, as int32 arrays; faster than one at a time."""
        return [np.asarray(self.encode(text), dtype=np.int32) for text in texts]

    def piece(self, token_id: int) -> str:
        """The vocabulary entry of one id, as the model file spells it."""
        return self._pieces.id_to_piece(self._check("id", token_id))

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.model`` and ``tokenizer.json`` into ``folder``; ``load_tokenizer`` reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        info = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "eod_id": self.eod_id,
            "pad_id": self.pad_id,
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
        }
        (folder / MODEL_FILE).write_bytes(self.model)
        (folder / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")

    def _open(self, model: bytes, origin: str):
        """What knows the vocabulary: a SentencePieceProcessor, or what has its methods. UserError for a wrong file."""
        return _processor(model, origin)

    def _rules(self) -> str:
        """What decides the ids besides the model file (versions of a word splitter, for example)."""
        return ""

    def _find_eod(self, origin: str) -> int:
        for piece in ("<eod>", "<|endoftext|>", "<eot>"):
            index = self._pieces.piece_to_id(piece)
            if index != self._pieces.unk_id() and self._pieces.id_to_piece(index) == piece:
                return index
        if self._pieces.eos_id() >= 0:
            return self._pieces.eos_id()
        raise UserError(f"{origin} has no end-of-document piece (<eod>, <|endoftext|>, <eot> or </s>); give eod_id")

    def _find_pad(self) -> int:
        """The model's own padding; else ``<s>``, which this product never feeds; else the end-of-document id."""
        if self._pieces.pad_id() >= 0:
            return self._pieces.pad_id()
        index = self._pieces.piece_to_id("<pad>")
        if index != self._pieces.unk_id():
            return index
        return self._pieces.bos_id() if self._pieces.bos_id() >= 0 else self.eod_id

    def _check(self, what: str, index: int) -> int:
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"{what} {index} is outside the vocabulary of {self.vocab_size} ids")
        return int(index)

    def _decode_ids(self, ids: Iterable[int]) -> str:
        """SentencePiece's decoding, without the reserved ids (user-defined ones would come out as text)."""
        kept = [int(index) for index in ids if index not in self._reserved]
        for index in kept:
            self._check("id", index)
        return self._pieces.decode(kept)

    def _encode_text(self, text: str) -> list[int]:
        """SentencePiece's encoding of ``text``, cut wherever a reserved id would come out of it.

        Control pieces are never made from text, but some models (PanGu-α's) declare theirs as user-defined.
        """
        ids = self._pieces.encode(text)
        if not any(index in self._reserved for index in ids):
            return ids
        for index in self._reserved:
            piece = self._pieces.id_to_piece(index)
            if len(piece) > 1 and piece in text:
                ids = []
                parts = text.split(piece)
                for number, part in enumerate(parts):
                    left = piece[1:] if number else ""
                    right = piece[:1] if number < len(parts) - 1 else ""
                    ids += self._encode_text(left + part + right)
                return ids
        raise UserError(
            f"the tokenizer makes its reserved id out of the text {text[:40]!r}; give another eod_id or pad_id"
        )


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, given as a file or trained (``train_tokenizer``).

    With byte fallback, identity normalisation and no dummy prefix, which is what training makes,
    ``decode(encode(x)) == x`` holds for every text; other models are as exact as their own settings.
    """

    kind = "sentencepiece"

    def __init__(
        self, model: bytes, eod_id: int | None = None, pad_id: int | None = None, origin: str = "the given model"
    ):
        super().__init__(model, eod_id, pad_id, origin)
        ids = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode("utf-8")]
        self._space_bytes = ids if all(self._pieces.is_byte(index) for index in ids) else None

    def encode(self, text: str) -> list[int]:
        refuse_surrogates(text)
        if self._space_bytes is None or _SPACE not in text:
            return self._encode_text(text)
        # The model would read U+2581 as a space; its three bytes say it exactly.
        ids: list[int] = []
        for number, part in enumerate(text.split(_SPACE)):
            if number:
                ids += self._space_bytes
            ids += self._encode_text(part)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        plain = [number for number, text in enumerate(texts) if _SPACE not in text]
        for text in texts:
            refuse_surrogates(text)
        encoded = self._pieces.encode([texts[number] for number in plain], num_threads=_THREADS)
        found: dict[int, np.ndarray] = {}
        for number, ids in zip(plain, encoded, strict=True):
            row = np.asarray(ids, dtype=np.int32)
            if not np.isin(row, self._reserved).any():
                found[number] = row
        return [
            found[number] if number in found else np.asarray(self.encode(text), dtype=np.int32)
            for number, text in enumerate(texts)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        return self._decode_ids(ids)


def _processor(model: bytes, origin: str) -> sentencepiece.SentencePieceProcessor:
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        size = pieces.get_piece_size()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{origin} is no SentencePiece model; give the path of a .model file") from error
    if size == 0:
        raise UserError(f"{origin} is no SentencePiece model; give the path of a .model file")
    return pieces


def refuse_surrogates(text: str) -> None:
    """UserError when the text holds half a surrogate pair, which UTF-8 and so no model can say."""
    if has_lone_surrogate(text):
        raise UserError(f"the text {text[:40]!r} holds half a surrogate pair (\\ud800–\\udfff alone); repair the text")


def read_model(path: str | Path | None, kind: str) -> bytes:
    """The bytes of a ``.model`` file; UserError when the path is not set or cannot be read."""
    if path is None:
        raise UserError(f"data.tokenizer.kind is {kind}, which needs data.tokenizer.path: the path of a .model file")
    try:
        return Path(os.path.expanduser(str(path))).read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"the tokenizer {path} cannot be read ({reason}); check data.tokenizer.path") from error


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that ``save`` wrote into ``folder``; UserError names the file that is missing, damaged or
    changed.
    """
    folder = Path(folder)
    info_path = folder / INFO_FILE
    try:
        info = json.loads(info_path.read_text(encoding="utf-8"))
        kind, eod_id, pad_id = str(info["kind"]), int(info["eod_id"]), int(info["pad_id"])
        fingerprint, version = info["fingerprint"], info["format_version"]
        model = (folder / MODEL_FILE).read_bytes()
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); restore it from a checkpoint of the same run"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{info_path} is damaged; restore it from a checkpoint of the same run") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{info_path} has format version {version}, this release reads {FORMAT_VERSION}; update pangu-sigma"
        )
    tokenizer = tokenizer_class(kind)(model, eod_id, pad_id, str(folder / MODEL_FILE))
    if tokenizer.fingerprint != fingerprint:
        raise UserError(
            f"{folder / MODEL_FILE} is not the tokenizer that {info_path} describes; restore the original file"
        )
    return tokenizer


def tokenizer_class(kind: str) -> type[Tokenizer]:
    """The class of a tokenizer kind: ``sentencepiece`` (what ``train`` gives), ``pangu_alpha`` or ``huggingface``."""
    if kind in ("sentencepiece", "train"):
        return SentencePieceTokenizer
    if kind == "pangu_alpha":
        from pangu_sigma.data.tokenizers.pangu_alpha_tokenizer import (
            PanguAlphaTokenizer,  # jieba's import is slow, and few need it
        )

        return PanguAlphaTokenizer
    if kind == "huggingface":
        from pangu_sigma.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer  # its library is an extra

        return HuggingFaceTokenizer
    raise UserError(f"unknown tokenizer kind '{kind}'; choose train, sentencepiece, pangu_alpha or huggingface")


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The tokenizer's files by name, as a checkpoint keeps them."""
    with TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
