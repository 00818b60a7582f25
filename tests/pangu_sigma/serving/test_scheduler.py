"""The engine's thread and the event loop: a real engine, with a decoder that can be told to fail or to wait."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass

import numpy as np
import pytest

from pangu_sigma.checkpoint import resolve
from pangu_sigma.config import Config
from pangu_sigma.generation import Request, Sampling
from pangu_sigma.generation import engine as engine_module
from pangu_sigma.generation.engine import Engine
from pangu_sigma.serving.api_errors import ApiError
from pangu_sigma.serving.scheduler import Scheduler
from pangu_sigma.serving.server_metrics import ServerMetrics
from pangu_sigma.serving.server_settings import ServerLimits
from pangu_sigma.trained_model import stored_config, stored_tokenizer

SLOTS, QUEUE, WINDOW = 2, 3, 64


class CountingDecoder:
    """Always wants the id after the last, from 100 on; waits while `gate` is closed, raises what `error` holds."""

    slots, window = SLOTS, WINDOW

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.threads: set[int] = set()

    def score_blocks(self, ids, domain):
        yield np.stack([self._after(token) for token in ids])

    def begin_blocks(self, slot, ids, domain):
        yield
        return self._after(ids[-1])

    def step(self, tokens):
        self.threads.add(threading.get_ident())
        self.gate.wait()
        if self.error:
            raise self.error
        return {slot: self._after(token) for slot, token in tokens.items()}

    def end(self, slot):
        pass

    def _after(self, token: int) -> np.ndarray:
        logits = np.zeros(self.vocab, np.float32)
        logits[100 + (token + 1) % 100] = 50.0
        return logits


@dataclass
class FakeGroups:
    names: tuple[str, ...] = ("law",)


@dataclass
class FakeModel:
    vocab: int
    groups: FakeGroups
    config: Config


@pytest.fixture(scope="module")
def tokenizer(served_run):
    return stored_tokenizer(resolve(served_run))


@pytest.fixture
def decoder_class() -> type[CountingDecoder]:
    return CountingDecoder


@pytest.fixture
def decoder(tokenizer, decoder_class) -> CountingDecoder:
    return decoder_class(tokenizer.vocab_size)


@pytest.fixture
def run(served_run, tokenizer, decoder):
    """Run a coroutine function with a started scheduler."""

    def run(steps) -> Scheduler:
        async def with_scheduler() -> Scheduler:
            limits = ServerLimits(slots=SLOTS, queue=QUEUE)
            model = FakeModel(tokenizer.vocab_size, FakeGroups(), stored_config(resolve(served_run)))
            metrics = ServerMetrics(("law",), SLOTS)
            scheduler = Scheduler(lambda: Engine(model, tokenizer, SLOTS, decoder), limits, metrics)
            await scheduler.start()
            try:
                await asyncio.wait_for(steps(scheduler), 30)
            finally:
                decoder.gate.set()
                await scheduler.stop()
            return scheduler

        return asyncio.run(with_scheduler())

    return run


def a_request(count: int = 5, **more) -> Request:
    return Request((100,), "law", Sampling(max_tokens=count, temperature=0.0, **more))


async def answer(scheduler: Scheduler, *requests: Request) -> list[list[int]]:
    handle = scheduler.submit(requests)
    written: list[list[int]] = [[] for _ in requests]
    try:
        await handle.accepted()
        while handle.has_more:
            for index, event in await handle.next_events():
                written[index].append(event.token_id)
    finally:
        handle.close()
    return written


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_events_reach_their_client_and_only_one_thread_computes(run, decoder):
    async def steps(scheduler: Scheduler) -> None:
        answers = await asyncio.gather(answer(scheduler, a_request(3)), answer(scheduler, a_request(4), a_request(2)))
        assert answers == [[[101, 102, 103]], [[101, 102, 103, 104], [101, 102]]]
        await until(lambda: (scheduler.open, scheduler.active, scheduler.waiting) == (0, 0, 0))

    run(steps)
    assert len(decoder.threads) == 1 and threading.get_ident() not in decoder.threads


def test_what_does_not_fit_is_turned_away_and_fits_later(run, decoder):
    async def steps(scheduler: Scheduler) -> None:
        decoder.gate.clear()
        handles = [scheduler.submit([a_request()]) for _ in range(SLOTS + QUEUE)]
        with pytest.raises(ApiError) as refused:
            scheduler.submit([a_request()])
        assert refused.value.status == 429 and int(refused.value.headers["Retry-After"]) >= 1
        handles[-1].close()
        decoder.gate.set()
        await until(lambda: scheduler.open < SLOTS + QUEUE)
        assert await answer(scheduler, a_request(1)) == [[101]]
        for handle in handles:
            handle.close()
        await until(lambda: scheduler.open == 0)

    run(steps)


def test_one_bad_request_takes_none_of_its_ticket(run):
    async def steps(scheduler: Scheduler) -> None:
        with pytest.raises(ApiError, match="stop ids has the id 1000000"):
            await answer(scheduler, a_request(), a_request(stop_ids=(1_000_000,)))
        await until(lambda: (scheduler.open, scheduler.active, scheduler.waiting) == (0, 0, 0))
        assert await answer(scheduler, a_request(1)) == [[101]]

    run(steps)


def test_closing_at_any_moment_frees_everything(run):
    async def steps(scheduler: Scheduler) -> None:
        for pause in range(40):
            await until(lambda: scheduler.open + 2 <= SLOTS + QUEUE)
            handle = scheduler.submit([a_request(20), a_request(20)])
            for _ in range(pause % 8):
                await asyncio.sleep(0)
            if pause % 2:
                await handle.accepted()
            handle.close()
            handle.close()
        await until(lambda: (scheduler.open, scheduler.active, scheduler.waiting) == (0, 0, 0))
        assert await scheduler.drain(1)

    run(steps)


class SpoiledDecoder(CountingDecoder):
    """Fails in every step with the text that began with `spoiled`, and tells nobody which it was."""

    spoiled = 150

    def __init__(self, vocab: int) -> None:
        super().__init__(vocab)
        self.texts: dict[int, int] = {}

    def begin_blocks(self, slot, ids, domain):
        self.texts[slot] = ids[0]
        return (yield from super().begin_blocks(slot, ids, domain))

    def step(self, tokens):
        if any(self.texts[slot] == self.spoiled for slot in tokens):
            raise IndexError("row 150 is out of bounds")
        return super().step(tokens)


@pytest.mark.parametrize("decoder_class", [SpoiledDecoder])
def test_a_fault_with_one_text_ends_that_text_with_an_id_and_no_other(run, decoder, caplog):
    async def steps(scheduler: Scheduler) -> None:
        decoder.gate.clear()
        others = [asyncio.create_task(answer(scheduler, a_request(4))) for _ in range(3)]
        bad = Request((SpoiledDecoder.spoiled,), "law", Sampling(max_tokens=5, temperature=0.0))
        failing = asyncio.create_task(answer(scheduler, bad))
        await until(lambda: scheduler.open == 4)
        decoder.gate.set()
        with pytest.raises(ApiError) as raised:
            await failing
        assert await asyncio.gather(*others) == [[[101, 102, 103, 104]]] * 3
        assert raised.value.status == 500 and raised.value.code == "internal_error"
        assert "row 150" not in raised.value.message
        error_id = raised.value.message.split()[-1]
        (record,) = (record for record in caplog.records if error_id in record.getMessage())
        assert "row 150 is out of bounds" in str(record.exc_info[1]) and record.exc_info[2] is not None
        await until(lambda: (scheduler.open, scheduler.active, scheduler.waiting) == (0, 0, 0))
        assert await answer(scheduler, a_request(2)) == [[101, 102]]

    run(steps)


def test_a_fault_while_a_prompt_is_read_or_a_token_chosen_is_one_texts_own(run, decoder, monkeypatch):
    async def steps(scheduler: Scheduler) -> None:
        sampled = engine_module.sample_token

        def sample(logits, sampling, index, seen):
            if sampling.seed == 13:
                raise FloatingPointError("no number")
            return sampled(logits, sampling, index, seen)

        monkeypatch.setattr(engine_module, "sample_token", sample)
        monkeypatch.setattr(decoder, "score_blocks", lambda ids, domain: iter([np.zeros((1, 3), np.float32)]))
        scored = Request((100, 101), "law", Sampling(max_tokens=3, temperature=0.0, echo=True))
        for bad in (a_request(3, seed=13), scored, a_request(3, stop=(5,))):
            clients = [asyncio.create_task(answer(scheduler, one)) for one in (a_request(3), bad)]
            well, ill = await asyncio.gather(*clients, return_exceptions=True)
            assert well == [[101, 102, 103]]
            assert isinstance(ill, ApiError) and ill.status == 500, ill
        await until(lambda: (scheduler.open, scheduler.active, scheduler.waiting) == (0, 0, 0))

    run(steps)


def test_a_fault_of_every_step_fails_every_text_and_the_service_goes_on(run, decoder):
    async def steps(scheduler: Scheduler) -> None:
        decoder.gate.clear()
        clients = [asyncio.create_task(answer(scheduler, a_request())) for _ in range(4)]
        await until(lambda: scheduler.active)
        decoder.error = RuntimeError("the device is gone")
        decoder.gate.set()
        for client in clients:
            with pytest.raises(ApiError) as raised:
                await client
            assert raised.value.status == 500 and "the device" not in raised.value.message
        decoder.error = None
        assert await answer(scheduler, a_request(2)) == [[101, 102]]
        assert not scheduler.failed.done()

    run(steps)


def test_a_step_that_raises_outside_of_any_text_empties_the_engine_and_the_service_goes_on(run, monkeypatch):
    async def steps(scheduler: Scheduler) -> None:
        step = Engine.step
        monkeypatch.setattr(Engine, "step", lambda engine: step(engine) and 1 / 0)
        for client in [asyncio.create_task(answer(scheduler, a_request())) for _ in range(3)]:
            with pytest.raises(ApiError, match="internal error; its log says more under the id"):
                await client
        monkeypatch.setattr(Engine, "step", step)
        await until(lambda: (scheduler.open, scheduler.active, scheduler.waiting) == (0, 0, 0))
        assert await answer(scheduler, a_request(2)) == [[101, 102]]

    run(steps)


def test_draining_waits_for_what_runs(run, decoder):
    async def steps(scheduler: Scheduler) -> None:
        decoder.gate.clear()
        client = asyncio.create_task(answer(scheduler, a_request(2)))
        await until(lambda: scheduler.open)
        assert not await scheduler.drain(0.05)
        with pytest.raises(ApiError, match="shutting down"):
            scheduler.submit([a_request()])
        decoder.gate.set()
        assert await scheduler.drain(5)
        assert await client == [[101, 102]]

    run(steps)
