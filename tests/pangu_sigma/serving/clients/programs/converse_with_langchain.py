"""A conversation as LangChain holds it: python converse_with_langchain.py URL MODEL."""

import json
import sys

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

url, model = sys.argv[1:]
chat = ChatOpenAI(base_url=url, model=model, max_tokens=4, temperature=0, max_retries=0)


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return "sunny"


def refusal(runnable):
    """The exception's name and the field that it is about."""
    try:
        runnable.invoke("the court")
    except openai.APIStatusError as error:
        return [type(error).__name__, error.param]
    return None


question = HumanMessage("the court")
first = chat.invoke([question])
called = AIMessage("", tool_calls=[{"name": "weather", "args": {"city": "Paris"}, "id": "call_1"}])
parts = HumanMessage([{"type": "text", "text": "the ", "cache_control": {"type": "ephemeral"}}, "court"], name="me")
scored = chat.bind(logprobs=True, top_logprobs=2)
chain = ChatPromptTemplate([("system", "be brief"), ("user", "{question}")]) | chat | StrOutputParser()
results = {
    "first": first.content,
    "tokens": first.usage_metadata["total_tokens"],
    "streamed": "".join(chunk.text for chunk in chat.stream([question])),
    "parts": chat.invoke([parts]).content,
    "history": chat.invoke([SystemMessage("be brief"), question, first, question]).content,
    "tool": chat.invoke([question, called, ToolMessage("sunny", tool_call_id="call_1")]).content,
    "chain": chain.invoke({"question": "the court"}),
    "batch": [answer.content for answer in chat.batch([[question]] * 3)],
    "switched_off": chat.bind_tools([weather], tool_choice="none").invoke([question]).content,
    "logprobs": len(scored.invoke([question]).response_metadata["logprobs"]["content"]),
    "completion": OpenAI(base_url=url, model=model, max_tokens=4, temperature=0, max_retries=0).invoke("the court"),
    "refusals": {
        "tools": refusal(chat.bind_tools([weather])),
        "json": refusal(chat.bind(response_format={"type": "json_object"})),
        "structured": refusal(chat.with_structured_output({"title": "a", "description": "b", "type": "object",
                                                           "properties": {"c": {"type": "string"}}})),
    },
}  # fmt: skip
print(json.dumps(results))
