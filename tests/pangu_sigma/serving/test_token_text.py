"""Bytes, spellings and offsets of single tokens, of every kind of tokenizer. No model."""

from __future__ import annotations

import io

import pytest
import sentencepiece
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from pangu_sigma.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from pangu_sigma.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pangu_sigma.generation import Event, Score, prompt_ids
from pangu_sigma.serving.openai_responses import ChatChoice, CompletionChoice
from pangu_sigma.serving.token_text import Offsets, TokenText

TEXTS = ["hi 你😀x", "the café  of\n\tЖ", "naïve ﷽ <s> a\u0301", "x"]


def byte_level() -> HuggingFaceTokenizer:
    library = Library(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(["the hi café you 你 the the hi"] * 20, trainer)
    return HuggingFaceTokenizer(library.to_str().encode())


def byte_fallback() -> HuggingFaceTokenizer:
    """As Llama's: blanks as U+2581, one before the first word, and a piece for every byte."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"thecafofhinvx<s>\u2581"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    library = Library(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    blank = normalizers.Replace(" ", "\u2581")
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), blank])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(steps)
    return HuggingFaceTokenizer(library.to_str().encode())


def sentence_pieces(dummy_prefix: bool) -> SentencePieceTokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the hi cafe of x the hi", "x of the"] * 40), model_writer=model, vocab_size=300,
        model_type="bpe", byte_fallback=True, add_dummy_prefix=dummy_prefix, normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2, pad_id=3,
    )  # fmt: skip
    return SentencePieceTokenizer(model.getvalue())


TOKENIZERS = {
    "byte-level": byte_level,
    "byte fallback": byte_fallback,
    "dummy prefix": lambda: sentence_pieces(True),
    "no prefix": lambda: sentence_pieces(False),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def any_tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_the_tokens_are_the_texts(any_tokenizer, text):
    tokens = TokenText(any_tokenizer)
    ids = any_tokenizer.encode(text)
    data = b"".join(tokens.bytes(token, first=not i) for i, token in enumerate(ids))
    assert data.decode() == text == any_tokenizer.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_a_token_stands_where_its_character_begins(any_tokenizer, text):
    tokens, ids = TokenText(any_tokenizer), any_tokenizer.encode(text)
    offsets = Offsets(tokens)
    length, characters = 0, [i for i, character in enumerate(text) for _ in character.encode()]
    for i, token in enumerate(ids):
        offset = offsets.next(token)
        data = tokens.bytes(token, first=not i)
        if data:
            assert offset == characters[length]
        spelling = tokens.text(token)
        if not spelling.startswith("bytes:") and i:
            assert text[offset:].startswith(spelling)
        length += len(data)
    assert length == len(characters)


def test_an_emoji_counts_as_one_character():
    tokenizer = byte_level()
    tokens, ids = TokenText(tokenizer), tokenizer.encode("hi 你😀x")
    offsets = Offsets(tokens)
    places = [offsets.next(token) for token in ids]
    assert places[-1] == 5 and tokens.text(ids[-1]) == "x"
    parts = [tokens.text(token) for token, place in zip(ids, places, strict=True) if place == 4]
    assert "".join(part.removeprefix("bytes:") for part in parts) == r"\xf0\x9f\x98\x80"
    # After a prompt of ids that ends amid a character, the character is the prompt's.
    cut = next(i for i, place in enumerate(places) if place == 4) + 1
    later = Offsets(tokens, before=ids[:cut])
    assert [later.next(token) for token in ids[cut:]] == places[cut:]


def test_what_shows_alike_is_told_apart(any_tokenizer):
    tokens = TokenText(any_tokenizer)
    everything = range(any_tokenizer.vocab_size)
    own = any_tokenizer.encode("x")[-1]
    texts = tokens.texts_apart(own, everything)
    assert len(set(texts.values())) == any_tokenizer.vocab_size and texts[own] == tokens.text(own)


def test_every_alternative_keeps_its_entry():
    tokenizer = byte_level()
    tokens = TokenText(tokenizer)
    ids = [byte_token(tokenizer, byte) for byte in "你😀".encode()]
    event = Event(0, ids[0], "", -1.0, tuple((token, -1.0 - i) for i, token in enumerate(ids)), (), None)
    chunk = CompletionChoice(tokens, "", (), 0, False, 20).add(event)
    assert list(chunk.logprobs["top_logprobs"][0].values()) == [-1.0 - i for i in range(len(set(ids)))]
    entry = ChatChoice(tokens, True).add(event).logprobs["content"][0]
    assert [other["bytes"] for other in entry["top_logprobs"]] == [[byte] for byte in "你😀".encode()]
    assert entry["token"] == r"bytes:\xe4" and entry["bytes"] == [0xE4]


def byte_token(tokenizer, byte: int) -> int:
    return next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == bytes([byte]))


def test_the_offset_of_an_answer_counts_the_prompt(any_tokenizer):
    tokens = TokenText(any_tokenizer)
    ids = prompt_ids(any_tokenizer, "the café")
    token = any_tokenizer.encode("x x")[-1]
    event = Event(0, token, " x", -1.0, (), tuple(Score(i, -1.0, ()) for i in ids), None)
    for hidden, prompt in ((1, ids), (0, ids[1:])):
        alone = CompletionChoice(tokens, "the café", prompt, hidden, False, 1)
        scored = event if hidden else Event(0, token, " x", -1.0, (), event.prompt_scores[1:], None)
        assert alone.add(Event(0, token, " x", -1.0, (), (), None)).logprobs["text_offset"] == [8]
        echoed = CompletionChoice(tokens, "the café", prompt, hidden, True, 1).add(scored).logprobs
        assert echoed["text_offset"][0] == 0 and echoed["text_offset"][-1] == 8


def test_the_bytes_of_a_chats_answer_are_its_text(any_tokenizer):
    tokens = TokenText(any_tokenizer)
    choice, text, data = ChatChoice(tokens, True), "", b""
    answer = any_tokenizer.encode("x\n  \tcafé")[len(any_tokenizer.encode("x")) :]
    for token in [*answer, any_tokenizer.eod_id]:
        written = tokens.bytes(token).decode("utf-8", errors="ignore")
        chunk = choice.add(Event(0, token, written, -1.0, (), (), None))
        text += chunk.text
        data += bytes(chunk.logprobs["content"][0]["bytes"] or [])
    assert data.decode() == "café" and text.startswith("caf")  # the last letter's bytes may stand in two tokens
