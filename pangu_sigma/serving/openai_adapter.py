"""OpenAI adapter: turns a checked HTTP request into requests of the engine and the objects that shape its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.errors import UserError
from pangu_sigma.generation import Request, Sampling, document_begin
from pangu_sigma.generation import prompt_ids as document_ids
from pangu_sigma.generation.chat_prompt import ChatPrompts
from pangu_sigma.generation.token_text import PromptText, TokenTexts
from pangu_sigma.serving.api_errors import ApiError, bad_request, unknown_model
from pangu_sigma.serving.openai_requests import ChatRequest, CompletionRequest, Prompt, StreamOptions
from pangu_sigma.serving.openai_responses import (
    ChatChoice,
    ChatFormat,
    CompletionChoice,
    CompletionFormat,
    ResponseFormat,
    Usage,
)
from pangu_sigma.serving.server_settings import ServerLimits

DEFAULT_MAX_TOKENS = 16  # OpenAI's, for completions


@dataclass(frozen=True)
class PreparedRequest:
    """Everything about one HTTP request; request i is answered as choice i of the response."""

    domain: str
    response_format: ResponseFormat
    requests: tuple[Request, ...]
    choices: tuple[CompletionChoice | ChatChoice, ...]
    usage: Usage
    stream: bool
    options: StreamOptions


class OpenAIAdapter:
    """Prepares requests: knows the model's domains, tokenizer and window (longest document in tokens).

    Its methods keep no state between requests: FastAPI's worker threads call them at the same time.
    """

    def __init__(self, domains: Sequence[str], tokenizer: Tokenizer, window: int, limits: ServerLimits) -> None:
        self.domains = tuple(domains)
        self.tokenizer = tokenizer
        self.window = window
        self.limits = limits
        self.chat_prompts = ChatPrompts(tokenizer)

    def check_model(self, name: str) -> str:
        """The domain that a model id names. Raises ApiError."""
        if name not in self.domains:
            raise unknown_model(name, self.domains)
        return name

    def completion(self, body: CompletionRequest) -> PreparedRequest:
        """Prepare POST /v1/completions. Raises ApiError."""
        domain = self.check_model(body.model)
        self._check_count(len(body.prompt) * body.n)
        requests: list[Request] = []
        choices: list[CompletionChoice] = []
        usage = Usage(0)
        prompts = [self._ids(prompt, "prompt") for prompt in body.prompt]
        self._check_prompt_tokens(sum(map(len, prompts)) * body.n, "prompt")
        for prompt, ids in zip(body.prompt, prompts, strict=True):
            # A text begins a document; token ids are taken as they are.
            hidden = len(document_begin(self.tokenizer)) if isinstance(prompt, str) else 0
            usage.prompt += len(ids) - hidden
            max_tokens = self._max_tokens(ids, "prompt", "max_tokens", body.max_tokens, DEFAULT_MAX_TOKENS)
            text = PromptText(prompt) if isinstance(prompt, str) else self._prompt_text(prompt, body.echo)
            texts = self._token_texts(() if body.echo else ids, body.logprobs is not None)
            if texts and isinstance(prompt, str) and not body.echo:
                texts.move_to(len(prompt))
            for choice in range(body.n):
                sampling = _sampling(body, max_tokens, choice, logprobs=body.logprobs, echo=body.echo)
                requests.append(Request(ids, domain, sampling))
                choices.append(CompletionChoice(text, hidden, body.echo, texts and texts.copy()))
        return PreparedRequest(
            domain,
            CompletionFormat(domain),
            tuple(requests),
            tuple(choices),
            usage,
            body.stream,
            body.stream_options,
        )

    def chat(self, body: ChatRequest) -> PreparedRequest:
        """Prepare POST /v1/chat/completions. Raises ApiError."""
        domain = self.check_model(body.model)
        self._check_count(body.n)
        turns = [(message.role, message.text) for message in body.messages]
        try:
            prompt = self.chat_prompts.prompt(turns)
        except UserError as error:
            raise bad_request(str(error), "messages") from None
        ids = prompt.ids
        self._check_prompt_tokens(len(ids) * body.n, "messages")
        max_tokens = self._max_tokens(ids, "messages", *body.limit, default=None)
        body = body.model_copy(
            update={
                "stop": [*body.stop, *prompt.stop],
                "stop_token_ids": [*body.stop_token_ids, *prompt.stop_ids],
            }
        )
        alternatives = (body.top_logprobs or 0) if body.logprobs else None
        texts = self._token_texts(ids, bool(body.logprobs))
        requests = tuple(
            Request(ids, domain, _sampling(body, max_tokens, choice, logprobs=alternatives)) for choice in range(body.n)
        )
        return PreparedRequest(
            domain,
            ChatFormat(domain),
            requests,
            tuple(ChatChoice(texts and texts.copy()) for _ in requests),
            Usage(len(ids) - 1),  # the end of the document before is the server's own
            body.stream,
            body.stream_options,
        )

    def _prompt_text(self, ids: Sequence[int], echo: bool) -> PromptText:
        return PromptText.of(self.tokenizer, ids) if echo else PromptText("")

    def _token_texts(self, before: Sequence[int], logprobs: bool) -> TokenTexts | None:
        """Token texts behind some ids, if log-probabilities are asked for."""
        return TokenTexts(self.tokenizer, before) if logprobs else None

    def _ids(self, prompt: Prompt, field: str) -> tuple[int, ...]:
        if isinstance(prompt, str):
            try:
                return document_ids(self.tokenizer, prompt)
            except UserError as error:
                raise bad_request(str(error), field) from None
        wrong = next((i for i in prompt if not 0 <= i < self.tokenizer.vocab_size), None)
        if wrong is not None:
            last = self.tokenizer.vocab_size - 1
            raise bad_request(f"the prompt has the id {wrong}; the vocabulary's ids are 0 to {last}", field)
        return tuple(prompt)

    def _max_tokens(
        self, ids: tuple[int, ...], field: str, limit: str, requested: int | None, default: int | None
    ) -> int:
        """Tokens that may be written after `ids`; `default` is lowered to what fits, a request beyond it is refused.

        field, limit: the request's fields that hold the prompt and `requested`.

        Only the text after the last end-of-document token is in the window: attention restarts there. The last token
        that is written need not be in it, as nothing comes after it.
        """
        start = max((i + 1 for i, token in enumerate(ids[:-1]) if token == self.tokenizer.eod_id), default=0)
        document = len(ids) - start
        if document > self.window:
            raise bad_request(
                f"the prompt has {document} tokens, and the model's window has {self.window}; shorten it",
                field,
                "context_length_exceeded",
            )
        room = self.window - document + 1
        bound = self.limits.max_tokens
        if requested is None:
            return min(value for value in (default, room, bound) if value is not None)
        if bound is not None and requested > bound:
            raise bad_request(f"{limit} is {requested}, and this server writes {bound} at most", limit)
        if requested > room:
            raise bad_request(
                f"the prompt has {document} tokens and {limit} is {requested}, together more than the model's "
                f"window of {self.window}; at most {room} can be written after this prompt",
                limit,
                "context_length_exceeded",
            )
        return requested

    def _check_prompt_tokens(self, count: int, field: str) -> None:
        most = self.limits.most_prompt_tokens(self.window)
        if count > most:
            raise bad_request(
                f"the prompts have {count} tokens together, each counted n times, and this server reads {most} at most "
                "for one request: send fewer",
                field,
                "too_many_prompt_tokens",
            )

    def _check_count(self, count: int) -> None:
        # Before anything is tokenised: n alone could ask for millions.
        most = min(self.limits.choices, self.limits.slots + self.limits.queue)
        if count > most:
            raise bad_request(f"one request may ask for {most} answers (prompts × n), not {count}", "n")


def _sampling(body: CompletionRequest | ChatRequest, max_tokens: int, choice: int, **more: Any) -> Sampling:
    try:
        return body.sampling(max_tokens, choice, **more)
    except UserError as error:
        raise ApiError(400, str(error)) from None
