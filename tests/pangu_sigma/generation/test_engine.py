"""Requests through the engine: the same text with and without a cache, alone and together; ends, scores, refusals."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from pangu_sigma.errors import UserError
from pangu_sigma.generation import Request, Sampling, prompt_ids
from pangu_sigma.generation.completion import complete
from pangu_sigma.generation.engine import Engine
from pangu_sigma.generation.sampling import log_softmax
from tests.pangu_sigma.generation.conftest import DOMAINS, SLOTS, VOCAB, WINDOW
from tests.pangu_sigma.training.small_trainer import small_config, small_model


@pytest.fixture(scope="module")
def engine(kind, tokenizer) -> Engine:
    both = kind("rre")
    return Engine(both.model, tokenizer, decoder=both.cached)


@pytest.fixture(scope="module")
def plain(kind, tokenizer) -> Engine:
    both = kind("rre")
    return Engine(both.model, tokenizer, decoder=both.plain)


def ids_of(answer) -> list[int]:
    return [event.token_id for event in answer.events]


def mixed(tokenizer) -> list[Request]:
    """More requests than slots: every domain, lengths and ways of sampling."""
    names = list(DOMAINS)
    ways = [
        {"temperature": 0.0}, {"temperature": 1.0, "seed": 4}, {"temperature": 2.0, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.7}, {"temperature": 0.0, "repetition_penalty": 1.5}, {"temperature": 5.0},
    ]  # fmt: skip
    return [
        Request(prompt_ids(tokenizer, " ".join(["word7 return naïve"] * (n % 3))), names[n % 3], Sampling(6 + n, **way))
        for n, way in enumerate(ways)
    ]


def test_the_text_with_a_cache_is_the_text_without_one(engine, plain, tokenizer):
    for answer, expected in zip(complete(engine, mixed(tokenizer)), complete(plain, mixed(tokenizer)), strict=True):
        assert ids_of(answer) == ids_of(expected) and answer.text == expected.text and answer.finish == expected.finish


def test_a_text_does_not_depend_on_what_else_is_asked(engine, tokenizer):
    together = complete(engine, mixed(tokenizer))
    for request, beside in zip(mixed(tokenizer), together, strict=True):
        alone = complete(engine, [request])[0]
        assert ids_of(alone) == ids_of(beside) and alone.text == beside.text


def test_greedy_takes_the_likeliest_of_every_step(engine, kind):
    ids = (2, 40, 41)
    answer = complete(engine, [Request(ids, "code", Sampling(5, temperature=0.0))])[0]
    text = list(ids)
    for token in ids_of(answer):
        assert token == int(np.argmax(kind("rre").plain.score(text, 0)[-1]))
        text.append(token)


def test_seeds_decide_and_a_longer_answer_begins_the_same(engine):
    def written(seed: int, count: int = 6) -> list[int]:
        return ids_of(complete(engine, [Request((2, 50), "law", Sampling(count, temperature=3.0, seed=seed))])[0])

    assert written(1) == written(1)
    assert len({tuple(written(seed)) for seed in range(4)}) == 4
    assert written(2, 9)[:6] == written(2)


def test_the_joined_texts_of_the_events_are_the_decoded_tokens(engine, tokenizer):
    for answer in complete(engine, mixed(tokenizer)):
        ids = [i for i in ids_of(answer) if i != tokenizer.eod_id]
        assert answer.text == "".join(event.text for event in answer.events)
        assert answer.text == tokenizer.decode(ids)


def test_a_stop_string_a_stop_id_and_the_end_of_a_document_end_the_text(engine, tokenizer):
    base = Sampling(12, temperature=2.0, seed=3)
    request = Request(prompt_ids(tokenizer, "return"), "poems", base)
    answer = complete(engine, [request])[0]
    assert answer.finish == "length"
    cut = answer.text[3:5]
    stopped = complete(engine, [replace(request, sampling=replace(base, stop=("never", cut)))])[0]
    assert stopped.finish == "stop" and stopped.text == answer.text[: answer.text.index(cut)]
    last = ids_of(answer)[4]
    stopped = complete(engine, [replace(request, sampling=replace(base, stop_ids=(last,)))])[0]
    written = ids_of(answer)[: ids_of(answer).index(last) + 1]
    assert stopped.finish == "stop" and ids_of(stopped) == written
    assert stopped.text == tokenizer.decode(written[:-1])


def test_an_end_of_document_token_is_told_and_is_no_text(kind, tokenizer):
    class Ends:
        slots, window = 1, WINDOW

        def begin_blocks(self, slot, ids, domain):
            yield
            return np.where(np.arange(VOCAB) == 40, 5.0, 0.0).astype(np.float32)

        def step(self, tokens):
            return {0: np.where(np.arange(VOCAB) == tokenizer.eod_id, 5.0, 0.0).astype(np.float32)}

        def end(self, slot):
            pass

    engine = Engine(kind("rre").model, tokenizer, decoder=Ends())
    answer = complete(engine, [Request((5,), "law", Sampling(9, temperature=0.0, logprobs=1))])[0]
    assert ids_of(answer) == [40, tokenizer.eod_id] and answer.finish == "stop"
    assert answer.text == tokenizer.decode([40]) and answer.events[-1].logprob is not None


def test_the_window_is_the_longest_document(engine, plain):
    full = Request(tuple(range(3, 3 + WINDOW)), "code", Sampling(9, temperature=0.0))
    for one in (engine, plain):
        answer = complete(one, [full])[0]
        assert len(answer.events) == 1 and answer.finish == "length"  # one more token can be said, none can be read
    half = Request(full.prompt_ids[:20], "code", Sampling(99, temperature=0.0))
    answer, expected = (complete(one, [half])[0] for one in (engine, plain))
    assert len(answer.events) == WINDOW - 20 + 1 and ids_of(answer) == ids_of(expected)
    with pytest.raises(UserError, match="33 tokens in one document, and the model's window has 32; shorten it"):
        engine.add(Request(tuple(range(3, 36)), "code"))
    # What lies before the last end of document is not seen, so it may be as long as it likes.
    long = Request((*range(3, 60), 2, 40, 41), "code", Sampling(4, temperature=0.0))
    short = Request((40, 41), "code", Sampling(4, temperature=0.0))
    assert ids_of(complete(engine, [long])[0]) == ids_of(complete(engine, [short])[0])


def test_log_probabilities_and_scores_of_the_prompt(engine, kind):
    prompt = (50, 60, 2, 70, 80, 2)
    sampling = Sampling(3, temperature=2.0, top_k=4, seed=1, logprobs=3, echo=True)
    answer = complete(engine, [Request(prompt, "law", sampling)])[0]
    first, *others = answer.events
    assert [score.token_id for score in first.prompt_scores] == list(prompt)
    assert first.prompt_scores[0].logprob is None and not any(event.prompt_scores for event in others)
    text = [*prompt, *ids_of(answer)]
    rows = log_softmax(kind("rre").plain.score(text, 1))
    scored = [*first.prompt_scores[1:], *answer.events]
    assert len(scored) == len(text) - 1
    for row, token, score in zip(rows, text[1:], scored, strict=False):
        assert score.token_id == token and score.logprob == pytest.approx(row[token], abs=2e-5)
        best = np.argsort(-row, kind="stable")[:3]
        assert [i for i, _ in score.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in score.top], row[best], atol=2e-5)


def test_scoring_alone_writes_nothing(engine):
    prompt = (2, 50, 60, 70)
    scored = complete(engine, [Request(prompt, "code", Sampling(0, echo=True))])[0]
    (event,) = scored.events
    assert event.token_id is None and event.finish == "length" and len(event.prompt_scores) == 4
    also = complete(engine, [Request(prompt, "code", Sampling(1, echo=True))])[0]
    assert also.events[0].prompt_scores == event.prompt_scores and len(also.events) == 1
    assert engine.idle


def test_more_requests_than_slots_wait_in_order_and_a_cancelled_one_leaves_at_once(engine):
    request_ids = [engine.add(Request((2, 40 + n), "code", Sampling(20, temperature=0.0))) for n in range(SLOTS + 2)]
    for _ in range(SLOTS):
        engine.step()
    assert (engine.active, engine.waiting) == (SLOTS, 2)
    engine.cancel(request_ids[1])
    engine.cancel(request_ids[-1])
    engine.cancel(10**9)
    assert (engine.active, engine.waiting) == (SLOTS - 1, 1)
    with_events = {event.request_id for event in engine.step()}
    assert request_ids[SLOTS] in with_events and request_ids[1] not in with_events
    for request_id in request_ids:
        engine.cancel(request_id)
    assert engine.idle and engine.step() == []


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (Request((2,), "lwa"), "no domain 'lwa'; did you mean 'law'"),
        (Request((), "law"), "the prompt has no token"),
        (Request((2, VOCAB), "law"), f"the prompt has the id {VOCAB}; the vocabulary's ids are 0 to {VOCAB - 1}"),
        (Request((2, -1), "law"), "the prompt has the id -1"),
        (Request((2,), "law", Sampling(stop_ids=(999,))), "the list of stop ids has the id 999"),
        (Request((*range(3, 40), 2, 5), "law", Sampling(echo=True)), "37|38 tokens in one document"),
    ],
)
def test_a_request_that_cannot_run_is_refused_before_it_waits(engine, request_, sentence):
    with pytest.raises(UserError, match=sentence):
        engine.add(request_)
    assert engine.idle


def test_a_router_that_looks_ahead_cannot_write(tokenizer):
    model = small_model(small_config({"sparse": {"router": "expert_choice"}}))
    with pytest.raises(UserError, match="expert_choice.*tokens that are not written yet"):
        Engine(model, tokenizer)


@pytest.fixture
def broken(kind) -> Iterator[Callable[[str, int], None]]:
    """`broken(case, expert)` makes an expert of the first sparse layer give no numbers; all is mended afterwards."""
    kept = []

    def break_(case: str, expert: int) -> None:
        model = kind(case).model
        bias = model.store.table(model.config.model.sparse_prefixes[0], "down.bias")[expert]
        kept.append((bias, bias.copy()))
        bias[:] = np.nan

    yield break_
    for bias, before in kept:
        bias[:] = before


@pytest.mark.parametrize("on_device", [False, True])
def test_only_the_request_whose_own_logits_are_no_numbers_fails(kind, tokenizer, broken, on_device):
    both = kind("rre")
    engine = Engine(both.model, tokenizer, decoder=both.on_device if on_device else both.cached)
    greedy = Sampling(12, temperature=0.0)
    requests = [Request((2, 40 + n), name, greedy) for n, name in enumerate(["code", "law", "poems", "law", "code"])]
    undisturbed = complete(engine, requests)
    broken("rre", 3)  # the only expert of law
    answers = complete(engine, requests, keep_going=True)
    for request, answer, before in zip(requests, answers, undisturbed, strict=True):
        if request.domain == "law":
            assert answer.finish == "error" and answer.text == "" and answer.events == []
            assert "the experts of law compute numbers that are not finite" in answer.error
        else:
            assert answer.error is None and answer.finish == before.finish and ids_of(answer) == ids_of(before)
    assert engine.idle
    for echo in (Sampling(0, echo=True), Sampling(3, echo=True)):
        assert complete(engine, [Request((2, 50, 51), "law", echo)], keep_going=True)[0].finish == "error"
    with pytest.raises(UserError, match="the experts of law compute numbers that are not finite"):
        complete(engine, requests)
    assert engine.idle


def test_a_text_fails_where_its_numbers_end_and_keeps_what_it_had(kind, tokenizer, broken):
    both = kind("rre")
    engine = Engine(both.model, tokenizer, decoder=both.cached)
    sampling = Sampling(20, temperature=3.0, seed=7)
    requests = [Request((2, 60), "code", sampling), Request((2, 61), "poems", sampling)]
    undisturbed = complete(engine, requests)
    table = both.model.routers[0].assign
    ids = [2, 60, *ids_of(undisturbed[0])]
    experts = table(np.array([ids]), np.array([0]), 0, np.zeros(1, np.int64), False)[:, 0]
    late_expert = next(int(e) for e in (0, 1, 2) if e not in experts[:2] and e in experts[2:-1])
    broken("rre", late_expert)
    answers = complete(engine, requests, keep_going=True)
    read = int(np.flatnonzero(experts == late_expert)[0])  # the first token that the broken expert reads is its last
    assert answers[0].finish == "error" and ids_of(answers[0]) == ids[2 : read + 1]
    assert answers[1].error is None and ids_of(answers[1]) == ids_of(undisturbed[1])


@pytest.mark.parametrize("case", ["switch", "olmoe"])
def test_a_learned_gate_goes_on_too(kind, tokenizer, broken, case):
    both = kind(case)
    engine = Engine(both.model, tokenizer, decoder=both.cached)
    requests = [
        Request((2, *range(40 + n, 44 + 3 * n)), "law", Sampling(16, temperature=2.0, seed=n)) for n in range(6)
    ]
    undisturbed = complete(engine, requests)
    broken(case, 2)
    answers = complete(engine, requests, keep_going=True)
    for answer, before in zip(answers, undisturbed, strict=True):
        # Whoever never met the broken expert writes on as before.
        assert ids_of(answer) == ids_of(before)[: len(ids_of(answer))]
        assert (answer.finish == "error") == (len(ids_of(answer)) < len(ids_of(before)))
    assert any(answer.error for answer in answers) and engine.idle
