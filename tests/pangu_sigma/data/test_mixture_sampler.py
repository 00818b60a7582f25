import json
import threading
import time

import numpy as np
import pytest

from pangu_sigma.data.mixture_sampler import MixtureSampler
from pangu_sigma.data.packed_sequences import PackedSequences
from pangu_sigma.data.prefetcher import Prefetcher
from pangu_sigma.errors import UserError

NAMES = ("code", "law", "news")
WEIGHTS = {"code": 5.0, "law": 3.0, "news": 2.0}


@pytest.fixture
def streams(make_store):
    """Three domains whose tokens tell where they come from: code 0–29, law 30–59, news 60–89."""

    def make(names=NAMES, seed=1, identity=None):
        made = []
        for name in names:
            first = NAMES.index(name) * 30
            store = make_store(name, [np.arange(first + a, first + a + 5) for a in range(0, 25, 5)])
            made.append(PackedSequences(name, store, 8, seed, identity or {"corpus": f"sha of {name}"}))
        return made

    return make


def phases(step):
    return {"code": 1.0} if step < 3 else {"law": 1.0, "news": 1.0}


def collect(sampler, steps, size=6, **kwargs):
    return [sampler.next_batch(size, **kwargs) for _ in range(steps)]


def test_a_batch_has_the_stated_form_and_every_row_is_text_of_its_domain(streams):
    sampler = MixtureSampler(streams(), WEIGHTS, seed=1)
    first, second = collect(sampler, 2)
    assert (first.tokens.dtype, first.tokens.shape) == (np.int32, (6, 9))
    assert (first.domain.dtype, first.domain.shape) == (np.int32, (6,))
    assert first.sample.dtype == np.int64
    assert (first.sample.tolist(), second.sample.tolist()) == (list(range(6)), list(range(6, 12)))
    assert (first.step, second.step) == (0, 1)
    for tokens, domain in zip(first.tokens, first.domain, strict=True):
        assert {token // 30 for token in tokens.tolist() if token != 99} == {domain}


def test_domains_come_by_weight_in_every_step_and_in_the_long_run(streams):
    sampler = MixtureSampler(streams(), WEIGHTS, seed=1)
    counts = np.array([np.bincount(batch.domain, minlength=3) for batch in collect(sampler, 400, 7)])
    share = np.array([0.5, 0.3, 0.2])
    assert (np.abs(counts - 7 * share) < 1 + 1e-9).all()
    assert np.abs(counts.mean(axis=0) / 7 - share).max() < 0.01


def test_a_domains_sequences_come_in_order_and_none_is_left_out(streams):
    made = streams()
    rows = {domain_id: [] for domain_id in range(3)}
    for batch in collect(MixtureSampler(made, WEIGHTS, seed=1), 20):
        for tokens, domain in zip(batch.tokens, batch.domain, strict=True):
            rows[domain].append(tokens.tolist())
    for domain_id, stream in enumerate(made):
        assert rows[domain_id] == [stream.sequence(index).tolist() for index in range(len(rows[domain_id]))]


@pytest.mark.parametrize("limit", [1, 2])
def test_max_domains_per_batch_limits_each_step_and_keeps_the_shares(streams, limit):
    sampler = MixtureSampler(streams(), WEIGHTS, seed=1, max_domains_per_batch=limit)
    batches = collect(sampler, 600)
    assert max(len(set(batch.domain.tolist())) for batch in batches) == limit
    share = np.bincount(np.concatenate([batch.domain for batch in batches])) / 3600
    assert np.abs(share - [0.5, 0.3, 0.2]).max() < 0.04


def test_with_a_limit_any_two_domains_meet(streams):
    sampler = MixtureSampler(streams(), dict.fromkeys(NAMES, 1.0), seed=1, max_domains_per_batch=2)
    pairs = {tuple(sorted(set(batch.domain.tolist()))) for batch in collect(sampler, 100)}
    assert pairs == {(0, 1), (0, 2), (1, 2)}


def test_several_processes_read_together_what_one_reads_alone(streams):
    alone = collect(MixtureSampler(streams(), WEIGHTS, seed=1), 5)
    halves = [collect(MixtureSampler(streams(), WEIGHTS, seed=1), 5, rows=rows) for rows in (slice(0, 2), slice(2, 6))]
    for step, batch in enumerate(alone):
        for field in ("tokens", "domain", "sample"):
            parts = np.concatenate([getattr(half[step], field) for half in halves])
            assert (parts == getattr(batch, field)).all()


def test_a_placement_group_reads_its_own_domains_in_its_run_of_every_part(streams):
    groups = [range(0, 1), range(1, 3)]
    sampler = MixtureSampler(streams(), WEIGHTS, seed=1, max_domains_per_batch=1, placement=groups, parts=2)
    drawn = np.array([batch.domain.reshape(2, 2, 3) for batch in collect(sampler, 200, size=12)])
    assert (drawn[:, :, 0] == 0).all() and (drawn[:, :, 1] > 0).all()
    # The limit counts per group; inside a group the shares are the weights'.
    assert all(len(set(step[:, 1].reshape(-1))) == 1 for step in drawn)
    assert (drawn[:, :, 1] == 1).mean() == pytest.approx(0.6, abs=0.1)
    assert {sampler.state()["domains"][name]["cursor"] for name in ("code",)} == {200 * 6}


def test_the_restored_state_continues_exactly(streams):
    uninterrupted = collect(MixtureSampler(streams(), phases, seed=1), 9)
    first = MixtureSampler(streams(), phases, seed=1)
    collect(first, 4)
    state = json.loads(json.dumps(first.state()))
    second = MixtureSampler(streams(), phases, seed=1)
    second.restore(state)
    for batch, expected in zip(collect(second, 5), uninterrupted[4:], strict=True):
        assert (batch.tokens == expected.tokens).all()
        assert (batch.domain == expected.domain).all()
        assert (batch.sample == expected.sample).all()
    assert second.state() != state


def test_phases_change_the_domains_at_their_step(streams):
    drawn = [set(batch.domain.tolist()) for batch in collect(MixtureSampler(streams(), phases, seed=1), 6)]
    assert drawn == [{0}] * 3 + [{1, 2}] * 3


def test_a_state_that_does_not_fit_is_refused_by_name(streams):
    state = MixtureSampler(streams(), WEIGHTS, seed=1).state()

    def refused(message, names=NAMES, seed=1, identity=None, state=state):
        with pytest.raises(UserError, match=message):
            MixtureSampler(streams(names, seed, identity), lambda step: {}, seed=seed).restore(state)

    refused("run.seed is 2 but the checkpoint was made with 1", seed=2)
    refused("the checkpoint has the domain 'news'", names=NAMES[:2])
    refused("domain 'code': the corpus differs from the checkpoint's", identity={"corpus": "other"})
    refused("domain 'code': the tokenizer differs", identity={"tokenizer": "new"})
    refused("version 9", state=state | {"version": 9})
    old = MixtureSampler(streams(NAMES[:2]), {"law": 1.0}, seed=1)
    old.next_batch(4)
    refused("the checkpoint lacks the domain 'news'", state=old.state())
    grown = MixtureSampler(streams(), WEIGHTS, seed=1)
    grown.restore(old.state(), allow_new_domains=True)
    assert [entry["cursor"] for entry in grown.state()["domains"].values()] == [0, 4, 0]


def test_a_changed_corpus_is_named_before_the_tokenizer_it_changed(streams):
    def sampler(corpus, tokenizer):
        made = streams(("code",), identity={"corpus": "a", "tokenizer": tokenizer})
        made += streams(("law",), identity={"corpus": corpus, "tokenizer": tokenizer})
        return MixtureSampler(made, {"code": 1.0}, seed=1)

    with pytest.raises(UserError, match="domain 'law': the corpus differs"):
        sampler("new", "trained on new").restore(sampler("old", "trained on old").state())


@pytest.mark.parametrize(
    "weights", [{"code": -1.0, "law": 2.0}, {"code": 0.0}, {"code": float("nan")}, {"sport": 1.0}, {}]
)
def test_unusable_weights_are_refused(streams, weights):
    with pytest.raises(UserError, match="weight"):
        MixtureSampler(streams(), weights, seed=1).next_batch(4)


def test_unusable_arguments_are_refused(streams):
    with pytest.raises(UserError, match="max_domains_per_batch is 0"):
        MixtureSampler(streams(), WEIGHTS, seed=1, max_domains_per_batch=0)
    with pytest.raises(ValueError, match="different names"):
        MixtureSampler([], WEIGHTS, seed=1)


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_reading_ahead_gives_the_same_batches_and_the_state_of_the_last_one_used(streams, ahead):
    plain = MixtureSampler(streams(), phases, seed=1)
    with Prefetcher(MixtureSampler(streams(), phases, seed=1), 6, ahead) as batches:
        assert batches.state() == plain.state()
        for _ in range(7):
            batch, expected = next(batches), plain.next_batch(6)
            assert (batch.tokens == expected.tokens).all()
            assert batches.state() == plain.state()


def test_the_thread_really_reads_ahead_and_ends_with_close(streams):
    before = threading.active_count()
    done = []
    with Prefetcher(
        MixtureSampler(streams(), WEIGHTS, seed=1), 4, 3, transform=lambda b: done.append(b) or b.step
    ) as it:
        assert next(it) == 0
        deadline = time.monotonic() + 5
        while len(done) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(done) >= 4
    it.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(it)


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_while_reading_ahead_comes_after_the_good_batches_and_stays(streams, ahead):
    def weights(step):
        return WEIGHTS if step < 2 else {"sport": 1.0}

    with Prefetcher(MixtureSampler(streams(), weights, seed=1), 4, ahead) as batches:
        next(batches), next(batches)
        state = batches.state()
        for _ in range(2):
            with pytest.raises(UserError, match="'sport'"):
                next(batches)
        assert batches.state() == state
    with pytest.raises(ValueError, match="ahead"):
        Prefetcher(MixtureSampler(streams(), weights, seed=1), 4, -1)
