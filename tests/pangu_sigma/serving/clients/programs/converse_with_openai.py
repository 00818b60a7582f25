"""A conversation as programs with the official client hold it: python converse_with_openai.py URL MODEL."""

import json
import sys

import openai

url, model = sys.argv[1:]
client = openai.OpenAI(base_url=url, max_retries=0)
greedy = {"model": model, "max_tokens": 4, "temperature": 0}
weather = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
question = {"role": "user", "content": "the court"}


def chat(messages, **more):
    """The answer's message."""
    return client.chat.completions.create(messages=messages, **{**greedy, **more}).choices[0].message


def refusal(ask, **more):
    """The exception's name, and what it says of the field."""
    try:
        ask(**more)
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.param, error.code, error.message]
    return None


first = chat([question])
parts = [{"type": "text", "text": "the ", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "court"}]
chunks = list(client.chat.completions.create(
    messages=[question], stream=True, stream_options={"include_usage": True}, **greedy
))  # fmt: skip
with client.chat.completions.stream(messages=[question], **greedy) as stream:
    helper = "".join(event.delta for event in stream if event.type == "content.delta")
completion = client.completions.create(prompt="the court", logprobs=2, echo=True, **greedy)
results = {
    "models": [entry.id for entry in client.models.list()],
    "version": openai.__version__,
    "first": first.content,
    "parts": chat([{"role": "user", "content": parts}]).content,
    "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
    "usage": chunks[-1].usage.total_tokens,
    "helper": helper,
    # The client's own objects go back as they came.
    "history": chat([question, first, question]).content,
    "history_by_hand": chat([question, {"role": "assistant", "content": first.content}, question]).content,
    "dumped": chat([question, first.model_dump(), question]).content,
    "tool": chat([
        question, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]).content,
    "switched_off": chat([question], tools=[weather], tool_choice="none", parallel_tool_calls=False).content,
    "neutral": chat(
        [question], response_format={"type": "text"}, user="u", metadata={"a": "b"}, store=False, service_tier="auto",
        seed=1, logit_bias={}, n=1, modalities=["text"], presence_penalty=0, frequency_penalty=0,
        prediction={"type": "content", "content": "x"}, prompt_cache_key="k", safety_identifier="s",
    ).content,
    "completion": [completion.choices[0].text, len(completion.choices[0].logprobs.tokens)],
    "refusals": {
        "tools": refusal(chat, messages=[question], tools=[weather]),
        "format": refusal(chat, messages=[question], response_format={"type": "json_object"}),
        "image": refusal(chat, messages=[
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a.example/b.png"}}]}
        ]),
        "embeddings": refusal(client.embeddings.create, model=model, input="x"),
        "responses": refusal(client.responses.create, model=model, input="x"),
        "model": refusal(chat, messages=[question], model="gpt-4"),
    },
}  # fmt: skip
print(json.dumps(results))
