"""The official `openai` client."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.pangu_sigma.serving.server_process import Server

openai = pytest.importorskip("openai", reason="the openai client is not installed: make clients")


@pytest.fixture(scope="module")
def client(server) -> Iterator:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_models(client):
    assert [model.id for model in client.models.list()] == ["code", "law", "poems", "auto"]
    assert client.models.retrieve("law").owned_by == "pangu-sigma"
    with pytest.raises(openai.NotFoundError, match="did you mean 'law'"):
        client.models.retrieve("lwa")


def test_a_completion_with_log_probabilities(client):
    answer = client.completions.create(
        model="law", prompt="the court", max_tokens=6, temperature=0, logprobs=3, echo=True, user="somebody"
    )
    (choice,) = answer.choices
    assert choice.text.startswith("the court") and choice.finish_reason in ("stop", "length")
    table = choice.logprobs
    assert len(table.tokens) == len(table.token_logprobs) == len(table.text_offset) == answer.usage.total_tokens
    written = answer.usage.completion_tokens
    # Greedy: every written token is the likeliest of its alternatives.
    for own, top in list(zip(table.token_logprobs, table.top_logprobs, strict=True))[-written:]:
        assert own == max(top.values())


def test_a_streamed_completion(client):
    fields = dict(model="poems", prompt="rose", max_tokens=30, temperature=0.9, seed=4)
    full = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == full.choices[0].text
    assert chunks[-1].usage == full.usage and chunks[-2].choices[0].finish_reason == full.choices[0].finish_reason


def test_extensions_travel_in_the_extra_body(client):
    fields = dict(model="law", prompt="the court", max_tokens=8, temperature=5.0, seed=1)
    greedy = client.completions.create(**{**fields, "temperature": 0})
    first = client.completions.create(**fields, extra_body={"top_k": 1})
    assert first.choices[0].text == greedy.choices[0].text


def test_a_chat_whole_and_streamed(client):
    fields = dict(model="law", messages=[{"role": "user", "content": "the court"}], max_completion_tokens=12, seed=2)
    full = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    (choice,) = full.choices
    assert choice.message.role == "assistant" and len(choice.logprobs.content) == full.usage.completion_tokens
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    chunks = list(client.chat.completions.create(**fields, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason


def test_a_stream_that_is_left_frees_its_slot(client, server):
    for _ in range(10):
        stream = client.completions.create(model="law", prompt="x", max_tokens=80, n=8, stream=True)
        next(iter(stream))
        stream.close()
    server.wait_for(active=0, waiting=0)


def test_mistakes_are_the_clients_own_exceptions(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="law", prompt="x", extra_body={"temprature": 1})
    assert error.value.param == "temprature" and error.value.code == "unknown_parameter"
    with pytest.raises(openai.BadRequestError, match="window"):
        client.completions.create(model="law", prompt="\u20ac" * 500)
    with pytest.raises(openai.BadRequestError, match="not supported"):
        client.completions.create(model="law", prompt="x", presence_penalty=1.0)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt", prompt="x")


def test_the_client_waits_and_tries_again_when_the_queue_is_full_and_needs_the_token(served_run, tmp_path):
    server = Server(served_run, tmp_path, "--slots", 1, "--queue", 1, environment={"PANGU_SIGMA_TOKEN": "rosebud"})
    base = f"{server.url}/v1"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=base, api_key="wrong").models.list()
    hasty = openai.OpenAI(base_url=base, api_key="rosebud", max_retries=0)
    patient = openai.OpenAI(base_url=base, api_key="rosebud", max_retries=20)

    def ask(client):
        return client.completions.create(model="law", prompt="the court", max_tokens=40, temperature=0)

    def hasty_ask(_) -> bool:
        try:
            ask(hasty)
        except openai.RateLimitError as error:
            assert int(error.response.headers["retry-after"]) >= 1
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            if not all(pool.map(hasty_ask, range(8))):
                break
        else:
            pytest.fail("eight clients never filled one slot and a queue of one")
        assert len({answer.choices[0].text for answer in pool.map(ask, [patient] * 4)}) == 1
    assert server.stop() == 0
