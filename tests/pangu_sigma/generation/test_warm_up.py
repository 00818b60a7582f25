"""After the warm-up no request that the engine admits makes MindSpore compile anything."""

from __future__ import annotations

import mindspore.graph.api
import pytest

from pangu_sigma.generation import Request, Sampling
from pangu_sigma.generation.completion import complete
from pangu_sigma.generation.engine import Engine
from pangu_sigma.generation.kv_cache_decoder import KvCacheDecoder, bucket, buckets
from tests.pangu_sigma.generation.conftest import SLOTS, WINDOW


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """Names of the cells that MindSpore compiles from now on. Every call of a cell in graph mode goes through its
    executor's `compile`, which says whether it compiled or had the graph."""
    names: list[str] = []
    executor = mindspore.graph.api._CellGraphExecutor
    compile_cell = executor.compile

    def counted(self, cell, *args, **kwargs):
        phase, fresh = compile_cell(self, cell, *args, **kwargs)
        if fresh:
            names.append(type(cell).__name__)
        return phase, fresh

    monkeypatch.setattr(executor, "compile", counted)
    return names


def every_length(engine: Engine, echo: bool) -> list[Request]:
    """Prompts of every length that is admitted, in all domains; answers of one token and of as many as fit."""
    requests = []
    for length in range(1, WINDOW + 1):
        domain = engine.domains[length % len(engine.domains)]
        for most in (1, WINDOW):
            sampling = Sampling(most, temperature=0.0, echo=echo and length % 2 == 0)
            requests.append(Request((2, *range(40, 39 + length)), domain, sampling))
    return requests


@pytest.mark.parametrize(("case", "on_device"), [("rre", False), ("slots", True)])
def test_no_admitted_length_compiles_after_the_warm_up(kind, tokenizer, compiled, case, on_device):
    model = kind(case).model
    decoder = KvCacheDecoder(model, SLOTS, WINDOW // 2, on_device=on_device, block=16)
    engine = Engine(model, tokenizer, decoder=decoder)
    progress: list[tuple[int, int]] = []
    engine.warm_up(lambda done, total: progress.append((done, total)))
    # A first block, and one behind it: the last row or every row.
    prompts, batches = 2 * 2, len(buckets(1, SLOTS)) * len(buckets(WINDOW // 2, WINDOW))
    assert progress == [(done, prompts + batches) for done in range(prompts + batches + 1)]
    assert len(compiled) >= prompts + batches, "what the test counts is not what MindSpore does"
    compiled.clear()
    answers = complete(engine, every_length(engine, echo=True))
    assert all(answer.finish in ("stop", "length") for answer in answers)
    assert compiled == []


def test_a_warm_up_changes_no_answer(kind, tokenizer, compiled):
    model = kind("rre").model
    warm = Engine(model, tokenizer, decoder=KvCacheDecoder(model, SLOTS, WINDOW // 2, block=16))
    warm.warm_up(scores=False)
    cold = Engine(model, tokenizer, decoder=kind("rre").cached)
    requests = every_length(warm, echo=False)[::5]
    for answer, expected in zip(complete(warm, requests), complete(cold, requests), strict=True):
        assert [e.token_id for e in answer.events] == [e.token_id for e in expected.events]


def test_an_engine_at_work_is_not_warmed_up(kind, tokenizer):
    engine = Engine(kind("rre").model, tokenizer, decoder=kind("rre").cached)
    request_id = engine.add(Request((2, 40), "code"))
    with pytest.raises(ValueError, match="at work"):
        engine.warm_up()
    engine.cancel(request_id)


@pytest.mark.parametrize(("smallest", "largest"), [(1, 1), (1, 6), (1, 8), (16, 96), (128, 96), (128, 128)])
def test_every_need_has_its_bucket_and_every_bucket_a_need(smallest: int, largest: int):
    needed = {bucket(need, smallest, largest) for need in range(1, largest + 1)}
    assert sorted(needed) == buckets(smallest, largest)
    assert all(bucket(need, smallest, largest) >= need for need in range(1, largest + 1))
