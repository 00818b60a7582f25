import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu_sigma.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pangu_sigma.data.tokenizers.tokenizer_registry import load_tokenizer
from pangu_sigma.data.tokenizers.tokenizer_training import build_tokenizer, train_tokenizer
from pangu_sigma.errors import UserError
from tests.text_domain import text_domain

# beside the repository; absent elsewhere
PANGU_MODEL = Path(__file__).parents[5] / "shared" / "data" / "pangu_alpha" / "vocab.model"
needs_pangu_model = pytest.mark.skipif(not PANGU_MODEL.is_file(), reason="PanGu-α's vocab.model is not on this machine")

AWKWARD = [
    "",
    " ",
    "\n",
    "   lead and trail   ",
    "def f(x):\n\tif x:\n\t\treturn  1\n\n\n    # four\n",
    "\r\n\x00\x0b\u2028\u3000\ufeff",
    "a\u2581b \u2581\u2581 \u2582\u2585\u2047",
    "<eod><pad><unk><s></s><0x0A>",
    "漢字 e\u0301 ﬁ Ⅷ 🙂\u200d",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_decoding_gives_back_awkward_text_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=300)
@given(
    st.text(
        st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t\u2581\u2585\x00<>eodpad")),
        max_size=60,
    )
)
def test_decoding_gives_back_any_text_and_never_makes_a_reserved_id(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.eod_id, tokenizer.pad_id} & set(ids)


def test_the_batch_gives_the_same_ids_as_one_text_at_a_time(tokenizer, code_texts):
    texts = AWKWARD + code_texts[:20]
    batch = tokenizer.encode_batch(texts)
    assert all(row.dtype == np.int32 for row in batch)
    assert [row.tolist() for row in batch] == [tokenizer.encode(text) for text in texts]


def test_the_reserved_ids_are_stated_and_decode_to_nothing(tokenizer):
    assert (tokenizer.pad_id, tokenizer.eod_id, tokenizer.vocab_size) == (0, 2, 512)
    assert tokenizer.piece(2) == "<eod>"
    assert tokenizer.decode([2, *tokenizer.encode("x"), 0, 2]) == "x"
    with pytest.raises(ValueError, match="512 is outside the vocabulary"):
        tokenizer.decode([512])


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode("\ud800")
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode_batch(["a", "\ud800"])


def test_training_is_deterministic_and_follows_the_weights(tmp_path, code_source, tokenizer):
    assert train_tokenizer([code_source], 512).fingerprint == tokenizer.fingerprint
    sums = tmp_path / "sums.txt"
    sums.write_text("\n".join(f"sum of {a} plus {b} equals {a + b}" for a in range(60) for b in range(60)))

    def average_length(weight):
        mixed = train_tokenizer([code_source, text_domain("sums", [sums], weight=weight)], 400)
        return len(mixed.encode("sum of 17 plus 4 equals 21"))

    assert average_length(50.0) < average_length(0.0)


def test_a_small_vocabulary_on_thousands_of_characters_leaves_room_for_merges(tmp_path):
    file = tmp_path / "zh.txt"
    file.write_text("".join(chr(0x4E00 + index) for index in range(5000)) + "明月光" * 500)
    trained = train_tokenizer([text_domain("zh", [file])], 400)
    assert trained.vocab_size == 400
    assert len(trained.encode("明月光")) == 1
    assert trained.decode(trained.encode("鼎龍")) == "鼎龍"


def test_a_vocabulary_that_cannot_be_is_refused_with_what_would_be_right(tmp_path, code_source):
    small = tmp_path / "small.txt"
    small.write_text("hello world\n")
    with pytest.raises(UserError, match="needs 320 or more"):
        train_tokenizer([code_source], 100)
    with pytest.raises(UserError, match=r"set it to \d+ or less"):
        train_tokenizer([text_domain("small", [small])], 4096)
    small.write_text("\n \n")
    small.write_text("")
    with pytest.raises(UserError, match="hold no text"):
        train_tokenizer([text_domain("small", [small])], 512)


def test_a_saved_tokenizer_is_the_same_and_a_changed_one_is_refused_by_name(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode("def f(x):") == tokenizer.encode("def f(x):")

    (tmp_path / "half/tokenizer.model").mkdir(parents=True)
    with pytest.raises(OSError):
        tokenizer.save(tmp_path / "half")
    # The information is written last: it tells that the model is there.
    assert [path.name for path in (tmp_path / "half").iterdir()] == ["tokenizer.model"]

    info = tmp_path / "tokenizer.json"
    good = info.read_text()
    info.write_text(json.dumps(json.loads(good) | {"eod_id": 7}))
    with pytest.raises(UserError, match="tokenizer.model is not the tokenizer that"):
        load_tokenizer(tmp_path)
    info.write_text(json.dumps(json.loads(good) | {"format_version": 9}))
    with pytest.raises(UserError, match="format version 9"):
        load_tokenizer(tmp_path)
    info.write_text(good[:40])
    with pytest.raises(UserError, match="tokenizer.json is damaged"):
        load_tokenizer(tmp_path)
    info.write_text(good)
    (tmp_path / "tokenizer.model").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="tokenizer.model is no SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="tokenizer.model cannot be read"):
        load_tokenizer(tmp_path)


def test_a_trained_tokenizer_is_cached_until_the_corpus_changes(tmp_path, code_source):
    corpus = tmp_path / "code.jsonl"
    shutil.copy(code_source.data[0], corpus)
    source = text_domain("code", [corpus])
    first = build_tokenizer("train", [source], tmp_path / "cache", vocab_size=400)
    (folder,) = (tmp_path / "cache").iterdir()
    made = (folder / "tokenizer.model").stat().st_mtime_ns
    assert build_tokenizer("train", [source], tmp_path / "cache", vocab_size=400).fingerprint == first.fingerprint
    assert (folder / "tokenizer.model").stat().st_mtime_ns == made
    with open(corpus, "a") as stream:
        stream.write(json.dumps({"text": "zebra " * 2000}) + "\n")
    assert build_tokenizer("train", [source], tmp_path / "cache", vocab_size=400).fingerprint != first.fingerprint


def test_a_given_model_is_read_from_its_path(tmp_path, tokenizer):
    path = tmp_path / "own.model"
    path.write_bytes(tokenizer.model)
    assert build_tokenizer("sentencepiece", [], tmp_path, path).fingerprint == tokenizer.fingerprint
    with pytest.raises(UserError, match="needs data.tokenizer.path"):
        build_tokenizer("sentencepiece", [], tmp_path)
    with pytest.raises(UserError, match="absent.model cannot be read"):
        build_tokenizer("sentencepiece", [], tmp_path, tmp_path / "absent.model")
    with pytest.raises(UserError, match="unknown tokenizer kind 'words'"):
        build_tokenizer("words", [], tmp_path, path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="own.model is no SentencePiece model"):
        build_tokenizer("sentencepiece", [], tmp_path, path)


def test_other_reserved_ids_make_another_tokenizer(tokenizer):
    assert SentencePieceTokenizer(tokenizer.model, eod_id=3).fingerprint != tokenizer.fingerprint
    assert SentencePieceTokenizer(tokenizer.model, eod_id="<pad>").eod_id == tokenizer.pad_id
    for wrong, called in ((512, "id 512"), (-1, "id -1"), ("<end>", "piece <end>")):
        with pytest.raises(UserError, match=f"the given model has no {called}: give .*special pieces are <eod>"):
            SentencePieceTokenizer(tokenizer.model, eod_id=wrong)


@pytest.fixture(scope="module")
def pangu(tmp_path_factory):
    return build_tokenizer("pangu_alpha", [], tmp_path_factory.mktemp("none"), PANGU_MODEL)


@needs_pangu_model
def test_pangu_alpha_gives_the_published_ids(pangu, tmp_path):
    assert pangu.encode("你好，今天天气不错。") == [5772, 10, 465, 235, 464, 1123, 12]
    assert (pangu.vocab_size, pangu.eod_id, pangu.pad_id) == (40000, 9, 6)
    assert pangu.decode(pangu.encode("第一行 有空格\n第二行")) == "第一行 有空格\n第二行"
    assert pangu.encode("a  b") == [*pangu.encode("a"), 13, 4, 13, 4, *pangu.encode("b")]
    pangu.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == pangu.fingerprint


@needs_pangu_model
def test_special_tokens_in_text_stay_text_though_the_model_declares_them_user_defined(pangu):
    plain = SentencePieceTokenizer(pangu.model)
    assert plain.eod_id == 8
    for tokenizer in (pangu, plain):
        for text in ("<eod>", "a<eot>b<eod><pad>", "<pad><pad>"):
            ids = tokenizer.encode(text)
            assert not {tokenizer.eod_id, tokenizer.pad_id} & set(ids)
            assert tokenizer.encode_batch([text])[0].tolist() == ids
            assert tokenizer.decode(ids).replace(" ", "") == text


@needs_pangu_model
def test_another_model_under_the_name_of_pangu_alpha_is_refused(tmp_path, tokenizer):
    path = tmp_path / "own.model"
    path.write_bytes(tokenizer.model)
    with pytest.raises(UserError, match="not PanGu-α's vocab.model"):
        build_tokenizer("pangu_alpha", [], tmp_path, path)
