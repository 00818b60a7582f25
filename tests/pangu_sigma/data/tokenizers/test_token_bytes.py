"""The bytes of single tokens, of every kind of tokenizer: joined they are the text, each what the library has."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pangu_sigma.data.tokenizers.token_bytes import TokenBytes, Utf8Decoder
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.generation.text_stream import TextStream

tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")

from tests.pangu_sigma.data.tokenizers.kinds_of_tokenizers import EOD, KINDS, ends_of_words  # noqa: E402

SAME = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LETTERS = st.one_of(st.sampled_from("hi you 你😀é\ufffd\n"), st.characters(exclude_categories=("Cs",)))
TEXTS = st.text(LETTERS, max_size=30)
made = cache(lambda kind: KINDS[kind]())


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request) -> Tokenizer:
    return made(request.param)


def all_bytes(tokenizer: Tokenizer, ids) -> list[bytes]:
    stream = TokenBytes(tokenizer)
    return [stream.push(token_id) for token_id in ids]


@SAME
@given(text=TEXTS)
def test_joined_they_are_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert b"".join(all_bytes(tokenizer, ids)) == tokenizer.decode(ids).encode()
    if tokenizer in (made("byte_level"), made("sentencepiece_exact")):
        assert tokenizer.decode(ids) == text


@SAME
@given(text=TEXTS)
def test_the_offset_of_a_token_is_that_of_the_character_it_begins_in(tokenizer, text):
    ids = tokenizer.encode(text)
    decoder, position = Utf8Decoder(tokenizer), 0
    text = tokenizer.decode(ids)
    starts = [index for index, character in enumerate(text) for _ in character.encode()] + [len(text)]
    for data in all_bytes(tokenizer, ids):
        assert decoder.offset_of(data) == starts[position]
        position += len(data)
    assert decoder.length == len(text)


@SAME
@given(data=st.data())
def test_any_ids_at_all_give_the_text_that_decoding_gives(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    if tokenizer is made("byte_fallback") or 0 in ids or 1 in ids:
        # The library makes signs of whole characters too where a broken one follows; a piece that shows nothing parts
        # the bytes around it.
        return
    stream = TextStream(tokenizer, ())
    assert "".join([*map(stream.push, ids), stream.close()]) == tokenizer.decode(ids)


def test_bytes_of_byte_level_pieces_are_those_of_the_librarys_alphabet():
    tokenizer = made("byte_level")
    library = tokenizers.Tokenizer.from_str(tokenizer.model.decode())
    splitter = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    texts = [chr(code) for code in (*range(0x801), 0x4F60, 0xFFFD, *range(0x1000, 0x10FFFF, 0x1000))
             if not 0xD800 <= code < 0xE000]  # fmt: skip
    alphabet = {}
    for text in texts:
        ((spelling, _),) = splitter.pre_tokenize_str(text)
        alphabet |= dict(zip(spelling, text.encode(), strict=True))
    assert len(alphabet) == 256 - 13  # of all bytes but those that UTF-8 never has
    compared = 0
    for piece, index in library.get_vocab(with_added_tokens=True).items():
        if index not in (tokenizer.eod_id, tokenizer.pad_id) and set(piece) <= set(alphabet):
            assert tokenizer.token_bytes(index) == bytes(alphabet[letter] for letter in piece)
            compared += 1
    assert compared > 300 and {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)} > {
        bytes([byte]) for byte in range(256)
    }
    # One that was added as a text is itself, although it is no spelling of bytes.
    assert tokenizer.token_bytes(library.token_to_id("the é")) == "the é".encode()


def test_a_blank_before_the_first_word_is_the_first_tokens_own():
    for kind in ("byte_fallback", "sentencepiece_dummy_prefix", "sentencepiece_squeezes_blanks"):
        tokenizer = made(kind)
        ids = tokenizer.encode("hi hi")
        assert all_bytes(tokenizer, [EOD, *ids, EOD]) == [b"", b"hi", b" hi", b""]
    # Nothing has shown yet when its second blank comes.
    tokenizer = made("sentencepiece_squeezes_blanks")
    (blank,) = (i for i in range(tokenizer.vocab_size) if tokenizer.piece(i) == "\u2581")
    hi = tokenizer.encode("hi")
    assert all_bytes(tokenizer, [blank, blank, *hi, blank]) == [b"", b"", b"hi", b" "]
    assert b"".join(all_bytes(tokenizer, [blank] * 40 + hi)) == tokenizer.decode([blank] * 40 + hi).encode()


def test_a_letter_and_the_byte_of_it_are_the_same_text():
    tokenizer = made("byte_fallback")
    pieces = {tokenizer.piece(i): i for i in range(tokenizer.vocab_size)}
    assert tokenizer.token_bytes(pieces["A"]) == tokenizer.token_bytes(pieces["<0x41>"]) == b"A"
    assert tokenizer.token_bytes(pieces["<0xE4>"]) == b"\xe4"


def test_the_blank_behind_a_words_end_belongs_to_the_next_word():
    tokenizer = ends_of_words()
    ids = tokenizer.encode("hi x you hi")
    assert all_bytes(tokenizer, ids) == [b"hi", b" x", b" y", b"o", b"u", b" hi"]
    stream = TextStream(tokenizer, (EOD,))
    assert "".join(map(stream.push, ids)) == tokenizer.decode(ids) == "hi x you hi"


def test_characters_before_a_part_of_one_stay_in_the_text():
    """The library's decoder writes signs for all of them as long as the last is not finished."""
    tokenizer = made("byte_fallback")
    byte = {tokenizer.piece(i): i for i in range(tokenizer.vocab_size)}
    ids = [byte[f"<0x{b:02X}>"] for b in "你😀你".encode()]
    stream = TextStream(tokenizer, ())
    assert [text for text in map(stream.push, ids) if text] == ["你", "😀", "你"]
    assert stream.push(byte["<0xE4>"]) == "" and stream.close() == "\ufffd"


def test_a_character_that_the_prompt_begins_comes_with_the_answer(tokenizer):
    ids = tokenizer.encode("hi 😀")
    whole, part = ids[:-1], ids[-1:]
    assert TextStream(tokenizer, whole).push(part[0]) == "😀"
    # Wherever the prompt's end is looked at from.
    long = [*tokenizer.encode("hi you " * 40), EOD, *tokenizer.encode("😀")[:-2], EOD]
    stream = TextStream(tokenizer, long)
    assert "".join(stream.push(token_id) for token_id in tokenizer.encode("😀")[-2:]) == "😀"
