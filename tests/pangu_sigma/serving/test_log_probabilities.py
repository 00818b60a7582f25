"""Log-probabilities of every kind of tokenizer over HTTP: bytes, spelling, offsets, as many alternatives as asked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import httpx
import pytest

from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.generation import Event
from pangu_sigma.generation.text_stream import TextStream
from pangu_sigma.generation.token_text import TokenTexts, spelt_apart
from pangu_sigma.serving.openai_responses import ChatChoice
from pangu_sigma.serving.server_settings import ServerLimits
from tests.pangu_sigma.serving.toy_server import toy_server

pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")

from tests.pangu_sigma.data.tokenizers.kinds_of_tokenizers import EOD, KINDS  # noqa: E402

PROMPT = "hi 你😀x"
SPELT = re.compile(r"bytes:((?:\\x[0-9a-f]{2})+)")


@pytest.fixture(scope="module", params=["byte_level", "byte_fallback", "sentencepiece_dummy_prefix"])
def tokenizer(request) -> Tokenizer:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def client(tokenizer) -> Iterator[httpx.Client]:
    with toy_server(tokenizer, ServerLimits()) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        yield client


def unspelt(token: str) -> bytes:
    match = SPELT.fullmatch(token)
    return bytes.fromhex(match[1].replace("\\x", "")) if match else token.encode()


def ask(client, path: str = "completions", **fields) -> dict:
    answer = client.post(f"/v1/{path}", json={"model": "law", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def chunks(client, path: str, **fields) -> list[dict]:
    with client.stream("POST", f"/v1/{path}", json={"model": "law", "stream": True, **fields}) as answer:
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    return [json.loads(line)["choices"][0] for line in lines[:-1]]


def text_of(tokenizer: Tokenizer, table: dict) -> bytes:
    """The bytes that the tokens of an answer tell, special ones left out."""
    special = {tokenizer.piece(i) for i in range(tokenizer.vocab_size) if not tokenizer.token_bytes(i)}
    assert tokenizer.piece(EOD) in special
    return b"".join(unspelt(token) for token in table["tokens"] if token not in special)


def same_text(data: bytes, text: str) -> bool:
    """Whether bytes are a text; of bytes that are no characters the number of signs is the tokenizer's."""
    signs = re.compile("\ufffd+")
    return signs.sub("\ufffd", data.decode("utf-8", "replace")) == signs.sub("\ufffd", text)


@pytest.mark.parametrize("as_ids", [False, True])
def test_the_prompts_tokens_are_its_bytes_and_stand_at_its_characters(client, tokenizer, as_ids):
    ids = tokenizer.encode(PROMPT)
    fields = {"prompt": ids if as_ids else PROMPT, "echo": True, "logprobs": 7}
    choice = ask(client, max_tokens=0, **fields)
    table = choice["logprobs"]
    assert choice["text"] == PROMPT and len(table["tokens"]) == len(ids) > 5
    assert [unspelt(token) for token in table["tokens"]] == _bytes(tokenizer, ids)
    assert b"".join(map(unspelt, table["tokens"])).decode() == PROMPT
    assert table["tokens"][-1] == "x" and table["text_offset"][-1] == 5
    for token, offset in zip(table["tokens"], table["text_offset"], strict=True):
        assert PROMPT.encode().find(unspelt(token)) >= 0
        assert token.startswith("bytes:") or PROMPT[offset:].startswith(token)
    # With an answer the prompt's part is the same, whole and streamed.
    more = ask(client, max_tokens=3, seed=1, temperature=1.0, **fields)["logprobs"]
    assert more["tokens"][: len(ids)] == table["tokens"] and more["text_offset"][: len(ids) + 1] == [
        *table["text_offset"], 6
    ]  # fmt: skip


def _bytes(tokenizer: Tokenizer, ids) -> list[bytes]:
    texts, data = TokenTexts(tokenizer), []
    for token_id in ids:
        data.append(texts.token(token_id).bytes)
        texts.push(token_id)
    return data


@pytest.mark.parametrize("echo", [False, True])
def test_the_answers_tokens_are_its_bytes_and_stand_at_its_characters(client, tokenizer, echo):
    for seed in range(6):
        fields = {"prompt": PROMPT, "max_tokens": 16, "seed": seed, "temperature": 5.0, "logprobs": 9, "echo": echo}
        choice = ask(client, **fields)
        table, text = choice["logprobs"], choice["text"]
        assert same_text(text_of(tokenizer, table), text)
        before = "" if echo else PROMPT
        assert table["text_offset"] == sorted(table["text_offset"])
        for token, offset in zip(table["tokens"], table["text_offset"], strict=True):
            if not token.startswith("bytes:") and offset < len(before + text):
                assert (before + text)[offset:].startswith(token)
        for token, own, top in zip(table["tokens"], table["token_logprobs"], table["top_logprobs"], strict=True):
            assert len(top) == 9 + (own < sorted(top.values())[-9]) and top[token] == own
        parts = chunks(client, "completions", **fields)
        assert "".join(part["text"] for part in parts) == text
        for name in ("tokens", "text_offset"):
            assert [value for part in parts for value in part["logprobs"][name]] == table[name]


def test_every_id_has_an_entry_of_its_own_among_the_alternatives(client, tokenizer):
    """Twenty are the most that may be asked for; here all ids stand beside each other, at a text's beginning and in
    it."""
    for before in ((), tokenizer.encode("hi")):
        texts = TokenTexts(tokenizer, before)
        ids = range(tokenizer.vocab_size)
        names = spelt_apart(texts.token(7), [texts.token(token_id) for token_id in ids])
        assert names.keys() == set(ids) and len(set(names.values())) == len(names)
        assert names[7] == texts.token(7).text


def test_a_character_cut_between_prompt_and_answer_is_whole_in_the_text(client, tokenizer):
    ids = tokenizer.encode("hi 😀")[:-1]
    scored = ask(client, prompt=ids, echo=True, logprobs=0, max_tokens=0)
    assert scored["text"].rstrip("\ufffd") == "hi " and scored["text"].endswith("\ufffd")
    for seed in range(3):
        choice = ask(client, prompt=ids, echo=True, logprobs=0, max_tokens=8, temperature=5.0, seed=seed)
        assert same_text(text_of(tokenizer, choice["logprobs"]), choice["text"])
        alone = ask(client, prompt=ids, logprobs=0, max_tokens=8, temperature=5.0, seed=seed)
        assert "hi " + alone["text"] == choice["text"]
        assert alone["logprobs"]["text_offset"] == choice["logprobs"]["text_offset"][len(ids) :]


def test_a_stop_string_cuts_the_text_and_lists_its_tokens(client, tokenizer):
    fields = {"prompt": PROMPT, "max_tokens": 16, "temperature": 5.0, "logprobs": 1, "echo": True}
    cut = 0
    for seed in range(8):
        full = ask(client, seed=seed, **fields)
        written = full["text"][len(PROMPT) :]
        stop = next((written[i : i + 2] for i in range(len(written) - 1) if "\ufffd" not in written[i : i + 2]), None)
        if stop is None:
            continue
        choice = ask(client, seed=seed, stop=stop, **fields)
        assert choice["text"] == PROMPT + written[: written.index(stop)] and choice["finish_reason"] == "stop"
        count = len(choice["logprobs"]["tokens"])
        assert choice["logprobs"]["tokens"] == full["logprobs"]["tokens"][:count]
        listed = text_of(tokenizer, choice["logprobs"]).decode("utf-8", "replace")
        assert listed.startswith(choice["text"]) or "\ufffd" in choice["text"]
        cut += 1
    assert cut


def test_a_chats_entries_have_their_bytes(client, tokenizer):
    fields = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 6, "temperature": 5.0, "logprobs": True}
    for seed in range(3):
        choice = ask(client, "chat/completions", seed=seed, top_logprobs=20, **fields)
        content = choice["logprobs"]["content"]
        data = b"".join(bytes(entry["bytes"] or ()) for entry in content)
        assert same_text(data, choice["message"]["content"])
        for entry in content:
            assert len(entry["top_logprobs"]) == 20
            assert entry["bytes"] is None or bytes(entry["bytes"]) in (unspelt(entry["token"]),
                                                                       entry["token"].lstrip().encode())  # fmt: skip
            for other in entry["top_logprobs"]:
                assert other["bytes"] is None or bytes(other["bytes"]) == unspelt(other["token"])
        parts = chunks(client, "chat/completions", seed=seed, top_logprobs=20, **fields)
        streamed = [entry for part in parts for entry in (part["logprobs"] or {"content": []})["content"]]
        assert [entry["bytes"] for entry in streamed] == [entry["bytes"] for entry in content]


def test_blanks_before_a_chats_first_word_are_none_of_its_bytes(tokenizer):
    ids = tokenizer.encode("x\n \t hi 😀")[len(tokenizer.encode("x")) :]
    texts, stream = TokenTexts(tokenizer, tokenizer.encode("x")), TextStream(tokenizer, tokenizer.encode("x"))
    choice, text, data = ChatChoice(texts), "", b""
    for token_id in ids:
        chunk = choice.add(Event(0, token_id, stream.push(token_id), -1.0))
        text += chunk.text
        data += bytes(chunk.logprobs["content"][0]["bytes"])
    assert data.decode() == text == "hi 😀"


def test_lm_evals_reading_of_a_choice_after_a_context(client, tokenizer):
    """Its rule: the log-probabilities behind the context's tokens but the last, and greedy where each is the best."""
    ids = tokenizer.encode(PROMPT)
    answer = client.post("/v1/completions", json={"model": "law", "prompt": ids, "temperature": 0, "max_tokens": 1,
                                                  "logprobs": 1, "echo": True}).json()  # fmt: skip
    table = answer["choices"][0]["logprobs"]
    behind = slice(len(tokenizer.encode("hi ")), -1)
    scored = list(zip(table["tokens"], table["token_logprobs"], table["top_logprobs"], strict=True))[behind]
    assert b"".join(unspelt(token) for token, _, _ in scored).decode().endswith("😀x")
    # Read by values (since 0.4.9) and by names (before) alike.
    assert all((own == max(top.values())) == (max(top, key=top.get) == token) for token, own, top in scored)


def test_a_text_that_the_tokenizer_changes_keeps_the_answers_offsets():
    """The prompt comes back as it was sent: the answer begins at its end."""
    tokenizer, prompt = KINDS["sentencepiece_squeezes_blanks"](), "ﬁrst  ｙou … "
    assert len(tokenizer.decode(tokenizer.encode(prompt))) != len(prompt)
    with toy_server(tokenizer, ServerLimits()) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        fields = {"prompt": prompt, "max_tokens": 2, "logprobs": 0, "temperature": 0}
        alone, echoed = ask(client, **fields), ask(client, echo=True, **fields)
    assert echoed["text"] == prompt + alone["text"]
    offsets = alone["logprobs"]["text_offset"]
    assert offsets[0] == len(prompt) and echoed["logprobs"]["text_offset"][-len(offsets) :] == offsets
