"""Request bodies of OpenAI's completions and chat API, as pydantic models: fields read, refused, or ignored here.

A field that would change the answer and is not supported is refused, so that nobody gets another answer than the one
asked for; its neutral value (a penalty of 0, an empty list of tools) is accepted, since clients send it. Misspelled
fields are refused with the nearest name, as OpenAI does. `null` means the default. `top_k`, `repetition_penalty`,
`stop_token_ids` and `stream_options.continuous_usage_stats` are extensions, spelled as in vLLM.
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from pangu_sigma.errors import UserError
from pangu_sigma.generation import Sampling
from pangu_sigma.generation.request import SAMPLING_RANGES
from pangu_sigma.serving.api_errors import ApiError, bad_request
from pangu_sigma.serving.chat_messages import Message
from pangu_sigma.serving.request_model import UNSUPPORTED, RequestModel
from pangu_sigma.wording import did_you_mean, shown
from rre.counted_random import key64

MAX_ALTERNATIVES = 20
MAX_STOPS = 16

# They name the caller or steer OpenAI's own service; the text does not depend on them.
IGNORED_FIELDS = frozenset(
    [
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "prediction",  # makes an answer come sooner
        "parallel_tool_calls",
    ]
)
# Field -> values that ask for nothing.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
}
# Fields that nothing depends on where another one says "none".
SWITCHED_OFF_BY = {"tools": "tool_choice", "functions": "function_call"}


class StreamOptions(RequestModel):
    """Options of a stream: token counts at its end, or in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis; OpenAI's clients may send the switch


def _stop_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _SamplingRequest(RequestModel):
    """Fields that both kinds of completion share: sampling, stop conditions, streaming."""

    model: str
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    n: int = Field(1, ge=1)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_stop_list)] = Field(
        [], max_length=MAX_STOPS
    )
    stop_token_ids: list[int] = Field([], max_length=MAX_STOPS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_supported(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        supported = {}
        for name, value in values.items():
            if name in cls.model_fields:
                supported[name] = value
            elif name in NEUTRAL_VALUES:
                # By type too: false is no 0.
                neutral = any(type(value) is type(other) and value == other for other in NEUTRAL_VALUES[name])
                if value is not None and not neutral and values.get(SWITCHED_OFF_BY.get(name, "")) != "none":
                    raise _unsupported(name, value)
            elif name not in IGNORED_FIELDS:
                raise bad_request(
                    f"Unrecognized request argument supplied: {name[:80]}; {did_you_mean(name, cls.model_fields)}",
                    name[:80],
                    "unknown_parameter",
                )
        return supported

    @model_validator(mode="after")
    def _numbers_in_range(self) -> _SamplingRequest:
        for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
            try:
                SAMPLING_RANGES[name].check(name, getattr(self, name))
            except UserError as error:
                raise bad_request(str(error), name) from None
        return self

    @model_validator(mode="after")
    def _options_only_with_streams(self) -> _SamplingRequest:
        if "stream_options" in self.model_fields_set and not self.stream:
            raise bad_request("stream_options needs stream to be true", "stream_options")
        return self

    def sampling(self, max_tokens: int, choice: int, **more: Any) -> Sampling:
        """Sampling parameters of one of the `n` choices. Without a seed every request draws anew.

        Choice 0 draws with the seed as it is, so that n never changes the first answer.
        """
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            stop=tuple(self.stop),
            stop_ids=tuple(self.stop_token_ids),
            seed=key64(seed, "choice", choice) if choice else seed,
            **more,
        )


def _unsupported(name: str, value: Any) -> ApiError:
    neutral = NEUTRAL_VALUES.get(name, ())
    advice = f" or give {json.dumps(neutral[0])}" if neutral else ""
    if name in SWITCHED_OFF_BY:
        advice = f', or give {SWITCHED_OFF_BY[name]} "none"'
    # Lists and objects are not repeated: they may be deep.
    given = f" = {shown(value)}" if isinstance(value, str | int | float) else ""
    return bad_request(f"{name}{given} is not supported by this server; leave it out{advice}", name, UNSUPPORTED)


Prompt = str | list[int]


def _prompts(value: Any) -> list[Prompt]:
    """OpenAI's four forms (text, list of texts, ids, list of ids) as a list of texts or ids."""
    if isinstance(value, str) or _is_id_list(value):
        return [value]
    if isinstance(value, list) and value and all(isinstance(v, str) or _is_id_list(v) for v in value):
        return value
    raise bad_request("prompt must be a text, a list of texts, a list of token ids, or a list of such lists", "prompt")


def _is_id_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(v) is int for v in value)


class CompletionRequest(_SamplingRequest):
    """Body of POST /v1/completions."""

    prompt: Annotated[
        list[Prompt], BeforeValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]])
    ]
    max_tokens: int | None = Field(None, ge=0, description="16, or less where the window ends before.")
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES)

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise _unsupported("best_of", self.best_of)
        if self.max_tokens == 0 and not self.echo:
            raise bad_request("max_tokens is 0, which only echo gives a meaning; give at least 1", "max_tokens")
        return self


class ChatRequest(_SamplingRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES)

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
        return self

    @property
    def limit(self) -> tuple[str, int | None]:
        """Most tokens to write: the name of the field that says it, the new one or the old one, and its value."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens


class TokenizeRequest(RequestModel):
    """Body of POST /tokenize, vLLM's extension."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeRequest(RequestModel):
    """Body of POST /detokenize, vLLM's extension."""

    model: str | None = None
    tokens: list[int]
