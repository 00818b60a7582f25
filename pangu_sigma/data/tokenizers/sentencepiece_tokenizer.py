"""SentencePiece tokenizer: a ``.model`` file, given or trained; also the base of those that put rules around one."""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
import sentencepiece

from pangu_sigma.data.tokenizers.tokenizer import Tokenizer, refuse_surrogates
from pangu_sigma.errors import UserError

_SPACE = "\u2581"  # SentencePiece's own sign for a space; as a character of the text it needs care
_THREADS = 2  # of the SentencePiece library, inside one call of encode_batch


class _Pieces(sentencepiece.SentencePieceProcessor):
    """SentencePiece's vocabulary, which can also list what is special in it."""

    def special_pieces(self) -> list[str]:
        """Control and unknown pieces; user-defined ones too where they look like such (PanGu-α's <eot>)."""
        pieces = [(index, self.id_to_piece(index)) for index in range(self.get_piece_size())]
        return [piece for i, piece in pieces if self.is_control(i) or re.fullmatch(r"<[^<>]+>|\[[A-Z]+\]", piece)
                and not self.is_byte(i)]  # fmt: skip


class SentencePieceModel(Tokenizer):
    """Tokenizer on a SentencePiece model: encoding and decoding that keep the reserved ids out of the text."""

    def _open(self, model: bytes, origin: str) -> _Pieces:
        try:
            pieces = _Pieces(model_proto=model)
            size = pieces.get_piece_size()
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"{origin} is no SentencePiece model; give the path of a .model file") from error
        if size == 0:
            raise UserError(f"{origin} is no SentencePiece model; give the path of a .model file")
        return pieces

    def decode(self, ids: Iterable[int]) -> str:
        """SentencePiece's decoding, without the reserved ids (user-defined ones would come out as text)."""
        kept = [int(index) for index in ids if index not in self._reserved]
        for index in kept:
            self._check("id", index)
        return self._pieces.decode(kept)

    def _bytes_of_piece(self, token_id: int) -> bytes | None:
        return bytes([int(self.piece(token_id)[3:5], 16)]) if self._pieces.is_byte(token_id) else None

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
                for part_index, part in enumerate(parts):
                    left = piece[1:] if part_index else ""
                    right = piece[:1] if part_index < len(parts) - 1 else ""
                    ids += self._encode_text(left + part + right)
                return ids
        raise UserError(
            f"the tokenizer makes its reserved id out of the text {text[:40]!r}; give another eod_id or pad_id"
        )


class SentencePieceTokenizer(SentencePieceModel):
    """A SentencePiece model, given as a file or trained (``train_tokenizer``).

    With byte fallback, identity normalisation and no dummy prefix, which is what training makes,
    ``decode(encode(x)) == x`` holds for every text; other models are as exact as their own settings.
    """

    kind = "sentencepiece"

    @cached_property
    def _space_bytes(self) -> list[int] | None:
        ids = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode("utf-8")]
        return ids if all(self._pieces.is_byte(index) for index in ids) else None

    def encode(self, text: str) -> list[int]:
        refuse_surrogates(text)
        if self._space_bytes is None or _SPACE not in text:
            return self._encode_text(text)
        # The model would read U+2581 as a space; its three bytes stand for it exactly.
        ids: list[int] = []
        for index, part in enumerate(text.split(_SPACE)):
            if index:
                ids += self._space_bytes
            ids += self._encode_text(part)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        plain = [index for index, text in enumerate(texts) if _SPACE not in text]
        for text in texts:
            refuse_surrogates(text)
        encoded = self._pieces.encode([texts[index] for index in plain], num_threads=_THREADS)
        rows: dict[int, np.ndarray] = {}
        for index, ids in zip(plain, encoded, strict=True):
            row = np.asarray(ids, dtype=np.int32)
            if not np.isin(row, self._reserved).any():
                rows[index] = row
        return [
            rows[index] if index in rows else np.asarray(self.encode(text), dtype=np.int32)
            for index, text in enumerate(texts)
        ]
