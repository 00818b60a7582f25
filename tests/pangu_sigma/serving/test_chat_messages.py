"""Messages as clients send them: what they say becomes text, the rest is ignored, what is no text is refused."""

from __future__ import annotations

import json

import pytest

from pangu_sigma.data import chat_template
from pangu_sigma.serving.chat_messages import Message

CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
# Fields of a turn as OpenAI's and others' answers hand it out, which clients send back.
ANSWERED = {
    "id": "msg_1", "type": "message", "object": "chat.completion.message", "status": "completed", "annotations": [],
    "refusal": None, "audio": None, "tool_calls": None, "function_call": None, "reasoning_content": "hm", "name": "a",
    "cache_control": {"type": "ephemeral"}, "provider_specific_fields": {"x": [1]}, "images": [], "prefix": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "assistant", "content": None}, ""),
        ({"role": "assistant"}, ""),
        ({"role": "assistant", "content": "yes", **ANSWERED}, "yes"),
        ({"role": "assistant", "content": None, "refusal": "I will not"}, "I will not"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, "no"),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, 'weather({"city": "Paris"})'),
        (
            {"role": "assistant", "content": "see", "tool_calls": [CALL, CALL]},
            'see\nweather({"city": "Paris"})\nweather({"city": "Paris"})',
        ),
        ({"role": "assistant", "tool_calls": [{"type": "custom", "custom": {"name": "f", "input": "a"}}]}, "f(a)"),
        ({"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}, "f({})"),
        ({"role": "tool", "content": "20 degrees", "tool_call_id": "call_1"}, "20 degrees"),
        ({"role": "tool", "content": [{"type": "text", "text": "20"}], "name": "weather"}, "20"),
        ({"role": "function", "content": None, "name": "f"}, ""),
        ({"role": "developer", "content": "be brief", "name": "x"}, "be brief"),
        (
            {"role": "user", "content": [
                {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "annotations": [], "id": "1"},
                {"type": "text", "text": " b", "prompt_cache_breakpoint": {}},
            ]},
            "a b",
        ),
    ],
)  # fmt: skip
def test_what_a_message_says(message, text):
    assert Message.model_validate(message).text == text


def test_a_conversation_with_a_tool_is_a_text_and_ends_where_the_tool_would_speak():
    turns = [("user", "weather?"), ("assistant", "weather()"), ("tool", "20 degrees"), ("function", "sunny")]
    expected = "User: weather?\nAssistant: weather()\nTool: 20 degrees\nTool: sunny\nAssistant:"
    assert chat_template.as_text(turns) == expected
    assert chat_template.stops(turns) == ("\nUser:", "\nSystem:", "\nTool:")
    assert chat_template.stops(turns[:2]) == ("\nUser:", "\nSystem:")


def ask(client, *messages: dict, **fields):
    body = {"model": "law", "messages": messages, "max_tokens": 3, "temperature": 0, **fields}
    # ensure_ascii, as httpx would not send half a surrogate pair.
    headers = {"Content-Type": "application/json"}
    return client.post("/v1/chat/completions", content=json.dumps(body), headers=headers)


def test_an_answer_can_be_sent_back_as_it_came(client):
    question = {"role": "user", "content": "the court"}
    first = ask(client, question).json()["choices"][0]["message"]
    plain = {"role": "assistant", "content": first["content"]}
    answers = [ask(client, question, message, question).json() for message in (plain, first, {**ANSWERED, **first})]
    assert answers[0]["choices"] == answers[1]["choices"] == answers[2]["choices"]
    assert answers[0]["usage"] == answers[2]["usage"]


@pytest.mark.parametrize(
    ("message", "param", "code", "part"),
    [
        ({"role": "user"}, "messages.0", None, "a message of the role 'user' needs a content"),
        ({"role": "user", "content": None}, "messages.0", None, "needs a content"),
        ({"role": "tool", "content": None}, "messages.0", None, "the role 'tool' needs a content"),
        ({"role": "tutor", "content": "x"}, "messages.0.role", None, "'tool' or 'function'"),
        ({"content": "x"}, "messages.0.role", "missing_required_parameter", "messages.0.role is required"),
        ({"role": "user", "content": 5}, "messages.0.content", None, "must be a text or a list of parts"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.0.content", None, "a text in its field 'text'"),
        ({"role": "user", "content": [{"text": "x"}]}, "messages.0.content", None, "part 0 must be an object"),
        ({"role": "user", "content": [[1]]}, "messages.0.content", None, "part 0 must be"),
        (
            {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]},
            "messages.0.content", "unsupported_parameter", "part 1 is of type 'image_url', and the model",
        ),
        ({"role": "user", "content": [{"type": "{x}\ud800"}]}, "messages.0.content", "unsupported_parameter", "{x}"),
        ({"role": "user", "content": "\ud800"}, None, None, "surrogate"),
        ({"role": "user", "content": "x", "images": ["a"]}, "messages.0", "unsupported_parameter", "'images'"),
        ({"role": "assistant", "audio": {"id": "a"}}, "messages.0", "unsupported_parameter", "'audio' is not"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "messages.0.tool_calls.0.function.name",
         "missing_required_parameter", "required"),
        ("x", "messages.0", None, ""),
    ],
)  # fmt: skip
def test_a_wrong_message_is_refused_by_its_place(client, message, param, code, part):
    response = ask(client, message)
    error = response.json()["error"]
    assert response.status_code == 400 and part in error["message"], error
    assert param is None or (error["param"], error["code"]) == (param, code)
