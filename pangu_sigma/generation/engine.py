"""Engine with continuous batching: requests join and leave between decoding steps, each in a slot of its own.

What a request's answer depends on: its prompt, domain and sampling, and the model. What else is in the batch changes
its logits by float32 rounding at most, and not at all where `kv_cache_decoder` says so; its draws depend on (seed,
index of the token) alone. Of the prompt only the text after its last end-of-document token is computed with: attention
and positions restart there, so nothing before it can matter.

A request whose logits are not finite ends with an error of its own; the others go on, since no row of a batch is
computed from another.

One thread at a time may use an engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np

from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.errors import UserError, argument
from pangu_sigma.generation.domain_inference import posteriors, token_log_probabilities
from pangu_sigma.generation.domain_mixture import DomainInference, DomainMixture
from pangu_sigma.generation.request import AUTO, Event, Request, Score, pick_domain
from pangu_sigma.generation.sampling import likeliest, log_softmax, sample_token
from pangu_sigma.generation.text_stream import TextStream

_NOT_FINITE = (
    "the experts of {} compute numbers that are not finite for this text; the training of the model's weights "
    "diverged: take an earlier checkpoint"
)


class Decoder(Protocol):
    """Interface of the model to the engine: logits for `slots` texts, each within one document of `window` tokens."""

    slots: int
    window: int

    def score(self, ids: tuple[int, ...], domain: int) -> np.ndarray:
        """Logits float32 [n, V] after each of `ids` [n], one document; no slot changes."""

    def begin(self, slot: int, ids: tuple[int, ...], domain: int) -> np.ndarray:
        """Give `slot` to a new text that begins with the document `ids`; logits float32 [V] after the last."""

    def step(self, tokens: dict[int, int]) -> dict[int, np.ndarray]:
        """Append a token to some slots (slot -> id); slot -> logits float32 [V] after it.

        A token that follows an end-of-document token begins a document.
        """

    def end(self, slot: int) -> None:
        """Free the slot; an empty slot is no error."""

    def warm_ups(self, scores: bool) -> list[Callable[[], None]]:
        """Calls that each compile one of the graphs that texts within the window can need, with `scores` also those of
        `score`; to be called while no slot is in use."""


@dataclass
class _RequestState:
    """State of one request, in one slot, or in one for each domain that writes a text whose domain is inferred."""

    request_id: int
    request: Request
    stream: TextStream
    slots: tuple[int, ...] = ()
    mixture: DomainMixture | None = None
    seen: set[int] = field(default_factory=set)
    length: int = 0  # tokens of the document that the model has seen or is about to see
    written: int = 0
    last: int = -1


class Engine:
    """Continuous-batching engine: serves requests on one model, `slots` texts at a time; others wait in order.

    `decoder` is how logits are made: `KvCacheDecoder` unless another is given. The domain `AUTO` of a
    request is inferred: the likeliest of all domains, unless `set_domain_inference` says otherwise.
    """

    def __init__(self, model, tokenizer: Tokenizer, slots: int = 8, decoder: Decoder | None = None) -> None:
        sizes = model.config.model
        if sizes.sparse_prefixes and not sizes.router_spec.causal:
            raise UserError(
                f"the model's router ({sizes.router_setting}) looks at tokens that are not written yet, so it "
                "cannot write text: use it with evaluate"
            )
        if decoder is None:
            from pangu_sigma.generation.kv_cache_decoder import KvCacheDecoder

            decoder = KvCacheDecoder(model, slots)
        self.tokenizer = tokenizer
        self.domains: tuple[str, ...] = model.groups.names
        self.vocab: int = model.vocab
        self.decoder = decoder
        self.domain_inference = DomainInference(range(len(self.domains)))
        self._next_id = 0
        self._waiting: deque[_RequestState] = deque()
        self._slots: list[_RequestState | None] = [None] * decoder.slots

    @property
    def active(self) -> int:
        """Requests that hold a slot."""
        return len({state.request_id for state in self._slots if state is not None})

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether no request runs or waits."""
        return not self._waiting and self.active == 0

    @property
    def window(self) -> int:
        """Longest document in tokens, prompt and answer together."""
        return self.decoder.window

    def warm_up(self, on_progress: Callable[[int, int], None] = lambda done, total: None, scores: bool = True) -> None:
        """Compile all graphs that requests which `check` admits can need, so that none waits for a compilation later.

        How many graphs that is grows with the logarithms of window and slots. `on_progress(done, total)` is called
        after each, and with 0 at the start. Without `scores`, requests with `echo` are left out. Raises ValueError
        while requests are under way.
        """
        if not self.idle:
            raise ValueError("the engine is at work; warm it up before the first request")
        graphs = self.decoder.warm_ups(scores)
        on_progress(0, len(graphs))
        for done, compile_one in enumerate(graphs, 1):
            compile_one()
            on_progress(done, len(graphs))

    def add(self, request: Request) -> int:
        """Queue a request; return its id, which its events carry. Raises UserError for one that cannot run."""
        self.check(request)
        state = _RequestState(
            self._next_id, request, TextStream(self.tokenizer, request.prompt_ids, request.sampling.stop)
        )
        self._next_id += 1
        self._waiting.append(state)
        return state.request_id

    def check(self, request: Request) -> None:
        """Raise UserError for an unknown domain, an empty or too long prompt, or ids outside the vocabulary."""
        if not self._is_inferred(request):
            pick_domain(self.domains, request.domain)
        if not request.prompt_ids:
            raise UserError("the prompt has no token; begin it with the end-of-document token, as a document begins")
        for what, ids in (("prompt", request.prompt_ids), ("list of stop ids", request.sampling.stop_ids)):
            wrong = next((i for i in ids if not 0 <= i < self.vocab), None)
            if wrong is not None:
                raise UserError(f"the {what} has the id {wrong}; the vocabulary's ids are 0 to {self.vocab - 1}")
        documents = self._documents(request.prompt_ids)
        looked_at = documents if request.sampling.echo else documents[-1:]
        longest = max(len(ids) for ids in looked_at)
        if longest > self.window:
            raise UserError(
                f"the prompt has {longest} tokens in one document, and the model's window has {self.window}; shorten it"
            )

    def cancel(self, request_id: int) -> None:
        """Forget a request: its slot is free at once and no event of it follows. An unknown id is no error."""
        self._waiting = deque(state for state in self._waiting if state.request_id != request_id)
        for state in self._slots:
            if state is not None and state.request_id == request_id:
                self._free_slots(state)

    def set_domain_inference(self, domain_inference: DomainInference) -> None:
        """Set how the domain `AUTO` is inferred from now on. A text that several domains write holds a slot for each.

        Raises UserError for more domains together than there are slots.
        """
        if domain_inference.top > self.decoder.slots:
            raise UserError(
                f"{argument('top', domain_inference.top)} needs a slot for each of the domains, and there are "
                f"{self.decoder.slots}: set it lower, or {argument('slots')} higher"
            )
        self.domain_inference = domain_inference

    def cache_prior(self, texts: Iterable[Sequence[int]]) -> None:
        """Take the prior of domains that some texts suggest, each the ids of a prompt; without texts nothing
        changes.
        """
        log_likelihoods = []
        for text in texts:
            *before, document = self._documents(tuple(text))
            ids, logits = self._evidence([*before, document[: self.window]])
            log_likelihoods.append(np.stack([token_log_probabilities(rows[:-1], ids[1:]) for rows in logits]))
        if log_likelihoods:
            self.domain_inference.cache(log_likelihoods)

    def step(self) -> list[Event]:
        """Decode one token of every active request, then admit and prefill one that waits. Returns their events.

        One prompt a step is admitted, so that running texts wait for one prompt at most.
        """
        events = self._decode()
        if self._waiting:
            free = [slot for slot, state in enumerate(self._slots) if state is None]
            needed = self.domain_inference.top if self._is_inferred(self._waiting[0].request) else 1
            if len(free) >= needed:
                events.append(self._admit(tuple(free[:needed])))
        return events

    def _decode(self) -> list[Event]:
        tokens = {slot: state.last for slot, state in enumerate(self._slots) if state is not None}
        if not tokens:
            return []
        logits = self.decoder.step(tokens)
        active = {state.request_id: state for state in self._slots if state is not None}
        return [self._choose_token(state, [logits[slot] for slot in state.slots]) for state in active.values()]

    def _admit(self, slots: tuple[int, ...]) -> Event:
        state = self._waiting.popleft()
        request = state.request
        *before, document = self._documents(request.prompt_ids)
        # 1. With echo, score the prompt's tokens.
        scores: tuple[Score, ...] = ()
        if request.sampling.echo:
            rows = self._prompt_logits(request, [*before, document])
            if not np.isfinite(rows).all():
                return _not_finite(state)
            scores = _scores(request, rows)
        # 2. Find the domains that write, by inference where none is given.
        members = self._writing_domains(state, [*before, document])
        if not members:
            return _not_finite(state)
        if request.sampling.max_tokens == 0:
            return Event(state.request_id, None, prompt_scores=scores, finish="length", domains=self._domains_of(state))
        # 3. Take a slot for each of them.
        state.seen = set(request.prompt_ids)
        state.length = len(document)
        state.last = document[-1]
        state.slots = slots[: len(members)]
        for slot in state.slots:
            self._slots[slot] = state
        # 4. Prefill each slot's cache and choose the first token. The scores' last row is what a single token is chosen
        # from; only a longer answer needs a cache.
        if scores and request.sampling.max_tokens == 1 and state.mixture is None:
            return self._choose_token(state, [rows[-1]], scores)
        # Copies, because a graph's next run may write where its last result lies.
        begun = [
            self.decoder.begin(slot, document, domain).copy() for slot, domain in zip(state.slots, members, strict=True)
        ]
        return self._choose_token(state, begun, scores)

    def _is_inferred(self, request: Request) -> bool:
        """Whether the request's domain is inferred."""
        return request.domain == AUTO

    def _writing_domains(self, state: _RequestState, documents: list[tuple[int, ...]]) -> tuple[int, ...]:
        """Indices of the domains that write the answer, none if none can; an inferred one gets its mixture."""
        if not self._is_inferred(state.request):
            return (self.domains.index(state.request.domain),)
        log_likelihoods, able = self._log_likelihoods(documents)
        if not able.any():
            return ()
        state.mixture = self.domain_inference.begin(log_likelihoods, able)
        return state.mixture.members

    def domain_probabilities(self, ids: Sequence[int]) -> dict[str, float]:
        """P(domain | text) of the domains that a text may belong to, all equally likely before; of its last document
        the end within the window counts. Raises UserError where no domain's numbers are finite."""
        *before, document = self._documents(tuple(ids))
        log_likelihoods, able = self._log_likelihoods([*before, document[-self.window :]])
        if not able.any():
            raise UserError(_NOT_FINITE.format("all domains"))
        candidates = self.domain_inference.candidates
        shares = posteriors(log_likelihoods, able / able.sum())[:, -1]
        return {self.domains[domain]: float(share) for domain, share in zip(candidates, shares, strict=True)}

    def _log_likelihoods(self, documents: list[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
        """Log-likelihood [G, n - 1] of every token of the `_evidence` but the first under each candidate's experts, and
        whether that one's numbers are finite [G]."""
        ids, logits = self._evidence(documents)
        log_likelihoods, able = [], []
        for rows in logits:
            # A domain whose numbers are not finite writes nothing, so no text is its own.
            able.append(bool(np.isfinite(rows).all()))
            log_likelihoods.append(token_log_probabilities(rows[:-1], ids[1:]) if able[-1] else np.zeros(ids.size - 1))
        return np.stack(log_likelihoods), np.array(able)

    def _evidence(self, documents: list[tuple[int, ...]]) -> tuple[np.ndarray, Iterator[np.ndarray]]:
        """Ids [n] of a prompt's last document and the one before it, whose end predicts its first token; and the logits
        [n, V] after each of them, under one domain after the other that the prompt may belong to."""
        looked_at = [ids for ids in documents[-2:-1] if len(ids) <= self.window] + documents[-1:]
        ids = np.array([token for document in looked_at for token in document], np.int64)
        return ids, (self._logits(looked_at, domain) for domain in self.domain_inference.candidates)

    def _logits(self, documents: list[tuple[int, ...]], domain: int) -> np.ndarray:
        """Logits [n, V] after each token of the documents, n being their tokens together."""
        # Copies, because a graph's next run may write where its last result lies.
        return np.concatenate([self.decoder.score(ids, domain).copy() for ids in documents])

    def _prompt_logits(self, request: Request, documents: list[tuple[int, ...]]) -> np.ndarray:
        """Logits or log probabilities [n, V] after each of the prompt's tokens [n], for their scores."""
        if not self._is_inferred(request):
            return self._logits(documents, self.domains.index(request.domain))
        rows = [log_softmax(self._logits(documents, domain)) for domain in self.domain_inference.candidates]
        return self.domain_inference.rows(np.stack(rows), request.prompt_ids)

    def _domains_of(self, state: _RequestState) -> tuple[tuple[str, float], ...]:
        """(domain, posterior) of those that write an answer whose domain is inferred, best first.

        The domains that do not write keep the probability that they had after the prompt.
        """
        if state.mixture is None:
            return ()
        mixture = state.mixture
        shares = mixture.weights * mixture.probability.sum()
        posterior = ((self.domains[n], float(share)) for n, share in zip(mixture.members, shares, strict=True))
        return tuple(sorted(posterior, key=lambda item: -item[1]))

    def _choose_token(self, state: _RequestState, rows: list[np.ndarray], scores: tuple[Score, ...] = ()) -> Event:
        """Choose the answer's next token from the logits of its slots; a finished answer leaves them."""
        sampling = state.request.sampling
        if not all(np.isfinite(row).all() for row in rows):
            self._free_slots(state)
            return _not_finite(state)
        logits = rows[0] if state.mixture is None else state.mixture.mixed(rows)
        token = sample_token(logits, sampling, state.written, state.seen)
        logprob, top = None, ()
        if sampling.logprobs is not None:
            logprobs = log_softmax(logits)
            logprob, top = float(logprobs[token]), likeliest(logprobs, sampling.logprobs)
        text, finish = "", None
        if state.mixture is not None:
            state.mixture.update(token, rows)
        state.length = 1 if state.last == self.tokenizer.eod_id else state.length + 1
        state.written += 1
        state.last = token
        state.seen.add(token)
        if token == self.tokenizer.eod_id or token in sampling.stop_ids:
            finish = "stop"
        else:
            text = state.stream.push(token)
            if state.stream.stopped:
                finish = "stop"
            elif state.written == sampling.max_tokens or state.length > self.window:
                finish = "length"
        if finish:
            text += state.stream.close()
            if state.stream.stopped:
                finish = "stop"
            self._free_slots(state)
        return Event(state.request_id, token, text, logprob, top, scores, finish, domains=self._domains_of(state))

    def _free_slots(self, state: _RequestState) -> None:
        for slot in state.slots:
            self._slots[slot] = None
            self.decoder.end(slot)

    def _documents(self, ids: tuple[int, ...]) -> list[tuple[int, ...]]:
        """`ids` cut behind every end-of-document token but a last one."""
        ends = [index + 1 for index, token in enumerate(ids[:-1]) if token == self.tokenizer.eod_id]
        return [ids[a:b] for a, b in pairwise([0, *ends, len(ids)])]


def _not_finite(state: _RequestState) -> Event:
    """The last event of a request whose logits are not finite."""
    whose = "its domains" if state.request.domain == AUTO else state.request.domain
    return Event(state.request_id, None, finish="error", error=_NOT_FINITE.format(whose))


def _scores(request: Request, logits: np.ndarray) -> tuple[Score, ...]:
    """Scores of the prompt's tokens; logits [n, V] after each of them."""
    ids, alternatives = request.prompt_ids, request.sampling.logprobs or 0
    scores = [Score(ids[0], None)]
    for row, token in zip(logits[:-1], ids[1:], strict=True):
        logprobs = log_softmax(row)
        scores.append(Score(token, float(logprobs[token]), likeliest(logprobs, alternatives)))
    return tuple(scores)
