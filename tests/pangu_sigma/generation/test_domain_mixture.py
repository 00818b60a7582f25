"""Texts whose domain is inferred: written by the domain that evaluation infers, or by several, by Bayes' rule."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pangu_sigma.errors import UserError
from pangu_sigma.generation import AUTO, Request, Sampling
from pangu_sigma.generation.completion import complete
from pangu_sigma.generation.domain_inference import auto_log_probabilities, posteriors, token_log_probabilities
from pangu_sigma.generation.domain_mixture import DomainInference, DomainMixture
from pangu_sigma.generation.engine import Engine
from pangu_sigma.generation.sampling import log_softmax
from tests.pangu_sigma.generation.conftest import DOMAINS, SLOTS

PROMPT = (2, 40, 41, 90, 17)
NAMES = list(DOMAINS)


@pytest.fixture
def engine(kind, tokenizer):
    """top, options of `DomainInference` -> an engine that infers so."""

    def build(top: int = 1, **options) -> Engine:
        built = Engine(kind("rre").model, tokenizer, decoder=kind("rre").cached)
        built.set_domain_inference(DomainInference(range(3), top, **options))
        return built

    return build


def likelihood(kind, ids) -> np.ndarray:
    """Log probability [3, n - 1] of the ids but the first, from a decoder without a cache."""
    # One after the other: a graph's next run may write where its last result lies.
    # The decoder without a cache takes a text of several documents as a whole.
    rows = (kind("rre").plain.score(tuple(ids), domain)[:-1] for domain in range(3))
    return np.stack([token_log_probabilities(logits, np.array(ids[1:])) for logits in rows])


def ids_of(answer) -> list[int]:
    return [event.token_id for event in answer.events]


def test_the_likeliest_domain_alone_writes_what_it_writes_when_given(engine, kind):
    sampling = Sampling(8, temperature=1.5, seed=3, logprobs=2)
    auto = complete(engine(), [Request(PROMPT, AUTO, sampling)])[0]
    posterior = posteriors(likelihood(kind, PROMPT), np.full(3, 1 / 3))[:, -1]
    best = int(posterior.argmax())
    given = complete(engine(), [Request(PROMPT, NAMES[best], sampling)])[0]
    assert ids_of(auto) == ids_of(given) and auto.text == given.text
    assert [event.logprob for event in auto.events] == [event.logprob for event in given.events]
    for event in auto.events:
        assert event.domains == ((NAMES[best], pytest.approx(posterior[best], rel=1e-4)),)
    assert not any(event.domains for event in given.events)


def test_all_domains_together_write_the_text_under_the_posterior(engine, kind):
    # Bayes: the tokens' probabilities multiply to sum over the domains of P(domain | prompt) P(text | domain, prompt).
    answer = complete(engine(3), [Request(PROMPT, AUTO, Sampling(8, temperature=1.5, seed=5, logprobs=0))])[0]
    written = ids_of(answer)
    log_likelihood = likelihood(kind, (*PROMPT, *written))
    start = posteriors(log_likelihood[:, : len(PROMPT) - 1], np.full(3, 1 / 3))[:, -1]
    expected = math.log(float(start @ np.exp(log_likelihood[:, len(PROMPT) - 1 :].sum(axis=1))))
    assert sum(event.logprob for event in answer.events) == pytest.approx(expected, rel=1e-4)
    end = posteriors(log_likelihood, np.full(3, 1 / 3))[:, -1]
    assert dict(answer.events[-1].domains) == pytest.approx(dict(zip(NAMES, end, strict=True)), rel=1e-3)


@pytest.mark.parametrize("top", [1, 2, 3])
def test_scores_of_a_prompt_are_those_of_an_evaluation(engine, kind, top):
    sampling = Sampling(0, echo=True, logprobs=1)
    event = complete(engine(top), [Request(PROMPT, AUTO, sampling)])[0].events[0]
    log_likelihood = likelihood(kind, PROMPT)
    expected = auto_log_probabilities(log_likelihood, posteriors(log_likelihood, np.full(3, 1 / 3)), top)
    assert [score.logprob for score in event.prompt_scores[1:]] == pytest.approx(list(expected), rel=1e-4)


def test_texts_of_given_and_inferred_domains_share_the_slots(engine):
    def requests() -> list[Request]:
        ways = [AUTO, "law", AUTO, "code", AUTO]
        return [Request(PROMPT[: 2 + n], name, Sampling(5 + n, seed=n)) for n, name in enumerate(ways)]

    shared = engine(2)
    together = complete(shared, requests())
    for request, beside in zip(requests(), together, strict=True):
        assert ids_of(complete(engine(2), [request])[0]) == ids_of(beside)
    assert shared.idle and shared.active == 0


def test_a_cancelled_text_gives_all_its_slots_back(engine):
    writer = engine(SLOTS - 1)
    first = writer.add(Request(PROMPT, AUTO, Sampling(20)))
    second = writer.add(Request(PROMPT, AUTO, Sampling(2)))
    writer.step()
    assert (writer.active, writer.waiting) == (1, 1)
    writer.cancel(first)
    while not (events := writer.step()):
        assert (writer.active, writer.waiting) == (1, 0)
    assert {event.request_id for event in events} == {second} and writer.active == 1
    while not writer.idle:
        writer.step()


def test_an_updating_prior_follows_the_prompts_and_no_other_does(engine):
    still, moving = engine(), engine(updating=True)
    for writer in (still, moving):
        complete(writer, [Request(PROMPT, AUTO, Sampling(2)), Request(PROMPT, AUTO, Sampling(2, echo=True))])
    assert still.domain_inference.prior == pytest.approx([1 / 3] * 3)
    assert moving.domain_inference.prior.sum() == pytest.approx(1.0)
    assert np.ptp(moving.domain_inference.prior) > 0.01


def test_a_cached_prior_is_what_its_texts_suggest(engine, kind):
    writer = engine(3)
    texts = [PROMPT, PROMPT[:3], (2, 2, 55, 60)]
    writer.cache_prior(texts)
    ends = [posteriors(likelihood(kind, ids), np.full(3, 1 / 3))[:, -1] for ids in (PROMPT, PROMPT[:3], (2, 55, 60))]
    assert writer.domain_inference.prior == pytest.approx(np.mean(ends, axis=0), rel=1e-3)


def test_only_domains_that_are_offered_are_inferred(kind, tokenizer):
    writer = Engine(kind("rre").model, tokenizer, decoder=kind("rre").cached)
    writer.set_domain_inference(DomainInference([1, 2], 2))
    answer = complete(writer, [Request(PROMPT, AUTO, Sampling(3))])[0]
    assert {name for name, _ in answer.events[-1].domains} == {"law", "poems"}


def test_what_cannot_be_mixed_is_refused(kind, tokenizer):
    with pytest.raises(UserError, match="more than the 3 domains"):
        DomainInference(range(3), 4)
    writer = Engine(kind("rre").model, tokenizer, decoder=kind("rre").plain)
    with pytest.raises(UserError, match="needs a slot for each"):
        writer.set_domain_inference(DomainInference(range(writer.decoder.slots + 1), writer.decoder.slots + 1))


def test_a_domain_that_cannot_write_is_left_out():
    inference = DomainInference(range(3), 2, updating=True)
    log_likelihood = np.log(np.array([[0.9, 0.9], [0.1, 0.1], [0.2, 0.2]]))
    mixture = inference.begin(log_likelihood, np.array([False, True, True]))
    assert mixture.members == (2, 1) and mixture.probability == pytest.approx([0.8, 0.2])
    assert inference.begin(np.zeros((3, 0)), np.array([False, False, True])).members == (2,)
    assert inference.prior.sum() == pytest.approx(1.0)


def test_a_mixture_is_the_weighted_mean_and_learns_from_each_token():
    draw = np.random.default_rng(0)
    logits = [draw.normal(size=6).astype(np.float32) * 3 for _ in range(2)]
    shares = np.exp(log_softmax(np.stack(logits)))
    mixture = DomainMixture((0, 1), np.array([0.6, 0.2]))
    np.testing.assert_allclose(np.exp(mixture.mixed(logits)), 0.75 * shares[0] + 0.25 * shares[1], rtol=1e-9)
    mixture.update(4, logits)
    expected = np.array([0.75 * shares[0, 4], 0.25 * shares[1, 4]])
    np.testing.assert_allclose(mixture.weights, expected / expected.sum(), rtol=1e-9)
