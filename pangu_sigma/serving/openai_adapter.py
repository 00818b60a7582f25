"""From a checked HTTP request to what the engine is asked and how its answer is put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pangu_sigma.data import chat_template
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.errors import UserError
from pangu_sigma.generation import Request
from pangu_sigma.generation import prompt_ids as begin_document
from pangu_sigma.serving.api_errors import ApiError, bad_request, unknown_model
from pangu_sigma.serving.openai_requests import ChatRequest, CompletionRequest, Prompt, StreamOptions
from pangu_sigma.serving.response_bodies import ChatChoice, CompletionChoice, Usage
from pangu_sigma.serving.response_formats import ChatForm, CompletionForm, Form
from pangu_sigma.serving.server_settings import Limits
from pangu_sigma.serving.token_text import Spelling

DEFAULT_MAX_TOKENS = 16  # OpenAI's, for completions


@dataclass(frozen=True)
class Work:
    """Everything about one HTTP request; request i is answered as choice i of the form."""

    domain: str
    form: Form
    requests: tuple[Request, ...]
    choices: tuple[CompletionChoice | ChatChoice, ...]
    usage: Usage
    stream: bool
    options: StreamOptions


class Desk:
    """Takes requests in: knows the model's domains, tokenizer and window (longest document in tokens)."""

    def __init__(self, domains: Sequence[str], tokenizer: Tokenizer, window: int, limits: Limits) -> None:
        self.domains = tuple(domains)
        self.tokenizer = tokenizer
        self.window = window
        self.limits = limits
        self.spelling = Spelling(tokenizer)

    def check_model(self, name: str) -> str:
        """The domain that a model id names. Raises ApiError."""
        if name not in self.domains:
            raise unknown_model(name, self.domains)
        return name

    def completion(self, asked: CompletionRequest) -> Work:
        """The work of POST /v1/completions. Raises ApiError."""
        domain = self.check_model(asked.model)
        self._check_count(len(asked.prompt) * asked.n)
        requests: list[Request] = []
        choices: list[CompletionChoice] = []
        usage = Usage(0)
        for prompt in asked.prompt:
            ids = self._ids(prompt)
            # A text begins a document; token ids are taken as they are.
            hidden = int(isinstance(prompt, str))
            usage.prompt += len(ids) - hidden
            most = self._max_tokens(ids, asked.max_tokens, default=DEFAULT_MAX_TOKENS)
            wants_text = asked.echo or asked.logprobs is not None
            text = prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt) if wants_text else ""
            for number in range(asked.n):
                sampling = _checked(asked, most, number, logprobs=asked.logprobs, echo=asked.echo)
                requests.append(Request(ids, domain, sampling))
                choices.append(CompletionChoice(self.spelling, text, hidden, asked.echo, asked.logprobs))
        form = CompletionForm(domain)
        return Work(domain, form, tuple(requests), tuple(choices), usage, asked.stream, asked.stream_options)

    def chat(self, asked: ChatRequest) -> Work:
        """The work of POST /v1/chat/completions. Raises ApiError."""
        domain = self.check_model(asked.model)
        self._check_count(asked.n)
        ids = self._ids(chat_template.as_text(asked.messages))
        most = self._max_tokens(ids, asked.limit, default=None)
        asked = asked.model_copy(update={"stop": [*asked.stop, *chat_template.STOPS]})
        alternatives = (asked.top_logprobs or 0) if asked.logprobs else None
        requests = tuple(
            Request(ids, domain, _checked(asked, most, number, logprobs=alternatives)) for number in range(asked.n)
        )
        choices = tuple(ChatChoice(self.spelling, asked.logprobs) for _ in requests)
        form = ChatForm(domain)
        return Work(domain, form, requests, choices, Usage(len(ids) - 1), asked.stream, asked.stream_options)

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            try:
                return begin_document(self.tokenizer, prompt)
            except UserError as error:
                raise bad_request(str(error), "prompt") from None
        wrong = next((i for i in prompt if not 0 <= i < self.tokenizer.vocab_size), None)
        if wrong is not None:
            last = self.tokenizer.vocab_size - 1
            raise bad_request(f"the prompt has the id {wrong}; the vocabulary's ids are 0 to {last}", "prompt")
        return tuple(prompt)

    def _max_tokens(self, ids: tuple[int, ...], wanted: int | None, default: int | None) -> int:
        """Tokens that may be written after `ids`; `default` is cut to what fits, a wish that does not fit is refused.

        Only the text after the last end-of-document token is in the window: attention restarts there. The last token
        that is written need not be in it, as nothing comes after it.
        """
        before = max((at + 1 for at, token in enumerate(ids[:-1]) if token == self.tokenizer.eod_id), default=0)
        document = len(ids) - before
        if document > self.window:
            raise bad_request(
                f"the prompt has {document} tokens, and the model's window has {self.window}; shorten it",
                "prompt",
                "context_length_exceeded",
            )
        room = self.window - document + 1
        bound = self.limits.max_tokens
        if wanted is None:
            return min(value for value in (default, room, bound) if value is not None)
        if bound is not None and wanted > bound:
            raise bad_request(f"max_tokens is {wanted}, and this server writes {bound} at most", "max_tokens")
        if wanted > room:
            raise bad_request(
                f"the prompt has {document} tokens and max_tokens is {wanted}, together more than the model's window "
                f"of {self.window}; at most {room} can be written after this prompt",
                "max_tokens",
                "context_length_exceeded",
            )
        return wanted

    def _check_count(self, count: int) -> None:
        # Before anything is tokenised: n alone could ask for millions.
        most = min(self.limits.choices, self.limits.slots + self.limits.queue)
        if count > most:
            raise bad_request(f"one request may ask for {most} answers (prompts × n), not {count}", "n")


def _checked(asked: CompletionRequest | ChatRequest, max_tokens: int, number: int, **more: object):
    try:
        return asked.sampling(max_tokens, number, **more)
    except UserError as error:
        raise ApiError(400, str(error)) from None
