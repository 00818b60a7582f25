import random
import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu_sigma.data.deduplication import BINS, SHINGLE, Deduplicator, Duplicate, signatures


def shingles(text):
    return {text[start : start + SHINGLE] for start in range(len(text) - SHINGLE + 1)}


def changed(text, share, seed):
    """The text with about ``share`` of its words replaced."""
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(10**6)}" if draw.random() < share else word for word in text.split())


def near(texts):
    """Whether each text is kept."""
    return [duplicate is None for duplicate in Deduplicator("near").duplicates(texts)]


def test_copies_are_found_with_the_document_that_they_repeat(code_texts):
    long = [text for text in code_texts if len(text) > 500][:30]
    for kind in ("exact", "near"):
        finder = Deduplicator(kind)
        assert finder.duplicates(long) == [None] * len(long)
        assert finder.duplicates([long[3], long[3] + "\n"])[0] == Duplicate("exact", 3)
    assert finder.duplicates([long[5] + "# the end", "x" * 300]) == [Duplicate("near", 5), None]


def test_only_equal_texts_are_exact_duplicates(code_texts):
    texts = [code_texts[0], code_texts[0] + " ", code_texts[0].upper(), " " + code_texts[0], code_texts[0]]
    assert Deduplicator("exact").duplicates(texts) == [None] * 4 + [Duplicate("exact", 0)]


def test_letters_and_white_space_count_for_near_duplicates_too():
    """In formulas and tables they are the content."""
    draw = random.Random(4)
    formula = "".join(draw.choice("CNOcnos()=12") for _ in range(200))
    assert near([formula, formula.casefold(), formula.upper()]) == [True] * 3
    table = " ".join(str(draw.randrange(9)) for _ in range(150))
    assert near([table, table.replace(" ", "   ")]) == [True, True]


def test_the_estimate_is_near_the_true_similarity(code_texts):
    text = max(code_texts, key=len)
    for share in (0.01, 0.03, 0.1, 0.3):
        other = changed(text, share, seed=1)
        true = len(shingles(text) & shingles(other)) / len(shingles(text) | shingles(other))
        pair = signatures([text, other])
        assert abs(np.mean(pair[0] == pair[1]) - true) < 0.15


def test_batches_and_repetition_change_nothing(code_texts):
    texts = code_texts[:40] + [changed(text, 0.02, 2) for text in code_texts[:40]] + code_texts[10:20]
    together = Deduplicator("near").duplicates(texts)
    one_by_one = Deduplicator("near")
    assert [one_by_one.duplicates([text])[0] for text in texts] == together
    assert Deduplicator("near").duplicates(texts) == together


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=8))
def test_the_first_of_every_text_is_kept_unless_it_resembles_an_earlier_one(texts):
    assert signatures(texts).shape == (len(texts), BINS)
    assert not texts or near(texts)[0]
    assert near(texts + texts)[len(texts) :] == [False] * len(texts)


def test_thousands_of_documents_take_seconds():
    draw = random.Random(3)
    words = [f"{draw.choice('bcdfglmnprst')}{draw.choice('aeiou')}{draw.randrange(100)}" for _ in range(2000)]
    texts = [" ".join(draw.choices(words, k=60)) for _ in range(5000)]
    start = time.perf_counter()
    assert all(near(texts))
    assert time.perf_counter() - start < 10
