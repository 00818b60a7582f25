import random
import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu_sigma.data.deduplication import BINS, SHINGLE, Deduplicator, signatures


def shingles(text):
    text = " ".join(text.split()).casefold()
    return {text[start : start + SHINGLE] for start in range(len(text) - SHINGLE + 1)}


def changed(text, share, seed):
    """The text with about ``share`` of its words replaced."""
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(10**6)}" if draw.random() < share else word for word in text.split())


def test_exact_and_near_duplicates_are_dropped_and_counted(code_texts):
    long = [text for text in code_texts if len(text) > 500][:30]
    finder = Deduplicator()
    assert finder.keep(long) == [True] * len(long)
    assert finder.keep([long[3], "  " + long[4].upper().replace(" ", "   "), long[5] + "# the end"]) == [False] * 3
    assert (finder.exact, finder.near) == (1, 2)
    assert finder.keep(["A text that has nothing in common with any of these functions, really nothing."]) == [True]


def test_the_estimate_is_near_the_true_similarity(code_texts):
    text = max(code_texts, key=len)
    for share in (0.01, 0.03, 0.1, 0.3):
        other = changed(text, share, seed=1)
        true = len(shingles(text) & shingles(other)) / len(shingles(text) | shingles(other))
        pair = signatures([text, other])
        assert abs(np.mean(pair[0] == pair[1]) - true) < 0.15


def test_batches_and_repetition_change_nothing(code_texts):
    texts = code_texts[:40] + [changed(text, 0.02, 2) for text in code_texts[:40]] + code_texts[10:20]
    together = Deduplicator().keep(texts)
    one_by_one = Deduplicator()
    assert [one_by_one.keep([text])[0] for text in texts] == together
    assert Deduplicator().keep(texts) == together


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=8))
def test_the_first_of_every_text_is_kept_unless_it_resembles_an_earlier_one(texts):
    assert signatures(texts).shape == (len(texts), BINS)
    kept = Deduplicator().keep(texts)
    assert not texts or kept[0]
    assert Deduplicator().keep(texts + texts)[len(texts) :] == [False] * len(texts)


def test_thousands_of_documents_take_seconds():
    draw = random.Random(3)
    words = [f"{draw.choice('bcdfglmnprst')}{draw.choice('aeiou')}{draw.randrange(100)}" for _ in range(2000)]
    texts = [" ".join(draw.choices(words, k=60)) for _ in range(5000)]
    start = time.perf_counter()
    assert all(Deduplicator().keep(texts))
    assert time.perf_counter() - start < 10
