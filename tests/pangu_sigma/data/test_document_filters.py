"""Documents that the filters drop, and the counts of why, on constructed documents."""

import json
from typing import get_args

import numpy as np
import pytest

from pangu_sigma.cli.domains_commands import Filters
from pangu_sigma.config import config_from_dict
from pangu_sigma.config.data_section import DataConfig, DomainConfig
from pangu_sigma.data.corpus import Corpus
from pangu_sigma.data.document_filters import (
    LONGEST_NGRAM,
    REPEATS,
    RULES,
    longest_repetition,
    reason_to_drop,
    word_shares,
)
from pangu_sigma.data.domain_store import prepare_domain
from pangu_sigma.errors import UserError
from tests.text_domain import text_domain

NO_WORDS = "x"


def brute_force(ids: list[int]) -> int:
    """The most whole n-grams in a row, by trying every place."""
    best = 1
    for n in range(1, LONGEST_NGRAM + 1):
        for start in range(len(ids) - n + 1):
            times = 1
            while ids[start + times * n : start + (times + 1) * n] == ids[start : start + n]:
                times += 1
            best = max(best, times)
    return best


@pytest.mark.parametrize("n", range(1, LONGEST_NGRAM + 1))
def test_a_run_of_repeats_counts_whole_ngrams(n):
    draw = np.random.default_rng(n)
    ngram = draw.permutation(100)[:n]
    around = 100 + np.arange(20)
    for times in (REPEATS - 1, REPEATS):
        ids = np.concatenate([around, np.tile(ngram, times), ngram[: n - 1], around])
        assert longest_repetition(ids) == (times, n)
        dropped = reason_to_drop("text", NO_WORDS, ids, None)
        assert dropped == ("repeated_ngrams" if times == REPEATS else None)


def test_longer_ngrams_are_no_repetition():
    assert longest_repetition(np.tile(np.arange(LONGEST_NGRAM + 1), 40)) == (1, 1)
    assert [longest_repetition(np.arange(size)) for size in (0, 1, 2)] == [(1, 1)] * 3


def test_repetitions_are_those_that_trying_every_place_finds():
    draw = np.random.default_rng(0)
    for _ in range(40):
        ids = draw.integers(0, 3, draw.integers(1, 60))
        assert longest_repetition(ids)[0] == brute_force(ids.tolist())


def code_of(first: int, second: int, others: int) -> str:
    return " ".join(["aa"] * first + ["bb"] * second + [f"w{i}" for i in range(others)])


def test_code_of_one_or_two_words_is_dropped_just_beyond_the_shares():
    ids = np.arange(5)
    assert word_shares(code_of(30, 20, 50)) == (0.3, 0.5) and word_shares(" \n") == (0.0, 0.0)
    assert reason_to_drop("code", code_of(30, 20, 50), ids, None) is None
    assert reason_to_drop("code", code_of(31, 10, 59), ids, None) == "one_word"
    assert reason_to_drop("code", code_of(26, 25, 49), ids, None) == "two_words"
    assert reason_to_drop("text", code_of(90, 5, 5), ids, None) is None
    assert reason_to_drop("none", code_of(90, 5, 5), np.zeros(99, int), None) is None


def test_stars_are_asked_of_code_where_they_are_told():
    ids, fine = np.arange(5), code_of(1, 1, 20)
    assert [reason_to_drop("code", fine, ids, stars) for stars in (0, 1.0, 2, None)] == ["few_stars"] * 2 + [None] * 2
    assert reason_to_drop("text", fine, ids, 0) is None


@pytest.fixture
def written(tmp_path, code_texts):
    """A .jsonl of good documents and one bad document for every reason."""
    good = [{"text": text, "stars": 9} for text in code_texts if word_shares(text)[0] < 0.2][:40]
    bad = [
        {"text": code_of(1, 1, 60), "stars": 1},
        {"text": " ".join(f"return w{i}" for i in range(20)), "stars": 9},
        {"text": " ".join(f"self w{i} other v{i}" for i in range(6)) + " self other", "stars": 9},
        {"text": code_of(1, 1, 200) + "\n" + "=-" * 200, "stars": 9},
        {"text": "  ", "stars": 9},
        good[0],
    ]
    path = tmp_path / "code.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [*good, *bad]), encoding="utf-8")
    return path


def prepared(source, tokenizer, cache):
    config = DataConfig(cache=str(cache), heldout_fraction=0.1, sequence_length=16)
    return prepare_domain(source, tokenizer, config)


def test_what_was_dropped_and_why_is_counted_said_and_kept_beside_the_store(written, tokenizer, tmp_path):
    source = text_domain("code", [written], filters="code", stars_field="stars")
    store = prepared(source, tokenizer, tmp_path / "cache")
    counts = {"few_stars": 1, "one_word": 1, "two_words": 1, "repeated_ngrams": 1, "empty": 1, "exact": 1}
    assert {reason: store.dropped.counts[reason] for reason in counts} == counts
    kept = sum(store.documents.values())
    assert kept == 46 - store.dropped.total
    assert json.loads((store.folder / "store.json").read_text())["dropped"] == store.dropped.counts
    domain = {"name": "code", "data": [str(written)], "filters": "code", "stars_field": "stars"}
    values = {"schema_version": 2, "run": {"dir": "x"}, "model": {"preset": "tiny"}, "domains": [domain],
              "optimizer": {"learning_rate": 1.0}, "train": {"steps": 1, "batch_size": 1}}  # fmt: skip
    message, *examples = Corpus(config_from_dict(values), tokenizer, (store,)).messages()
    assert len(examples) == len(counts)
    assert message.startswith(
        f"code: {kept} documents kept; dropped: 1 of a repository with fewer than 2 stars, 1 more than 30% one word, "
        "1 more than 50% two words, 1 32 or more repeated n-grams in a row, 1 empty, 1 exact duplicates"
    )


def test_filters_make_another_store_and_none_makes_the_old_one(written, tokenizer, tmp_path):
    plain, text = (prepared(text_domain("code", [written], filters=f), tokenizer, tmp_path) for f in ("none", "text"))
    assert plain.fingerprint != text.fingerprint
    assert set(plain.dropped.counts) == {"empty", "exact", "near"} and text.dropped.counts["repeated_ngrams"] == 1
    assert prepared(text_domain("code", [written]), tokenizer, tmp_path).folder == plain.folder


def test_configuration_and_command_line_know_every_filter():
    assert get_args(DomainConfig.model_fields["filters"].annotation) == tuple(RULES) == tuple(Filters)


def test_a_domain_of_which_nothing_is_left_is_told(tokenizer, tmp_path):
    path = tmp_path / "code.jsonl"
    path.write_text(json.dumps({"text": "a a a a", "stars": "many"}) + "\n")
    with pytest.raises(UserError, match="has no text in .*code.jsonl but 1 documents that its filters drop"):
        prepared(text_domain("code", [path], filters="code"), tokenizer, tmp_path / "cache")
    with pytest.raises(UserError, match="code.jsonl:1: the field 'stars' is no number; write the stars there"):
        prepared(text_domain("code", [path], filters="code", stars_field="stars"), tokenizer, tmp_path / "cache")


def test_a_repository_whose_stars_are_null_has_none(tmp_path, code_texts, tokenizer):
    texts = [text for text in code_texts if word_shares(text)[0] < 0.2][:9]
    path = tmp_path / "code.jsonl"
    path.write_text("".join(json.dumps({"text": t, "stars": (None, 0, 5)[i % 3]}) + "\n" for i, t in enumerate(texts)))
    store = prepared(text_domain("code", [path], filters="code", stars_field="stars"), tokenizer, tmp_path / "cache")
    assert store.dropped.counts["few_stars"] == 6 and sum(store.documents.values()) == 3
    silent = prepared(text_domain("code", [path], filters="code"), tokenizer, tmp_path / "cache")
    assert not any("stars" in sentence for sentence in silent.dropped.sentences("code", 9))
