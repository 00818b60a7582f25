"""Whatever a client gets wrong: a status and an error object that OpenAI's clients understand."""

from __future__ import annotations

import json
import socket

import pytest

from tests.pangu_sigma.serving.conftest import WINDOW

GOOD = {"model": "law", "prompt": "the court", "max_tokens": 2}
CHAT = {"model": "law", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


def refused(response, status: int, *parts: str, param: str | None = None, code: str | None = None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code), error
    for part in parts:
        assert part in error["message"], error["message"]


@pytest.mark.parametrize(
    ("changes", "param", "code", "part"),
    [
        ({"promt": "x"}, "promt", "unknown_parameter", "did you mean 'prompt'?"),
        ({"temperature": "1"}, "temperature", None, "valid number"),
        ({"temperature": -1}, "temperature", None, "give 0, or a number from 1e-09 to 100"),
        ({"temperature": 5e-324}, "temperature", None, "from 1e-09 to 100"),
        ({"temperature": 1e308}, "temperature", None, "from 1e-09 to 100"),
        ({"temperature": True}, "temperature", None, ""),
        ({"repetition_penalty": 1e-308}, "repetition_penalty", None, "give a number from 0.01 to 100"),
        ({"repetition_penalty": 1e308}, "repetition_penalty", None, "give a number from 0.01 to 100"),
        ({"repetition_penalty": True}, "repetition_penalty", None, ""),
        ({"top_p": 0}, "top_p", None, "give a number from 1e-09 to 1"),
        ({"top_p": 1e-320}, "top_p", None, "give a number from 1e-09 to 1"),
        ({"top_p": True}, "top_p", None, ""),
        ({"top_k": 2**31}, "top_k", None, "a whole number from 0 to 2147483647"),
        ({"top_k": 10**400}, "top_k", None, ""),
        ({"n": True}, "n", None, ""),
        ({"max_tokens": 10**30}, "max_tokens", "context_length_exceeded", ""),
        ({"seed": True}, "seed", None, ""),
        ({"seed": 10**400}, "seed", None, ""),
        ({"best_of": True}, "best_of", None, ""),
        ({"frequency_penalty": False}, "frequency_penalty", "unsupported_parameter", "not supported"),
        ({"frequency_penalty": 5e-324}, "frequency_penalty", "unsupported_parameter", "not supported"),
        ({"prompt": [2] * 20_000, "echo": True}, "prompt", "too_many_prompt_tokens", "reads 16384 at most"),
        ({"max_tokens": 1.5}, "max_tokens", None, "integer"),
        ({"max_tokens": -1}, "max_tokens", None, "greater"),
        ({"max_tokens": 0}, "max_tokens", None, "echo"),
        ({"n": 0}, "n", None, "greater"),
        ({"n": 10_000_000}, "n", None, "64 answers"),
        ({"prompt": ["a"] * 65}, "n", None, "64 answers"),
        ({"prompt": []}, "prompt", None, "a text, a list of texts"),
        ({"prompt": [1, "a"]}, "prompt", None, "a text, a list of texts"),
        ({"prompt": [[1], [True]]}, "prompt", None, "a text, a list of texts"),
        ({"prompt": None}, "prompt", "missing_required_parameter", "required"),
        ({"prompt": [1_000_000]}, "prompt", None, "vocabulary"),
        ({"prompt": "\ud800"}, "prompt", None, "surrogate"),
        ({"stop": [""]}, "stop.0", None, "at least 1"),
        ({"stop": ["a"] * 17}, "stop", None, "at most 16"),
        ({"stop_token_ids": [-1]}, None, None, "vocabulary"),
        ({"logprobs": 21}, "logprobs", None, "20"),
        ({"logprobs": True}, "logprobs", None, "integer"),
        ({"seed": 2**63}, "seed", None, "less"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None, "stream"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown_parameter", "usage"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter", "not supported"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter", "not supported"),
        ({"best_of": 3}, "best_of", "unsupported_parameter", "not supported"),
        ({"max_tokens": WINDOW}, "max_tokens", "context_length_exceeded", "can be written after this prompt"),
        ({"prompt": "\u20ac" * WINDOW}, "prompt", "context_length_exceeded", "shorten"),
    ],
)
def test_a_wrong_completion_is_refused(client, changes, param, code, part):
    # ensure_ascii, as httpx would not send half a surrogate pair.
    body = json.dumps({**GOOD, **changes})
    response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    refused(response, 400, part, param=param, code=code)


TOOL = {"type": "function", "function": {"name": "now", "parameters": {}}}


@pytest.mark.parametrize(
    ("changes", "param", "part"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "x"}, "messages", "list"),
        ({"messages": [{"role": "user", "content": "\u20ac" * WINDOW}]}, "messages", "shorten"),
        ({"max_tokens": None, "max_completion_tokens": WINDOW}, "max_completion_tokens", "max_completion_tokens is 96"),
        ({"tools": [TOOL]}, "tools", 'tools is not supported by this server; leave it out, or give tool_choice "none"'),
        ({"tools": [TOOL], "tool_choice": "auto"}, "tools", "not supported"),
        ({"tools": [TOOL], "function_call": "none"}, "tools", "not supported"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", 'tool_choice = "required" is not supported'),
        ({"tool_choice": {"type": "function"}}, "tool_choice", 'or give "none"'),
        ({"functions": [{"name": "f"}]}, "functions", 'function_call "none"'),
        ({"response_format": {"type": "json_object"}}, "response_format", 'or give {"type": "text"}'),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", 'or give ["text"]'),
        ({"audio": {"voice": "a"}}, "audio", "not supported"),
        ({"web_search_options": {}}, "web_search_options", "not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", 'or give "none"'),
        ({"verbosity": "low"}, "verbosity", 'or give "medium"'),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"prompt": "x"}, "prompt", "Unrecognized"),
    ],
)
def test_a_wrong_chat_is_refused(client, changes, param, part):
    response = client.post("/v1/chat/completions", json={**CHAT, **changes})
    assert response.status_code == 400 and part in response.json()["error"]["message"], response.text
    assert response.json()["error"]["param"] == param


def test_neutral_and_meaningless_fields_are_accepted(client):
    more = {"user": "me", "metadata": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "n": None,
            "stop": None, "best_of": 1, "suffix": None}  # fmt: skip
    assert client.post("/v1/completions", json={**GOOD, **more}).status_code == 200


def test_a_chat_takes_what_openai_takes_and_changes_nothing(client):
    more = {
        "audio": None, "frequency_penalty": 0, "function_call": "none", "functions": [{"name": "f"}], "logit_bias": {},
        "logprobs": False, "max_completion_tokens": 2, "metadata": {"a": "b"}, "modalities": ["text"], "n": 1,
        "parallel_tool_calls": False, "prediction": {"type": "content", "content": "x"}, "presence_penalty": 0.0,
        "prompt_cache_key": "k", "prompt_cache_options": {}, "prompt_cache_retention": "24h",
        "reasoning_effort": "none", "response_format": {"type": "text"}, "safety_identifier": "s", "stop": [],
        "service_tier": "auto", "store": True, "stream": False, "stream_options": None,
        "tool_choice": "none", "tools": [TOOL], "top_logprobs": 0, "top_p": 1,
        "user": "me", "verbosity": "medium", "web_search_options": None,
    }  # fmt: skip
    plain = {**CHAT, "temperature": 1, "seed": 3}
    answers = [client.post("/v1/chat/completions", json=body).json() for body in (plain, {**plain, **more})]
    assert answers[0]["choices"] == answers[1]["choices"] and answers[0]["usage"] == answers[1]["usage"]
    assert client.post("/v1/chat/completions", json={**plain, "tools": [], "tool_choice": "auto"}).status_code == 200


def test_an_unknown_model_names_the_nearest(client):
    refused(client.post("/v1/completions", json={**GOOD, "model": "poem"}), 404, "did you mean 'poems'?",
            param="model", code="model_not_found")  # fmt: skip
    body = json.dumps({**GOOD, "model": "\udc00" * 10_000})
    response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    refused(response, 404, param="model", code="model_not_found")
    refused(client.get("/v1/models/nothing"), 404, param="model", code="model_not_found")


NO_OBJECT = [b"", b"{", b"[1]", b'"x"', b"null", b"\xff\xfe", b"[" * 100_000, b'{"n":' + b"9" * 5000]


@pytest.mark.parametrize("body", NO_OBJECT, ids=lambda body: body[:8].decode("latin-1"))
def test_a_body_that_is_no_json_object_is_refused(client, body):
    response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error", response.text


def test_not_a_number_is_refused(client):
    body = json.dumps({**GOOD, "temperature": float("nan")})
    response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    refused(response, 400, "finite", param="temperature")


def test_paths_methods_and_kinds_of_body(client):
    refused(client.get("/v1/engines"), 404, "/v1/engines")
    for path in ("/v1/embeddings", "/v1/responses"):
        refused(client.post(path, json={"model": "law", "input": "x"}), 404, path, "/v1/chat/completions")
    refused(client.put("/v1/models"), 405, "PUT")
    refused(client.get("/v1/completions"), 405, "GET")
    refused(client.post("/v1/completions", content=json.dumps(GOOD)), 415, code="unsupported_media_type")
    form = {"Content-Type": "text/plain"}
    refused(client.post("/v1/completions", content=json.dumps(GOOD), headers=form), 415, code="unsupported_media_type")


def test_a_foreign_host_name_is_refused_on_loopback(client):
    refused(client.get("/v1/models", headers={"Host": "rebound.example"}), 403, "localhost", code="host_not_allowed")
    assert client.get("/v1/models", headers={"Host": "localhost:1"}).status_code == 200


@pytest.mark.parametrize("host", ["[::1]evil.com", "localhost:evil.com", "127.0.0.1:80.evil.com", "[::1"])
def test_a_host_that_only_begins_like_this_machine_is_refused(client, host):
    refused(client.get("/v1/models", headers={"Host": host}), 403, "localhost", code="host_not_allowed")


def test_there_is_no_permission_for_other_origins(client):
    headers = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    response = client.options("/v1/completions", headers=headers)
    assert response.status_code == 405
    answers = [response, client.get("/v1/models", headers=headers)]
    assert not any(name.startswith("access-control") for answer in answers for name in answer.headers)


def test_noise_on_the_socket_disturbs_nobody(server, client):
    address = (server.url.split("//")[1].split(":")[0], int(server.url.rsplit(":", 1)[1]))
    for noise in (b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Le"):
        with socket.create_connection(address) as connection:
            connection.sendall(noise)
    assert client.get("/health").json()["status"] == "ok"
    assert "Traceback" not in server.stderr_text()
