"""/v1/completions and /v1/chat/completions over real connections."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pangu_sigma.checkpoint import resolve
from pangu_sigma.trained_model import stored_tokenizer
from tests.pangu_sigma.serving.conftest import WINDOW
from tests.pangu_sigma.training.training_process import command


@pytest.fixture(scope="module")
def tokenizer(served_run):
    return stored_tokenizer(resolve(served_run))


def complete(client, **fields) -> dict:
    response = client.post("/v1/completions", json={"model": "law", "prompt": "the court shall", **fields})
    assert response.status_code == 200, response.text
    return response.json()


def streamed(client, path: str, **fields) -> list[dict]:
    """The stream's objects; it must end with [DONE]."""
    with client.stream("POST", path, json={"stream": True, **fields}) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(text) for text in data[:-1]]


def test_every_domain_is_a_model(client, server):
    listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == server.domains == ["code", "law", "poems", "auto"]
    assert client.get("/v1/models/law").json() == listed["data"][1]
    assert listed["data"][1]["max_model_len"] == WINDOW


def test_domains_write_with_their_own_experts(client):
    def scores(domain: str) -> list[float]:
        answer = complete(client, model=domain, echo=True, max_tokens=0, logprobs=0)
        return answer["choices"][0]["logprobs"]["token_logprobs"]

    assert scores("code") != scores("law") == scores("law")


def test_auto_is_the_domain_that_it_tells(client):
    fields = {"max_tokens": 5, "temperature": 1.0, "seed": 7, "logprobs": 1}
    auto = complete(client, model="auto", **fields)
    assert auto["model"] == "auto"
    ((name, share),) = auto["choices"][0].pop("domains").items()
    assert 1 / 3 <= share <= 1.0
    given = complete(client, model=name, **fields)
    assert auto["choices"] == given["choices"] and auto["usage"] == given["usage"]
    pieces = streamed(client, "/v1/completions", model="auto", prompt="the court shall", **fields)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == auto["choices"][0]["text"]
    domains = [piece["choices"][0].get("domains") for piece in pieces]
    assert domains[-1] == {name: share} and not any(domains[:-1])
    body = {"model": "auto", "messages": [{"role": "user", "content": "moon"}], "max_tokens": 3}
    assert client.post("/v1/chat/completions", json=body).json()["choices"][0]["domains"]


def test_usage_counts_what_was_read_and_written(client, tokenizer):
    answer = complete(client, max_tokens=7, temperature=0, stop_token_ids=[])
    read = len(tokenizer.encode("the court shall"))
    written = answer["usage"]["completion_tokens"]
    assert answer["usage"] == {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    assert written == 7 or answer["choices"][0]["finish_reason"] == "stop"


def test_the_four_forms_of_a_prompt(client, tokenizer):
    ids = [tokenizer.eod_id, *tokenizer.encode("the court shall")]
    other = [tokenizer.eod_id, *tokenizer.encode("a rose")]
    same = dict(max_tokens=6, temperature=0)
    text = complete(client, **same)["choices"][0]["text"]
    assert complete(client, prompt=ids, **same)["choices"][0]["text"] == text
    both = complete(client, prompt=["the court shall", "a rose"], **same)
    assert [choice["index"] for choice in both["choices"]] == [0, 1] and both["choices"][0]["text"] == text
    again = complete(client, prompt=[ids, other], **same)
    assert [c["text"] for c in again["choices"]] == [c["text"] for c in both["choices"]]


def test_a_stream_joins_to_the_whole_answer(client):
    fields = dict(model="poems", prompt="rose \u00e9", max_tokens=40, seed=5, temperature=1.3, logprobs=1)
    full = complete(client, **fields)
    chunks = streamed(client, "/v1/completions", stream_options={"include_usage": True}, **fields)
    *pieces, last = chunks
    assert last["choices"] == [] and last["usage"] == full["usage"]
    assert all(piece["usage"] is None and piece["id"] == chunks[0]["id"] for piece in pieces)
    choices = [piece["choices"][0] for piece in pieces]
    assert "".join(choice["text"] for choice in choices) == full["choices"][0]["text"]
    assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == full["choices"][0]["finish_reason"]
    joined = {name: sum((choice["logprobs"][name] for choice in choices), []) for name in choices[0]["logprobs"]}
    own = full["choices"][0]["logprobs"]
    assert joined["tokens"] == own["tokens"] and joined["text_offset"] == own["text_offset"]
    # Another number of texts under way rounds differently.
    np.testing.assert_allclose(joined["token_logprobs"], own["token_logprobs"], rtol=1e-5)
    assert [top.keys() for top in joined["top_logprobs"]] == [top.keys() for top in own["top_logprobs"]]


def test_echo_scores_the_prompt_without_writing(client, tokenizer):
    prompt = "the court \u20ac shall"
    answer = complete(client, prompt=prompt, echo=True, logprobs=2, max_tokens=0)
    (choice,) = answer["choices"]
    assert choice["text"] == prompt and choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    table = choice["logprobs"]
    ids = tokenizer.encode(prompt)
    assert len(table["tokens"]) == len(ids) == len(table["token_logprobs"]) == len(table["top_logprobs"])
    # Read back: spelled tokens are the prompt, single bytes among them.
    spelled = b"".join(
        bytes([int(token.removeprefix("bytes:\\x"), 16)]) if token.startswith("bytes:") else token.encode()
        for token in table["tokens"]
    )
    assert spelled.decode() == prompt
    assert any(token.startswith("bytes:") for token in table["tokens"])
    for token, offset in zip(table["tokens"], table["text_offset"], strict=True):
        assert token.startswith("bytes:") or prompt[offset:].startswith(token)
    for token, own, top in zip(table["tokens"], table["token_logprobs"], table["top_logprobs"], strict=True):
        assert own < 0 and top[token] == own and own <= max(top.values()) and 2 <= len(top) <= 3


def test_a_text_is_scored_from_its_beginning_and_ids_as_they_are(client, tokenizer):
    ids = tokenizer.encode("the court")
    fields = dict(echo=True, logprobs=0, max_tokens=0)

    def scores(prompt) -> list[float | None]:
        return complete(client, prompt=prompt, **fields)["choices"][0]["logprobs"]["token_logprobs"]

    text, alone, begun = scores("the court"), scores(ids), scores([tokenizer.eod_id, *ids])
    assert text[0] is not None and alone[0] is None and begun[0] is None
    assert text == begun[1:]
    np.testing.assert_allclose(text[1:], alone[1:], rtol=1e-5)


def test_the_end_of_document_counts_as_a_written_token(client, tokenizer):
    """Whoever asks for one token gets exactly one log-probability behind the prompt's, whatever the token is."""
    end = tokenizer.piece(tokenizer.eod_id)
    kinds = set()
    for seed in range(400):
        answer = complete(client, max_tokens=1, seed=seed, temperature=3.0, logprobs=0)
        (choice,) = answer["choices"]
        assert len(choice["logprobs"]["tokens"]) == 1 == answer["usage"]["completion_tokens"]
        if choice["logprobs"]["tokens"] == [end]:
            assert choice["finish_reason"] == "stop" and choice["text"] == ""
            kinds.add("end")
        else:
            kinds.add("more")
        if len(kinds) == 2:
            return
    pytest.fail(f"only {kinds} in 400 draws")


def test_several_answers_are_seeded_each(client):
    fields = dict(max_tokens=12, temperature=2.0, seed=11)
    one = complete(client, **fields)["choices"][0]["text"]
    texts = [choice["text"] for choice in complete(client, n=3, **fields)["choices"]]
    assert texts[0] == one and len(set(texts)) == 3
    chunks = streamed(client, "/v1/completions", model="law", prompt="the court shall", n=3, **fields)
    joined = ["", "", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            joined[choice["index"]] += choice["text"]
    assert joined == texts
    assert len({complete(client, max_tokens=12, temperature=2.0)["choices"][0]["text"] for _ in range(3)}) > 1


def test_a_stop_string_ends_the_text_before_it(client):
    full = complete(client, max_tokens=30, seed=3, temperature=1.0)["choices"][0]["text"]
    stop = next(full[start : start + 2] for start in range(4, len(full)) if full.find(full[start : start + 2]) >= 4)
    cut = complete(client, max_tokens=30, seed=3, temperature=1.0, stop=stop)["choices"][0]
    assert cut["text"] == full[: full.index(stop)] and cut["finish_reason"] == "stop"


def test_without_max_tokens_sixteen_are_written_at_most(client):
    assert complete(client, temperature=0, repetition_penalty=1.5)["usage"]["completion_tokens"] <= 16


def test_a_chat_is_a_plain_text_with_names(client):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "court"}]},
    ]
    fields = dict(model="law", max_tokens=20, temperature=0)
    chat = client.post("/v1/chat/completions", json={"messages": messages, **fields}).json()
    (choice,) = chat["choices"]
    written_down = "System: Be brief.\nUser: the court\nAssistant:"
    same = complete(client, prompt=written_down, stop=["\nUser:", "\nSystem:"], **fields)
    assert choice["message"] == {"role": "assistant", "content": same["choices"][0]["text"].lstrip(), "refusal": None}
    assert chat["usage"] == same["usage"]
    chunks = streamed(client, "/v1/chat/completions", messages=messages, **fields)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == choice["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]


def test_tokens_and_back(client, tokenizer):
    text = "the court \u20ac"
    end = client.get("/tokenizer_info").json()["eos_token"]
    ids = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert ids == tokenizer.encode(text)
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text}
    assert client.post("/tokenize", json={"prompt": end}).json()["tokens"] == [tokenizer.eod_id]
    # In a text the same letters are letters.
    inside = client.post("/tokenize", json={"prompt": f"a{end}", "add_special_tokens": False}).json()["tokens"]
    assert tokenizer.eod_id not in inside


def test_the_interface_describes_itself(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/metrics"} <= paths.keys()


def test_texts_are_decoded_together_and_counted(client, server):
    """Eight texts of all domains take hardly more decoding steps than the longest of them."""
    server.wait_for(active=0, waiting=0)
    names = [f'pangu_sigma_generated_tokens_total{{domain="{domain}"}}' for domain in server.domains[:3]]
    before = server.gauge("pangu_sigma_step_seconds_count"), [server.gauge(name) for name in names]

    def ask(index: int) -> int:
        fields = dict(model=server.domains[index % 3], max_tokens=60, seed=index, temperature=0.5)
        return complete(client, **fields)["usage"]["completion_tokens"]

    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(ask, range(8)))
    steps = server.gauge("pangu_sigma_step_seconds_count") - before[0]
    assert max(written) - 1 <= steps < 0.6 * sum(written)
    for index, (name, count) in enumerate(zip(names, before[1], strict=True)):
        assert server.gauge(name) - count == sum(written[index::3])


def test_generate_writes_of_a_chat_the_answer_that_the_server_gives(served_run, client, tmp_path):
    asked = {"model": "law", "messages": [{"role": "user", "content": "the court"}], "temperature": 0, "max_tokens": 5}
    answer = client.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
    words = ["--domain", "law", "--prompt", "the court", "--chat", "--temperature", 0, "--max-tokens", 5]
    done = command("generate", served_run, *words, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.lstrip() == answer + "\n", done.stderr
