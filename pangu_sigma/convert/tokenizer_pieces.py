"""More pieces for a SentencePiece tokenizer: appended to its model file, whose bytes stay as they are.

The model is a Protocol Buffers message (sentencepiece_model.proto):

    ModelProto { repeated SentencePiece pieces = 1; TrainerSpec trainer_spec = 2; … }
    SentencePiece { string piece = 1; float score = 2; Type type = 3 }   NORMAL = 1, USER_DEFINED = 4
    TrainerSpec { … int32 vocab_size = 4 … }

Repeated fields of concatenated messages follow one another and later numbers replace earlier ones, so pieces that are
written behind the old file get the next ids, and every old piece keeps its id.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pangu_sigma.convert.protobuf_wire import BYTES, WireError, field, fields, signed, varint
from pangu_sigma.data.corpus_files import read_text_lines
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.data.tokenizers.tokenizer_registry import tokenizer_class
from pangu_sigma.errors import UserError, argument
from pangu_sigma.regular_file import regular
from pangu_sigma.wording import listed

NORMAL, USER_DEFINED = 1, 4
_SPACE = "\u2581"
_SCORE = varint(2 << 3 | 5)  # field 2, 32 bits


def read_pieces(path: Path) -> list[str]:
    """The pieces of a text file, one a line; a space inside or at the edge of a piece belongs to it.

    Raises UserError for a file that cannot be read and for a line that says a piece twice.
    """
    lines = read_text_lines(path, argument("pieces", path), "give a text, one piece a line")
    pieces = [piece for line in lines if (piece := line.removesuffix("\r"))]
    if twice := [piece for piece, count in Counter(pieces).items() if count > 1]:
        raise UserError(f"{argument('pieces', path)} names pieces twice: {listed(twice)}; leave one of each")
    if not pieces:
        raise UserError(f"{argument('pieces', path)} is empty: write one piece a line")
    return pieces


def known_pieces(tokenizer: Tokenizer, pieces: Sequence[str]) -> list[str]:
    """Those of `pieces` that the tokenizer has."""
    there = {tokenizer.piece(index) for index in range(tokenizer.vocab_size)}
    return [piece for piece in pieces if _spelled(piece) in there]


def with_pieces(old: Tokenizer, pieces: Sequence[str], kind: int) -> Tokenizer:
    """The tokenizer with `pieces` as further ids, in their order; its end-of-document and padding ids stay.

    kind: USER_DEFINED (wherever the text has the piece, it becomes that id) or NORMAL (the piece takes part in the
    segmentation, after all others: below the lowest score there is). Raises UserError naming pieces that are there
    already, and pieces that this tokenizer would never make out of text: their rows could not be trained.
    """
    if old.kind == "huggingface":
        raise UserError("a tokenizer of kind huggingface cannot be extended here: extend its tokenizer.json itself")
    if there := known_pieces(old, pieces):
        raise UserError(
            f"the tokenizer has these pieces already: {listed(there)}; leave them out, or give "
            f"{argument('skip_known', True)}"
        )
    lowest = min(score for _, score, type_ in stored_pieces(old.model) if type_ == NORMAL)
    added = b"".join(
        field(1, field(1, sign.encode()) + _SCORE + struct.pack("<f", lowest - 1 - index) + field(3, kind))
        for index, sign in enumerate(map(_spelled, pieces))
    )
    size = field(2, field(4, old.vocab_size + len(pieces)))
    new = tokenizer_class(old.kind)(old.model + added + size, old.eod_id, old.pad_id, origin="the extended tokenizer")
    check_extension(old, new)
    if never := [piece for index, piece in enumerate(pieces) if old.vocab_size + index not in new.encode(piece)]:
        ways = f"as {argument('piece_type', 'user-defined')}" if kind == NORMAL else "in another spelling"
        raise UserError(
            f"this tokenizer ({old.kind}) would never make these pieces out of text, because its word splitting, "
            f"normalisation or merges take their letters apart: {listed(never)}; add them {ways} or leave them out"
        )
    return new


def _spelled(piece: str) -> str:
    """A piece as the model file has it: SentencePiece writes a space as U+2581."""
    return piece.replace(" ", _SPACE)


def replaced(old: Tokenizer, path: Path) -> Tokenizer:
    """The tokenizer in the `.model` file at `path`, which must be an extension of `old`: UserError otherwise."""
    try:
        model = regular(path).read_bytes()
    except OSError as error:
        given = argument("tokenizer", path)
        raise UserError(f"{given} cannot be read ({error.strerror}): give a .model file") from error
    new = tokenizer_class(old.kind)(model, old.eod_id, old.pad_id, origin=str(path))
    check_extension(old, new)
    return new


def check_extension(old: Tokenizer, new: Tokenizer) -> None:
    """UserError unless `new` begins with exactly the pieces of `old` and has more: an id must keep its meaning."""
    before, after = stored_pieces(old.model), stored_pieces(new.model)
    if len(after) <= len(before):
        raise UserError(
            f"the new tokenizer has {len(after)} pieces and the model's {len(before)}: it must have more, appended"
        )
    for index, (one, other) in enumerate(zip(before, after[: len(before)], strict=True)):
        if one != other:
            raise UserError(
                f"the new tokenizer is no extension of the model's: id {index} is {one[0]!r} there and {other[0]!r} "
                "in the new one, or has another score or type; append pieces only"
            )


def stored_pieces(model: bytes) -> list[tuple[str, float, int]]:
    """(piece, score, type) of every id of a SentencePiece model file."""
    pieces = []
    try:
        for field_number, form, value in fields(model):
            if field_number != 1 or form != BYTES:
                continue
            piece, score, kind = "", 0.0, NORMAL
            for inner, _, content in fields(value):
                if inner == 1:
                    piece = content.decode()
                elif inner == 2:
                    (score,) = struct.unpack("<f", content)
                elif inner == 3:
                    kind = signed(content)
            pieces.append((piece, score, kind))
    except (WireError, UnicodeDecodeError, struct.error) as error:
        raise UserError("the tokenizer is no SentencePiece model: give a .model file") from error
    return pieces
