"""A model with more rows than its tokenizer has pieces: the ids in between are never written, never listed."""

from __future__ import annotations

import numpy as np
import pytest

from pangu_sigma.errors import UserError
from pangu_sigma.generation import AUTO, Request, Sampling
from pangu_sigma.generation.completion import complete
from pangu_sigma.generation.domain_mixture import DomainInference
from pangu_sigma.generation.engine import Engine
from pangu_sigma.generation.sampling import likeliest, log_softmax, sample_token
from tests.pangu_sigma.generation.conftest import VOCAB
from tests.pangu_sigma.generation.toy_engine import toy_engine

PIECES, ROWS = VOCAB, VOCAB + 40


@pytest.fixture
def engine(tokenizer) -> Engine:
    engine = toy_engine(tokenizer, ROWS)
    assert engine.vocab == ROWS and tokenizer.vocab_size == PIECES
    return engine


def test_no_way_of_sampling_gives_an_id_without_a_piece(engine):
    ways = [
        {"temperature": 0.0}, {"temperature": 100.0}, {"temperature": 5.0, "top_k": 5},
        {"temperature": 9.0, "top_p": 0.9}, {"temperature": 50.0, "repetition_penalty": 100.0},
        {"temperature": 50.0, "top_k": ROWS - 1},
    ]  # fmt: skip
    requests = [
        Request((40 + n, 50), domain, Sampling(24, seed=n, logprobs=ROWS, echo=True, **way))
        for n, (domain, way) in enumerate(zip(["code", "law", "poems"] * 2, ways, strict=True))
    ]
    unlisted = 0
    for request, answer in zip(requests, complete(engine, requests), strict=True):
        ids = [event.token_id for event in answer.events]
        listed = [i for event in answer.events for i, _ in event.top]
        listed += [i for score in answer.events[0].prompt_scores for i, _ in score.top]
        assert max(ids) < PIECES and max(listed) < PIECES
        assert len(answer.events[0].top) == PIECES
        # Probabilities are as trained: the ids that are not listed have their share.
        text = [*request.prompt_ids, *ids]
        for place, event in enumerate(answer.events, len(request.prompt_ids)):
            row = log_softmax(engine.decoder.logits(text[:place], engine.domains.index(request.domain)))
            unlisted += int(row.argmax() >= PIECES)
            assert event.logprob == row[event.token_id]
    assert unlisted > 3, "the model never wanted one"


def test_a_mixture_of_domains_writes_none_either(engine):
    engine.set_domain_inference(DomainInference(range(3), 3))
    request = Request((2, 40, 50), AUTO, Sampling(20, temperature=50.0, logprobs=20, echo=True))
    (answer,) = complete(engine, [request])
    assert max(event.token_id for event in answer.events) < PIECES
    assert all(i < PIECES for event in answer.events for i, _ in event.top)
    assert answer.text == "".join(event.text for event in answer.events)


def test_a_prompt_with_one_is_refused(engine):
    for request in (Request((2, PIECES), "law"), Request((2,), "law", Sampling(stop_ids=(ROWS - 1,)))):
        with pytest.raises(UserError, match="for which the tokenizer has no piece: leave it out"):
            engine.add(request)
    assert engine.idle


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(temperature=100.0), Sampling(top_k=3)])
def test_what_is_impossible_is_never_drawn_nor_listed(sampling):
    logits = np.array([9.0, -np.inf, 2.0, -np.inf, -np.inf], np.float32)
    assert {sample_token(logits, sampling, index, {0}) for index in range(60)} <= {0, 2}
    assert likeliest(logits, 5) == ((0, 9.0), (2, 2.0))


def test_ids_between_pieces_have_none(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from pangu_sigma.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer

    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eod>": 0, "a": 1, "b": 5}, unk_token="a"))
    tokenizer = HuggingFaceTokenizer(library.to_str().encode(), eod_id=0, pad_id=0)
    assert tokenizer.vocab_size == 6
    assert tokenizer.ids_without_piece(8).tolist() == [2, 3, 4, 6, 7]
