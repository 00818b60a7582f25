"""A small tokenizer of every kind that people bring, with eod id 2: how each spells parts of characters and blanks."""

from __future__ import annotations

import io

import sentencepiece
import tokenizers
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from pangu_sigma.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from pangu_sigma.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer

EOD = 2
LINES = ["hi you the quick brown fox jumps over it", "naïve façade, 你好 hi you", "return import\thi  you"] * 20
SPECIAL = ["<s>", "<unk>", "</s>", "<pad>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Tokenizer:
    """tokenizer.json of byte-level BPE, as GPT-2, OLMoE, Llama 3, Qwen and DeepSeek have it."""
    library = Library(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    library.train_from_iterator(LINES, trainer)
    library.add_tokens([tokenizers.AddedToken("the é", normalized=False)])
    return HuggingFaceTokenizer(library.to_str().encode(), eod_id=EOD, pad_id=3)


def byte_fallback() -> Tokenizer:
    """tokenizer.json with pieces of bytes and a blank before the first word, as Llama 2 and Mistral have it."""
    letters = ["▁", "h", "i", "y", "o", "u", "x", "▁y", "▁h", "▁hi", "▁yo", "▁you", "A"]
    pieces = {piece: index for index, piece in enumerate([*SPECIAL, *BYTES, *letters])}
    merges = [("▁", "y"), ("▁", "h"), ("▁h", "i"), ("▁y", "o"), ("▁yo", "u")]
    library = Library(models.BPE(vocab=pieces, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(SPECIAL)
    return HuggingFaceTokenizer(library.to_str().encode(), eod_id=EOD, pad_id=3)


def ends_of_words() -> Tokenizer:
    """tokenizer.json whose pieces mark the end of a word, which becomes a blank where another word follows."""
    pieces = [*SPECIAL, "h", "i", "y", "o", "u", "x", "i</w>", "u</w>", "x</w>", "hi</w>"]
    library = Library(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)}, merges=[("h", "i</w>")],
            end_of_word_suffix="</w>", unk_token="<unk>",
        )
    )  # fmt: skip
    library.pre_tokenizer, library.decoder = pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder(suffix="</w>")
    return HuggingFaceTokenizer(library.to_str().encode(), eod_id=EOD, pad_id=3)


def sentence_pieces(**settings) -> Tokenizer:
    """SentencePiece model with byte fallback; without settings with a blank before the first word."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=310, byte_fallback=True, model_type="bpe",
        character_coverage=0.99, unk_id=1, bos_id=0, eos_id=EOD, pad_id=3, hard_vocab_limit=False, minloglevel=2,
        **settings,
    )  # fmt: skip
    return SentencePieceTokenizer(model.getvalue(), eod_id=EOD, pad_id=3)


KINDS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "sentencepiece_dummy_prefix": lambda: sentence_pieces(normalization_rule_name="identity",
                                                          remove_extra_whitespaces=False),
    "sentencepiece_squeezes_blanks": sentence_pieces,
    "sentencepiece_exact": lambda: sentence_pieces(
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False
    ),
}  # fmt: skip
