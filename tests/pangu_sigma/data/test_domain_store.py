import errno
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from pangu_sigma.config.data_section import DataConfig
from pangu_sigma.data.domain_store import open_store, prepare_domain
from pangu_sigma.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pangu_sigma.errors import UserError
from tests.text_domain import text_domain

CASES = Path(__file__).parents[4] / "shared" / "cases"


@pytest.fixture
def prepare(tmp_path, tokenizer):
    def call(source, progress=None, **settings):
        defaults = {"heldout_fraction": 0.2, "sequence_length": 16, "cache": str(tmp_path / "cache")}
        return prepare_domain(source, tokenizer, DataConfig(**(defaults | settings)), progress)

    return call


@pytest.fixture
def corpus(tmp_path):
    """corpus(texts) → a source over a fresh file"""

    def make(texts, name="law"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return text_domain(name, [path])

    return make


def texts_of(store, tokenizer):
    rows = [store.document(index) for index in range(store.documents)]
    assert all(row[-1] == tokenizer.eod_id for row in rows)
    return [tokenizer.decode(row[:-1]) for row in rows]


def test_every_document_is_in_one_part_ends_with_its_end_and_is_counted(prepare, code_source, code_texts, tokenizer):
    seen = []
    store = prepare(code_source, progress=lambda *report: seen.append(report))
    train, heldout = texts_of(store.train, tokenizer), texts_of(store.heldout, tokenizer)
    assert len(train) + len(heldout) + store.dropped.total == len(code_texts)
    assert not set(train) & set(heldout)
    assert set(train) | set(heldout) <= set(code_texts)
    assert 0.1 < len(heldout) / len(code_texts) < 0.3
    assert store.documents == {"train": len(train), "heldout": len(heldout)}
    assert store.tokens == {"train": store.train.tokens, "heldout": store.heldout.tokens}
    assert store.token_counts.dtype == np.int64
    assert (store.token_counts == np.bincount(store.train.read(0, store.train.tokens), minlength=512)).all()
    assert seen[-1] == ("code", "tokenise", len(code_texts), len(code_texts))
    assert set(store.identity) == {"corpus", "tokenizer", "data settings"}


def test_the_second_call_opens_what_the_first_made(prepare, code_source):
    first = prepare(code_source)
    seen = []
    second = prepare(code_source, progress=lambda *report: seen.append(report))
    assert not seen
    assert (second.folder, second.fingerprint, second.dropped) == (first.folder, first.fingerprint, first.dropped)
    assert [path.name for path in first.folder.parent.iterdir()] == [first.folder.name]


def test_a_changed_corpus_or_setting_is_noticed(prepare, corpus, code_texts):
    first = prepare(corpus(code_texts))
    changed = prepare(corpus([*code_texts, "And a new document, unlike all of them, about whales."]))
    assert changed.corpus_fingerprint != first.corpus_fingerprint
    assert sum(changed.documents.values()) == sum(first.documents.values()) + 1
    other = prepare(corpus(code_texts), heldout_fraction=0.5)
    assert other.corpus_fingerprint == first.corpus_fingerprint
    assert other.fingerprint != first.fingerprint
    assert prepare(corpus(code_texts)).folder == first.folder


def test_duplicates_are_dropped_before_the_split_and_counted(prepare, corpus, code_texts, tokenizer):
    long = list(dict.fromkeys(text for text in code_texts if len(text) > 400))
    near = [text + "\n# end" for text in long[:10] if len(text) > 800]
    texts = [*long, *long[:7], *near, "", " \n"]
    unique = prepare(corpus(long, "plain"), deduplicate="near")
    doubled = prepare(corpus(texts, "doubled"), deduplicate="near")
    assert doubled.dropped.counts == {"empty": 2, "exact": 7, "near": unique.dropped.counts["near"] + len(near)}
    assert doubled.documents == unique.documents
    copies = prepare(corpus(texts, "copies"))
    assert copies.dropped.counts == {"empty": 2, "exact": 7, "near": 0}
    kept = prepare(corpus([*long, *long[:7]], "kept"), deduplicate="none")
    assert sum(kept.documents.values()) == len(long) + 7
    assert not set(texts_of(kept.train, tokenizer)) & set(texts_of(kept.heldout, tokenizer))


def test_three_examples_of_every_reason_say_where_they_are_and_what_they_repeat(prepare, corpus, code_texts):
    texts = [*code_texts[:20], *code_texts[:5], "  "]
    store = prepare(corpus(texts))
    assert prepare(corpus(texts)).dropped == store.dropped
    assert len(store.dropped.examples["exact"]) == 3 and store.dropped.examples["empty"] == ["law.jsonl:26"]
    first = " ".join(code_texts[0].split())
    assert store.dropped.examples["exact"][0].startswith(f"law.jsonl:21 '{first[:30]}")
    assert store.dropped.examples["exact"][0].endswith(" of law.jsonl:1")
    counts, *examples = store.dropped.sentences("law", 20)
    assert counts == "law: 20 documents kept; dropped: 1 empty, 5 exact duplicates" and len(examples) == 2
    assert store.dropped.warning("law", 20) is None


@pytest.mark.skipif(not (CASES / "corpus").is_dir(), reason="the cases are not here")
@pytest.mark.parametrize("name, documents", [("smiles", 80), ("forms", 12)])
def test_texts_that_look_alike_are_not_dropped_unless_asked(prepare, name, documents):
    store = prepare(text_domain("cases", [CASES / "corpus" / f"{name}.jsonl"]))
    assert sum(store.documents.values()) == documents and store.dropped.total == 0
    assert not list(store.dropped.sentences("cases", documents))


def test_a_domain_that_loses_more_than_half_is_warned_of_with_the_key(prepare, corpus, code_texts):
    long = [text for text in code_texts if len(text) > 800][:4]
    near = [f"{text}\n# {i}" for text in long for i in range(3)]
    store = prepare(corpus(long + near), deduplicate="near")
    assert store.dropped.warning("law", sum(store.documents.values())) == (
        "domain 'law' lost 75% of its documents (12 near duplicates): set data.deduplicate to exact if they are no "
        "copies"
    )
    with pytest.raises(UserError, match=r"single document left to learn from of 3 \(set data.deduplicate to none if"):
        prepare(corpus(["same document " * 50] * 3, "same"))


def test_unknown_pieces_are_counted(prepare, corpus, tmp_path, code_texts):
    lines = [line for text in code_texts[:20] for line in text.lower().split("\n")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=300, minloglevel=2, hard_vocab_limit=False
    )
    settings = DataConfig(heldout_fraction=0.2, sequence_length=16, cache=str(tmp_path / "cache"))
    known, unknown = (
        prepare_domain(corpus([text for text in texts]), SentencePieceTokenizer(model.getvalue()), settings)
        for texts in ([line * 5 for line in lines if line][:90], ["ÄÖÜ ЖЙ " * 9 + text for text in code_texts[:20]])
    )
    assert known.unknown_share < 0.01 < 0.1 < unknown.unknown_share < 1
    counts = unknown.train.counts(len(unknown.token_counts))
    assert unknown.unknown_tokens["train"] == counts[SentencePieceTokenizer(model.getvalue()).unk_id] > 0


def test_two_documents_are_enough_for_both_parts(prepare, corpus):
    texts = ["The first document speaks about the sea. " * 9, "Another one explains how bread is baked. " * 9]
    for fraction in (0.001, 0.999):
        store = prepare(corpus(texts), heldout_fraction=fraction)
        assert store.documents == {"train": 1, "heldout": 1}


@pytest.mark.parametrize("count", [1, 2])
def test_at_fraction_zero_every_document_is_trained_on(prepare, corpus, tokenizer, count):
    texts = ["The first document speaks about the sea. " * 9, "Another one explains how bread is baked. " * 9][:count]
    store = prepare(corpus(texts), heldout_fraction=0.0)
    assert store.documents == {"train": count, "heldout": 0} and store.tokens["heldout"] == 0
    assert sorted(texts_of(store.train, tokenizer)) == sorted(texts)


def test_a_single_long_text_file_is_split_into_both_parts(prepare, tmp_path, code_texts):
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(code_texts), encoding="utf-8")
    store = prepare(text_domain("book", [book]))
    assert store.documents["train"] > store.documents["heldout"] >= 1


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "has no text in .*law.jsonl"),
        (["", "  "], "has no text in"),
        (["only one document " * 50], "nothing can be held out"),
        (["same document " * 50] * 3, "nothing can be held out"),
        (["tiny", "small"], "fewer than one sequence of 17"),
    ],
)
@pytest.mark.parametrize("deduplicate", ["exact", "none"])
def test_a_corpus_too_small_is_refused(prepare, corpus, texts, message, deduplicate):
    with pytest.raises(UserError, match="domain 'law'.*" + message):
        prepare(corpus(texts), deduplicate=deduplicate)


@pytest.mark.parametrize("name", ["train.bin", "heldout.idx", "token_counts.npy", "store.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_damaged_cache_is_refused_by_name(prepare, code_source, name, harm):
    path = prepare(code_source).folder / name
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[len(data) // 2 if name != "store.json" else 0] ^= 1
    path.write_bytes(data[:-1] if harm == "truncate" and name != "store.json" else data[: len(data) // 2])
    if harm == "flip":
        path.write_bytes(data)
    if harm == "remove":
        path.unlink()
    with pytest.raises(UserError, match=f"{name} .*remove the folder"):
        prepare(code_source)


def test_a_store_of_another_vocabulary_is_refused(prepare, code_source):
    with pytest.raises(UserError, match="is of a vocabulary of 512, not 400"):
        open_store(prepare(code_source).folder, 400)


def test_bad_input_leaves_nothing_in_the_cache(prepare, corpus, tmp_path):
    source = corpus(["good text " * 30] * 3)
    with open(source.data[0], "a") as stream:
        stream.write("{broken\n")
    with pytest.raises(UserError, match="law.jsonl:4"):
        prepare(source)
    assert not (tmp_path / "cache").exists()


def test_a_corpus_that_changes_while_it_is_read_is_refused(prepare, corpus, code_texts, tmp_path):
    source = corpus(code_texts)

    def grow(domain, stage, done, total):
        with open(source.data[0], "a") as stream:
            stream.write("\n")

    with pytest.raises(UserError, match="changed while it was read"):
        prepare(source, progress=grow)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.ESTALE])
def test_a_disk_that_fails_is_a_sentence(prepare, code_source, tmp_path, number):
    def full(domain, stage, done, total):
        raise OSError(number, os.strerror(number))

    with pytest.raises(UserError, match=f"tokenising domain 'code' into .*{os.strerror(number)}: .*data.cache"):
        prepare(code_source, progress=full)
    assert not (tmp_path / "cache").exists()
