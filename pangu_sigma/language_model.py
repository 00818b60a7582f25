"""A trained model in memory: writes text, scores it and infers its domain."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, overload

import numpy as np

from pangu_sigma import runtime
from pangu_sigma.config import Config, ParameterCounts, parameter_counts
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.errors import UserError
from pangu_sigma.generation.completion import Completion
from pangu_sigma.generation.prompts import Prompt
from pangu_sigma.generation.request import AUTO, Event, Request, Sampling, pick_domain, prompt_ids
from pangu_sigma.trained_model import run_of

if TYPE_CHECKING:
    from pangu_sigma.evaluation.domain_evaluation import Evaluator
    from pangu_sigma.generation.chat_prompt import ChatPrompts
    from pangu_sigma.generation.domain_inference_settings import DomainInferenceSettings
    from pangu_sigma.generation.engine import Engine
    from pangu_sigma.model.scoring import Scorer
    from pangu_sigma.trained_model import TrainedModel


Texts = list[str] | tuple[str, ...]


class SamplingOptions(TypedDict, total=False):
    """Options of writing, each a keyword of `generate`, `stream` and `complete`."""

    max_tokens: int
    """Most tokens to write; 64 if left out."""
    temperature: float
    """0 takes the likeliest token, higher is freer; 0.8 if left out."""
    top_k: int
    """Draw among this many likeliest tokens, 0 among all; 40 if left out."""
    top_p: float
    """Draw among the likeliest tokens that together hold this share of the probability; 1 if left out."""
    repetition_penalty: float
    """Above 1 makes tokens unlikely that the text holds already; 1 if left out."""
    stop: str | Texts
    """Texts that end the answer, and are no part of it."""
    seed: int
    """The same seed gives the same text; 0 if left out."""
    chat: bool
    """The prompt is what a user says, and the answer an assistant's: as the chat template that came with the model
    writes it, or our plain one."""
    logprobs: int
    """With `complete`: alternatives to tell of every token, and its own log-probability."""


class LanguageModel:
    """A trained model; `pangu_sigma.load` makes it of a folder.

    `domain` in its methods is one of `domains`; a model of one domain needs none named, and generation also takes
    "auto", which infers it from the prompt. Several threads may use one or more models; they take turns. Graphs are
    compiled when they are first needed, so the first call of each method takes seconds.
    """

    def __init__(
        self, trained: TrainedModel, slots: int = 8, inference: DomainInferenceSettings | None = None
    ) -> None:
        self._trained = trained
        self._slots = slots
        self._inference = inference
        self._scorers: dict[int, Scorer] = {}
        # Events of requests that run beside each other, until whoever asked takes them.
        self._events: dict[int, deque[Event]] = {}

    def __repr__(self) -> str:
        return f"LanguageModel({str(self.path)!r}, domains={self.domains}, num_parameters={self.num_parameters:,})"

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def path(self) -> Path:
        """The folder of the checkpoint that was loaded, for which the model stands wherever a model is asked for."""
        return self._trained.checkpoint.path

    @property
    def run_dir(self) -> Path | None:
        """The run that the checkpoint lies in, for which the model stands wherever a run is asked for; None of a model
        folder."""
        return run_of(self._trained.checkpoint)

    @property
    def step(self) -> int:
        """Optimizer steps that the model has been trained for."""
        return self._trained.checkpoint.step

    @property
    def config(self) -> Config:
        """The effective configuration of the model as it is loaded; read-only, its attributes are the YAML's keys."""
        return self._trained.model.config

    @property
    def domains(self) -> tuple[str, ...]:
        """The names of the domains, in the order of their ids."""
        return self._trained.model.groups.names

    @property
    def tokenizer(self) -> Tokenizer:
        """`encode(text)` to ids and `decode(ids)` to text; `eod_id` ends, and begins, every document."""
        return self._trained.tokenizer

    @cached_property
    def parameter_counts(self) -> ParameterCounts:
        """Trained values: in all, shared, of each domain, and active for a token of each domain."""
        return parameter_counts(self.config, self._trained.model.vocab)

    @property
    def num_parameters(self) -> int:
        """Trained values of the model, those of all domains' experts included; routing tables do not count."""
        return self.parameter_counts.total

    @overload
    def generate(
        self, prompt: str, domain: str | None = None, **options: Unpack[SamplingOptions]
    ) -> str: ...

    @overload
    def generate(
        self, prompt: Texts, domain: str | None = None, **options: Unpack[SamplingOptions]
    ) -> list[str]: ...

    def generate(
        self, prompt: str | Texts, domain: str | None = None, **options: Unpack[SamplingOptions]
    ) -> str | list[str]:
        """Continue a prompt, or several together; returns what comes after each, without the prompt.

        options: `max_tokens=64`, `temperature=0.8`, `top_k=40`, …: see `SamplingOptions`. Raises UserError.
        """
        if isinstance(prompt, str):
            return "".join(self.stream(prompt, domain, **options))
        return [completion.text for completion in self.complete(prompt, domain, **options)]

    def stream(self, prompt: str, domain: str | None = None, **options: Unpack[SamplingOptions]) -> Iterator[str]:
        """Continue a prompt and yield its text in pieces as it comes; joined, they are what `generate` returns.

        Raises UserError at once for a request that cannot run.
        """
        events = self.events(prompt, domain, **options)
        return (event.text for event in events if event.text)

    def events(
        self, prompt: str | Prompt, domain: str | None = None, **options: Unpack[SamplingOptions]
    ) -> Iterator[Event]:
        """Continue a prompt and yield an event for each token as it comes: its id, the text that is certain with it,
        and with `logprobs=n` its log-probability and n alternatives. Raises as `stream`.
        """
        request = self._request(prompt, domain, options)

        def as_they_come() -> Iterator[Event]:
            # Only now: a stream that nobody reads holds no slot.
            request_id = self._begin(request)
            try:
                yield from self._take(request_id)
            finally:
                self._forget(request_id)

        return as_they_come()

    def complete(
        self,
        prompts: Sequence[str | Prompt],
        domain: str | None = None,
        *,
        on_completion: Callable[[int, Completion], None] | None = None,
        keep_going: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> list[Completion]:
        """Continue prompts as `generate` does, and tell more: of every one the text, why it ended (`finish`: stop or
        length) and its `events`. A `Prompt` may have a domain and a seed of its own.

        on_completion: called with the index of a prompt and its completion as soon as it and those before it are done.
        keep_going: a prompt that fails while others are written has its `error` and ends nothing else.
        """
        requests = []
        for number, prompt in enumerate(prompts, 1):
            try:
                requests.append(self._request(prompt, domain, options))
            except UserError as error:
                raise UserError(f"prompt {number}: {error}" if len(prompts) > 1 else str(error)) from error
        running: list[int] = []
        completions = []
        try:
            running += map(self._begin, requests)
            for index, request_id in enumerate(running):
                completion = Completion()
                try:
                    for event in self._take(request_id):
                        completion.text += event.text
                        completion.events.append(event)
                        completion.finish = event.finish
                except UserError as error:
                    if not keep_going:
                        raise
                    completion.finish, completion.error = "error", str(error)
                completions.append(completion)
                if on_completion is not None:
                    on_completion(index, completion)
        finally:
            for request_id in running:
                self._forget(request_id)
        return completions

    @overload
    def loss(self, text: str, domain: str | None = None) -> float: ...

    @overload
    def loss(self, text: Texts, domain: str | None = None) -> list[float]: ...

    def loss(self, text: str | Texts, domain: str | None = None) -> float | list[float]:
        """Mean cross-entropy of a text's tokens, or of several texts', under the domain's experts, in nats per token.

        A text is one document: its first token is predicted from the end-of-document token, its end is not predicted. A
        longer one than `data.sequence_length` is measured in pieces of so many tokens, each seen alone, as `evaluate`
        measures held-out text. Raises UserError.
        """
        texts = [text] if isinstance(text, str) else list(text)
        group = pick_domain(self.domains, domain)
        with self._computing():
            losses = self._losses([prompt_ids(self.tokenizer, one) for one in texts], group)
        return losses[0] if isinstance(text, str) else losses

    def logits(
        self, ids: Sequence[int] | Sequence[Sequence[int]] | np.ndarray, domain: str | None = None
    ) -> np.ndarray:
        """Logits after every token: float32 [n, V] of ids [n], or [B, n, V] of ids [B, n]; n is at most
        `data.sequence_length`, V `config.model.vocab_size`.

        The ids are taken as they are: begin them with `tokenizer.eod_id`, as every document begins. Raises UserError.
        """
        tokens = np.asarray(ids)
        if tokens.ndim not in (1, 2) or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
            raise UserError(f"ids are given as {tokens.dtype}{list(tokens.shape)}: give integers [n] or [B, n]")
        vocab, length = self._trained.model.vocab, self._length
        if tokens.min() < 0 or tokens.max() >= vocab:
            wrong = tokens[(tokens < 0) | (tokens >= vocab)][0]
            raise UserError(f"the id {wrong} is outside the vocabulary: ids are 0 to {vocab - 1}")
        if tokens.shape[-1] > length:
            raise UserError(f"{tokens.shape[-1]} ids are more than data.sequence_length = {length}: give fewer")
        group = self.domains.index(pick_domain(self.domains, domain))
        rows = np.full((len(tokens) if tokens.ndim == 2 else 1, length + 1), self.tokenizer.pad_id, np.int32)
        rows[:, : tokens.shape[-1]] = tokens
        with self._computing():
            logits = self._logits(rows, group)[:, : tokens.shape[-1]]
        return logits if tokens.ndim == 2 else logits[0]

    def infer_domain(self, text: str) -> str:
        """The domain that a text most likely belongs to. Raises UserError."""
        probabilities = self.domain_probabilities(text)
        return max(probabilities, key=probabilities.__getitem__)

    def domain_probabilities(self, text: str) -> dict[str, float]:
        """P(domain | text) of every domain, all being equally likely before; of a long text its last window counts."""
        with self._computing():
            return self._engine.domain_probabilities(prompt_ids(self.tokenizer, text))

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """This thread's turn to compute, with MindSpore set up for the model."""
        with runtime.COMPUTING:
            runtime.prepare(self.config.run.device)
            yield

    @property
    def _length(self) -> int:
        length = self.config.data.sequence_length
        assert length is not None  # filled in when the run began
        return length

    @property
    def _batch_size(self) -> int:
        size = self.config.evaluate.batch_size
        assert size is not None
        return size

    @cached_property
    def _engine(self) -> Engine:
        from pangu_sigma.generation.engine import Engine

        engine = Engine(self._trained.model, self.tokenizer, self._slots)
        if self._inference is not None:
            self._inference.apply(engine)
        return engine

    @cached_property
    def _chat_prompts(self) -> ChatPrompts:
        from pangu_sigma.generation.chat_prompt import ChatPrompts

        return ChatPrompts(self.tokenizer)

    @cached_property
    def _evaluator(self) -> Evaluator:
        from pangu_sigma.evaluation.domain_evaluation import Evaluator

        return Evaluator(self._trained.model, self._batch_size)

    def _request(self, prompt: str | Prompt, domain: str | None, options: SamplingOptions) -> Request:
        """A request that can run. Raises UserError."""
        prompt = Prompt(prompt) if isinstance(prompt, str) else prompt
        stop = options.get("stop", ())
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        settings: dict[str, Any] = {"top_k": 40, **options, "stop": stop}
        ids = prompt_ids(self.tokenizer, prompt.text)
        if settings.pop("chat", False):
            talk = self._chat_prompts.prompt([("user", prompt.text)])
            ids = talk.ids
            settings |= {"stop": (*stop, *talk.stop), "stop_ids": talk.stop_ids}
        if prompt.seed is not None:
            settings["seed"] = prompt.seed
        domain = prompt.domain or domain
        name = AUTO if domain == AUTO else pick_domain(self.domains, domain)
        request = Request(ids, name, Sampling(**settings))
        with self._computing():
            self._engine.check(request)
        return request

    def _begin(self, request: Request) -> int:
        """Queue a request; the id of its events."""
        with runtime.COMPUTING:
            request_id = self._engine.add(request)
            self._events[request_id] = deque()
        return request_id

    def _take(self, request_id: int) -> Iterator[Event]:
        """The events of a request to its last one, decoding where none waits. Raises UserError where it failed."""
        while True:
            with runtime.COMPUTING:
                waiting = self._events[request_id]
                if not waiting:
                    runtime.prepare(self.config.run.device)
                while not waiting:
                    for event in self._engine.step():
                        self._events[event.request_id].append(event)
                event = waiting.popleft()
            if event.error is not None:
                raise event.exception or UserError(event.error)
            yield event
            if event.finish:
                return

    def _forget(self, request_id: int) -> None:
        with runtime.COMPUTING:
            self._engine.cancel(request_id)
            self._events.pop(request_id, None)

    def _losses(self, texts: Sequence[Sequence[int]], group: str) -> list[float]:
        """Mean loss of each text of ids but its first, in rows and batches as evaluation cuts them."""
        length, size = self._length, self._batch_size
        pieces: list[tuple[int, Sequence[int]]] = []
        for index, ids in enumerate(texts):
            if len(ids) < 2:
                raise UserError("the text is empty, and has no token to measure: give some text")
            pieces += [(index, ids[start : start + length + 1]) for start in range(0, len(ids) - 1, length)]
        sums = np.zeros(len(texts))
        for start in range(0, len(pieces), size):
            batch = pieces[start : start + size]
            tokens = np.full((size, length + 1), self.tokenizer.pad_id, np.int32)
            mask = np.zeros((size, length), np.float32)
            for row, (_, ids) in enumerate(batch):
                tokens[row, : len(ids)], mask[row, : len(ids) - 1] = ids, 1.0
            by_row, _ = self._evaluator.outputs(tokens, mask, group, start)
            np.add.at(sums, [index for index, _ in batch], by_row.asnumpy()[: len(batch)].astype(np.float64))
        return [float(total) / (len(ids) - 1) for total, ids in zip(sums, texts, strict=True)]

    def _logits(self, rows: np.ndarray, group: int) -> np.ndarray:
        """Logits float32 [B, S, V] of token rows int32 [B, S + 1]: one row alone, several as evaluation's batches."""
        from pangu_sigma.model.scoring import Scorer

        size = 1 if len(rows) == 1 else self._batch_size
        if size not in self._scorers:
            self._scorers[size] = Scorer(self._trained.model, size)
        scorer, logits = self._scorers[size], []
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            filled = np.full((size, rows.shape[1]), self.tokenizer.pad_id, np.int32)
            filled[: len(batch)] = batch
            # A copy, because a graph's next run may write where its last result lies.
            logits.append(scorer.logits(filled, [group] * size).asnumpy()[: len(batch)].copy())
        return np.concatenate(logits)
