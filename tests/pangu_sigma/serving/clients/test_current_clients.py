"""The newest openai client and LangChain, each in an environment of its own: what they send by themselves."""

from __future__ import annotations

import httpx
import pytest

from tests.pangu_sigma.serving.clients.client_environments import run_program

pytestmark = pytest.mark.slow


def ask(client: httpx.Client, *turns: tuple[str, str]) -> str:
    """The answer of four tokens to plain messages."""
    messages = [{"role": role, "content": content} for role, content in turns]
    body = {"model": "law", "messages": messages, "max_tokens": 4, "temperature": 0}
    return client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


def test_the_newest_openai_client_holds_a_conversation(server, client):
    results = run_program("openai", "converse_with_openai.py", f"{server.url}/v1", "law")
    first = ask(client, ("user", "the court"))
    assert results["models"] == server.domains
    for same in ("first", "parts", "streamed", "helper", "switched_off", "neutral"):
        assert results[same] == first, same
    second = ask(client, ("user", "the court"), ("assistant", first), ("user", "the court"))
    assert results["history"] == results["history_by_hand"] == results["dumped"] == second
    tool = ask(client, ("user", "the court"), ("assistant", "weather({})"), ("tool", "sunny"))
    assert results["tool"] == tool
    assert results["completion"][0].startswith("the court") and results["completion"][1] > 4
    refusals = results["refusals"]
    assert refusals["tools"][:4] == ["BadRequestError", 400, "tools", "unsupported_parameter"]
    assert 'tool_choice "none"' in refusals["tools"][4]
    assert refusals["format"][:3] == ["BadRequestError", 400, "response_format"]
    assert refusals["image"][:3] == ["BadRequestError", 400, "messages.0.content"]
    assert "reads text only" in refusals["image"][4]
    assert refusals["embeddings"][:2] == refusals["responses"][:2] == ["NotFoundError", 404]
    assert refusals["model"][:4] == ["NotFoundError", 404, "model", "model_not_found"]


def test_langchain_holds_a_conversation(server, client):
    results = run_program("langchain", "converse_with_langchain.py", f"{server.url}/v1", "law")
    first = ask(client, ("user", "the court"))
    for same in ("first", "streamed", "parts", "switched_off"):
        assert results[same] == first, same
    assert results["batch"] == [first] * 3
    assert results["chain"] == ask(client, ("system", "be brief"), ("user", "the court"))
    turns = ("system", "be brief"), ("user", "the court"), ("assistant", first), ("user", "the court")
    assert results["history"] == ask(client, *turns)
    call = 'weather({"city": "Paris"})'
    assert results["tool"] == ask(client, ("user", "the court"), ("assistant", call), ("tool", "sunny"))
    written = {"model": "law", "prompt": "the court", "max_tokens": 4, "temperature": 0}
    assert results["completion"] == client.post("/v1/completions", json=written).json()["choices"][0]["text"]
    assert results["tokens"] > results["logprobs"] == 4
    assert results["refusals"] == {
        "tools": ["OpenAIInvalidRequestError", "tools"],
        "json": ["OpenAIInvalidRequestError", "response_format"],
        "structured": ["OpenAIInvalidRequestError", "response_format"],
    }
