"""Document filters: drop long runs of repeated tokens, and code that says little.

The rules are OLMoE's (arXiv 2409.02060, section 2): a document with a run of 32 or more repeated n-grams, n from 1 to
13 tokens, is dropped; of code also one whose most frequent word is more than 30 % of its words, or whose two most
frequent together are more than 50 %, or whose repository has fewer than 2 stars. A word is what stands between white
space.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

LONGEST_NGRAM = 13
REPEATS = 32
ONE_WORD, TWO_WORDS = 0.30, 0.50
FEWEST_STARS = 2
# Why a document is dropped, in the order in which the rules are asked, with the words that people read.
REASONS = {
    "few_stars": f"of a repository with fewer than {FEWEST_STARS} stars",
    "one_word": f"more than {ONE_WORD:.0%} one word",
    "two_words": f"more than {TWO_WORDS:.0%} two words",
    "repeated_ngrams": f"{REPEATS} or more repeated n-grams in a row",
}
RULES = {"none": (), "text": ("repeated_ngrams",), "code": tuple(REASONS)}


def longest_repetition(ids: np.ndarray) -> tuple[int, int]:
    """(times, n): how often in a row one n-gram of the tokens `ids` int32 [N] is repeated at most, n from 1 to 13.

    Counted are whole n-grams, the first included: a text without any repetition has (1, 1).
    """
    best = (1, 1)
    for n in range(1, min(LONGEST_NGRAM, len(ids) - 1) + 1):
        # A run of r tokens that equal the one n before them is (r + n) // n whole n-grams.
        changes = np.flatnonzero(ids[n:] != ids[:-n])
        bounds = np.concatenate(([-1], changes, [len(ids) - n]))
        times = int((np.diff(bounds).max() - 1 + n) // n)
        if times > best[0]:
            best = (times, n)
    return best


def word_shares(text: str) -> tuple[float, float]:
    """Shares of the words that are the most frequent word, and one of the two most frequent; (0, 0) without words."""
    words = text.split()
    if not words:
        return 0.0, 0.0
    counts = [count for _, count in Counter(words).most_common(2)]
    return counts[0] / len(words), sum(counts) / len(words)


def reason_to_drop(kind: str, text: str, ids: np.ndarray, stars: float | None) -> str | None:
    """The first of `REASONS` for which the rules of `kind` (a key of `RULES`) drop a document; None to keep it.

    `ids` int32 [N]: its tokens; `stars` of its repository, None where they are not asked.
    """
    rules = RULES[kind]
    if "few_stars" in rules and stars is not None and stars < FEWEST_STARS:
        return "few_stars"
    if "one_word" in rules:
        one, two = word_shares(text)
        if one > ONE_WORD:
            return "one_word"
        if two > TWO_WORDS:
            return "two_words"
    if "repeated_ngrams" in rules and longest_repetition(ids)[0] >= REPEATS:
        return "repeated_ngrams"
    return None
