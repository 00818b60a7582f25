"""The tokenizer of an exported PanGu-Σ model: SentencePiece, with jieba's words before it for PanGu-α's vocabulary.

Text never becomes a reserved id: a text that holds the letters of the end-of-document piece is encoded as letters.
"""

import os
import shutil

import sentencepiece
from transformers import PreTrainedTokenizer
from transformers.utils import logging

try:
    import jieba
except ImportError:  # only PanGu-α's tokenizer needs it
    jieba = None

logger = logging.get_logger(__name__)
MODEL_FILE = "tokenizer.model"
SPACE = "\u2581"  # SentencePiece's own sign for a space
TO_SIGNS = str.maketrans(" \n", "\u2582\u2583")
TO_TEXT = str.maketrans("\u2582\u2583", " \n", " ")


class PanGuSigmaTokenizer(PreTrainedTokenizer):
    """Text to ids and back, as the model was trained.

    `kind` is `sentencepiece` or `pangu_alpha`. A call puts the end-of-document token first, because every document
    begins after one (`add_special_tokens=False` leaves it out); `skip_special_tokens=True` leaves it out of a text.
    """

    vocab_files_names = {"vocab_file": MODEL_FILE}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(self, vocab_file, kind="sentencepiece", eod_id=2, pad_id=0, jieba_version=None, **kwargs):
        self.vocab_file = vocab_file
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        self.kind, self.eod_id, self.pad_id, self.jieba_version = kind, eod_id, pad_id, jieba_version
        self.words = None
        if kind == "pangu_alpha":
            if jieba is None:
                raise ImportError(f"this tokenizer cuts words with jieba: pip install jieba=={jieba_version}")
            if jieba.__version__ != jieba_version:
                logger.warning(f"jieba is {jieba.__version__}, the model was trained with {jieba_version}")
            self.words = jieba.Tokenizer()
        of_space = [self.pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self.space_pieces = None
        if kind == "sentencepiece" and all(self.pieces.is_byte(index) for index in of_space):
            self.space_pieces = of_space
        eod = self.pieces.id_to_piece(eod_id)
        defaults = {
            "bos_token": eod,
            "eos_token": eod,
            "pad_token": self.pieces.id_to_piece(pad_id),
            "unk_token": self.pieces.id_to_piece(self.pieces.unk_id()),
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,
        }
        super().__init__(
            kind=kind, eod_id=eod_id, pad_id=pad_id, jieba_version=jieba_version, **{**defaults, **kwargs}
        )

    @property
    def vocab_size(self):
        return self.pieces.get_piece_size()

    def get_vocab(self):
        return {self.pieces.id_to_piece(i): i for i in range(self.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        return [self.pieces.id_to_piece(i) for i in self._ids(text)]

    def _ids(self, text):
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise ValueError(f"the text {text[:40]!r} holds half a surrogate pair; repair the text")
        if self.words is not None:
            return self._encode(" ".join(word.translate(TO_SIGNS) for word in self.words.cut(text)))
        if self.space_pieces is None or SPACE not in text:
            return self._encode(text)
        # The model would read U+2581 as a space; its three bytes say it exactly.
        ids = []
        for number, part in enumerate(text.split(SPACE)):
            ids += (self.space_pieces if number else []) + self._encode(part)
        return ids

    def _encode(self, text):
        """SentencePiece's ids, cut wherever a reserved one would come out of the text."""
        ids = self.pieces.encode(text)
        reserved = (self.eod_id, self.pad_id)
        if not any(i in reserved for i in ids):
            return ids
        for index in reserved:
            piece = self.pieces.id_to_piece(index)
            if len(piece) > 1 and piece in text:
                ids = []
                parts = text.split(piece)
                for number, part in enumerate(parts):
                    left = piece[1:] if number else ""
                    right = piece[:1] if number < len(parts) - 1 else ""
                    ids += self._encode(left + part + right)
                return ids
        raise ValueError(f"the tokenizer makes a reserved id out of the text {text[:40]!r}")

    def _convert_token_to_id(self, token):
        return self.pieces.piece_to_id(token)

    def _convert_id_to_token(self, index):
        return self.pieces.id_to_piece(index) if 0 <= index < self.vocab_size else ""

    def convert_tokens_to_string(self, tokens):
        return self._decode(self.convert_tokens_to_ids(tokens))

    def _decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None, **kwargs):
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        parts, plain = [], []
        for index in ids:
            if index in (self.eod_id, self.pad_id):
                if not skip_special_tokens:
                    parts += [self._text(plain), self.pieces.id_to_piece(index)]
                    plain = []
            elif 0 <= index < self.vocab_size:  # a model may have more rows than there are pieces
                plain.append(index)
        return "".join([*parts, self._text(plain)])

    def _text(self, ids):
        text = self.pieces.decode(ids)
        return text if self.words is None else text.translate(TO_TEXT)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        first = [self.eod_id, *token_ids_0]
        return first if token_ids_1 is None else [*first, self.eod_id, *token_ids_1]

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False):
        if already_has_special_tokens:
            return [int(i in (self.eod_id, self.pad_id)) for i in token_ids_0]
        first = [1] + [0] * len(token_ids_0)
        return first if token_ids_1 is None else first + [1] + [0] * len(token_ids_1)

    def create_token_type_ids_from_sequences(self, token_ids_0, token_ids_1=None):
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = os.path.join(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + MODEL_FILE)
        if os.path.abspath(path) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, path)
        return (path,)
