"""A prompt is read block after block: the same bits whatever is computed in between, and nobody waits for all of it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pangu_sigma.generation import AUTO, Request, Sampling
from pangu_sigma.generation.completion import complete
from pangu_sigma.generation.engine import Engine
from tests.pangu_sigma.generation.conftest import VOCAB, WINDOW
from tests.pangu_sigma.generation.toy_engine import EOD, toy_engine


@pytest.fixture
def engine(tokenizer) -> Engine:
    """Of a model that reads `WINDOW` tokens in four blocks."""
    return toy_engine(tokenizer, VOCAB)


def some_ids(count: int, seed: int) -> tuple[int, ...]:
    return tuple(int(i) for i in np.random.default_rng(seed).integers(3, VOCAB, count))


def test_the_logits_of_a_block_are_the_same_bits_whatever_is_read_and_written_in_between(kind):
    decoder = kind("rre").cached
    assert decoder.block < WINDOW
    texts = [some_ids(WINDOW - n, seed=n) for n in range(3)]
    alone = [[rows.copy() for rows in decoder.score_blocks(ids, n)] for n, ids in enumerate(texts)]
    assert [len(blocks) for blocks in alone] == [2, 2, 2]
    decoder.begin(0, texts[1][:5], 1)
    readers = [decoder.score_blocks(ids, n) for n, ids in enumerate(texts)]
    for number in range(2):
        for reader, blocks in zip(readers, alone, strict=True):
            np.testing.assert_array_equal(next(reader), blocks[number])
            decoder.step({0: 40 + number})
    decoder.end(0)


def test_a_text_behind_a_long_prompt_is_the_same_alone_and_among_others(engine):
    requests = [
        Request(some_ids(WINDOW - 6 - n, n), name, Sampling(6, seed=n, logprobs=2, echo=n % 2 == 0))
        for n, name in enumerate(["code", "law", AUTO, "law", "code", "poems", AUTO])
    ]
    for request, beside in zip(requests, complete(engine, requests), strict=True):
        (alone,) = complete(engine, [request])
        assert [(e.token_id, e.logprob, e.top, e.prompt_scores, e.domains) for e in alone.events] == [
            (e.token_id, e.logprob, e.top, e.prompt_scores, e.domains) for e in beside.events
        ]


@pytest.mark.parametrize(
    ("domain", "sampling"),
    [("law", Sampling(0, echo=True)), (AUTO, Sampling(0, echo=True)), ("law", Sampling(3, temperature=0.0, echo=True))],
)
def test_others_write_a_token_between_any_two_blocks(engine, domain, sampling):
    writer = engine.add(Request((EOD, 40), "code", Sampling(24, temperature=0.0)))
    engine.step()
    many = engine.add(Request((EOD,) * 12 + some_ids(WINDOW, seed=1), domain, sampling))
    short = engine.add(Request((EOD, 50), "poems", Sampling(1, temperature=0.0)))
    events: Counter[int] = Counter()
    for _ in range(6):
        finished = {event.request_id: event for event in engine.step()}
        assert writer in finished, "the text that is written got its token in every step"
        events.update(finished.keys())
    assert events[short] == 1, "a short prompt is read meanwhile"
    assert events[many] == 0 and engine.active == 2
    engine.cancel(many)
    read = engine.decoder.blocks
    assert engine.active == 1 and {event.request_id for event in engine.step()} == {writer}
    engine.cancel(writer)
    assert engine.idle and engine.step() == [] and engine.decoder.blocks == read


@pytest.mark.parametrize("domain", ["law", AUTO])
def test_the_scores_of_many_documents_are_those_of_each(engine, domain):
    documents = [(EOD,), some_ids(20, seed=2) + (EOD,), (EOD,), some_ids(7, seed=3)]
    prompt = tuple(token for document in documents for token in document)
    (answer,) = complete(engine, [Request(prompt, domain, Sampling(0, echo=True, logprobs=1))])
    scores = answer.events[0].prompt_scores
    assert [score.token_id for score in scores] == list(prompt) and scores[0].logprob is None
    if domain == "law":
        start = 0
        for document in documents:
            (alone,) = complete(engine, [Request(document, domain, Sampling(0, echo=True, logprobs=1))])
            assert scores[start + 1 : start + len(document)] == alone.events[0].prompt_scores[1:]
            start += len(document)
