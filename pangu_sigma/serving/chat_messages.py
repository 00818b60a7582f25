"""Messages of a chat request: what the model reads of them is text, so each is a role and a text.

Clients send a conversation's history as they got it, with fields that no text depends on (`id`, `type`, `annotations`,
`cache_control`, …): those are ignored, known or not. What the conversation says in another form becomes text (parts,
refusals, calls of tools); a field or part that holds pictures, sound or files is refused, as the model cannot read it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from pangu_sigma.serving.request_model import UNSUPPORTED, RequestModel

# Parts of a content by type: the field that holds their text.
_TEXT_PARTS = {"text": "text", "refusal": "refusal"}
# Fields in which OpenAI's API and others keep what is no text.
_NOT_TEXT = ("audio", "images", "image", "image_url", "input_audio", "videos", "video", "files", "file", "attachments")
_MAY_BE_SILENT = ("assistant", "function")  # OpenAI lets their content be null


class _OpenModel(RequestModel):
    """A part of a message; fields that are not named here are ignored."""

    model_config = ConfigDict(extra="ignore")


class FunctionCall(_OpenModel):
    """A function's name and its arguments as JSON text."""

    name: str
    arguments: str = ""

    @property
    def text(self) -> str:
        """The call as the model reads it: `name(arguments)`."""
        return f"{self.name}({self.arguments})"


class CustomCall(_OpenModel):
    """A custom tool's name and its input, which is any text."""

    name: str
    input: str = ""

    @property
    def text(self) -> str:
        """The call as the model reads it: `name(input)`."""
        return f"{self.name}({self.input})"


class ToolCall(_OpenModel):
    """A call of a tool that an assistant's turn of the history made."""

    function: FunctionCall | None = None
    custom: CustomCall | None = None


def _content_text(content: Any) -> Any:
    """A content of parts as one text, joined as they are."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise PydanticCustomError("content", "must be a text or a list of parts")
    return "".join(_part_text(number, part) for number, part in enumerate(content))


def _part_text(number: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise PydanticCustomError("part", f"part {number} must be an object with a type")
    if kind not in _TEXT_PARTS:
        # Given as a placeholder's value, as its braces would be placeholders; ascii: it may be no valid Unicode.
        raise PydanticCustomError(
            UNSUPPORTED,
            "part {number} is of type {kind}, and the model reads text only; leave it out",
            {"number": number, "kind": ascii(kind[:80])},
        )
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise PydanticCustomError("part", f"part {number} must have a text in its field '{_TEXT_PARTS[kind]}'")
    return text


class Message(_OpenModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        str | None, BeforeValidator(_content_text, json_schema_input_type=str | list[dict[str, Any]] | None)
    ] = None
    refusal: str | None = None
    tool_calls: list[ToolCall] = Field([])
    function_call: FunctionCall | None = None

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name in _NOT_TEXT:
                if values.get(name):
                    raise PydanticCustomError(
                        UNSUPPORTED, f"the field '{name}' is not supported, as the model reads text only; leave it out"
                    )
        return values

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role not in _MAY_BE_SILENT:
            raise PydanticCustomError("content", f"a message of the role '{self.role}' needs a content")
        return self

    @property
    def text(self) -> str:
        """The turn's text: its content (or the refusal that stands for it), and the calls of tools, a line each."""
        said = self.content or self.refusal or ""
        calls = [call.function or call.custom for call in self.tool_calls] + [self.function_call]
        return "\n".join([*([said] if said else []), *(call.text for call in calls if call)])
