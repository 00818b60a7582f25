"""Engine with continuous batching: requests join and leave between decoding steps, each in a slot of its own.

What a request's answer depends on: its prompt, domain and sampling, and the model. What else is in the batch changes
its logits by float32 rounding at most, and not at all where `kv_cache_decoder` says so; its draws depend on (seed,
index of the token) alone. Of the prompt only the text after its last end-of-document token is computed with: attention
and positions restart there, so nothing before it can matter.

A prompt is read in blocks, one a step, by turns with all others that are read and with the texts that are written. So
no prompt holds up the rest for longer than a block takes, and one that is cancelled ends at the next.

A request whose logits are not finite ends with an error of its own, and so does one for which anything raises; the
others go on, since no row of a batch is computed from another. Ids that the tokenizer has no piece for are never
written nor listed; log-probabilities are the model's own, in which they have their share.

One thread at a time may use an engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.errors import UserError, argument
from pangu_sigma.generation.decoder import Decoder, Turns, in_one_go
from pangu_sigma.generation.domain_inference import posteriors
from pangu_sigma.generation.domain_mixture import DomainInference, DomainMixture
from pangu_sigma.generation.prompt_reader import Document, NotFiniteError, PromptReader
from pangu_sigma.generation.request import AUTO, Event, Request, Score, pick_domain
from pangu_sigma.generation.sampling import likeliest, log_softmax, sample_token
from pangu_sigma.generation.text_stream import TextStream

_NOT_FINITE = (
    "the experts of {} compute numbers that are not finite for this text; the training of the model's weights "
    "diverged: take an earlier checkpoint"
)


@dataclass
class _RequestState:
    """State of one request, in one slot, or in one for each domain that writes a text whose domain is inferred.

    reading: what is left of its prompt to read, None before and after.
    """

    request_id: int
    request: Request
    stream: TextStream
    slots: tuple[int, ...] = ()
    reading: Turns[Event] | None = None
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
        silent = tokenizer.ids_without_piece(self.vocab)
        self._reader = PromptReader(decoder, tokenizer.eod_id, silent)
        self._silent = frozenset(silent.tolist())
        self.domain_inference = DomainInference(range(len(self.domains)))
        self._next_id = 0
        self._waiting: deque[_RequestState] = deque()
        self._reading: deque[_RequestState] = deque()  # whose turn is next, first
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
        """Raise UserError for an unknown domain, an empty or too long prompt, or ids that the tokenizer has not."""
        if not self._is_inferred(request):
            pick_domain(self.domains, request.domain)
        if not request.prompt_ids:
            raise UserError("the prompt has no token; begin it with the end-of-document token, as a document begins")
        for what, ids in (("prompt", request.prompt_ids), ("list of stop ids", request.sampling.stop_ids)):
            wrong = next((i for i in ids if not 0 <= i < self.vocab or i in self._silent), None)
            if wrong in self._silent:
                raise UserError(f"the {what} has the id {wrong}, for which the tokenizer has no piece: leave it out")
            if wrong is not None:
                raise UserError(f"the {what} has the id {wrong}; the vocabulary's ids are 0 to {self.vocab - 1}")
        documents = self._reader.documents(request.prompt_ids)
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
                self._leave(state)

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
            *before, document = self._reader.documents(text)
            evidence = self._reader.evidence([*before, document[: self.window]], self.domain_inference)
            try:
                log_likelihood, able = in_one_go(evidence)
            except NotFiniteError:
                raise UserError(_NOT_FINITE.format("all domains")) from None
            log_likelihoods.append(np.where(able[:, None], log_likelihood, -np.inf))
        if log_likelihoods:
            self.domain_inference.cache(log_likelihoods)

    def step(self) -> list[Event]:
        """Decode one token of every text, admit requests that wait into free slots, and read one block of a prompt.

        Returns their events.
        """
        events = self._decode()
        self._admit()
        if self._reading:
            events += self._read_block(self._reading.popleft())
        return events

    def _decode(self) -> list[Event]:
        states = {state.request_id: state for state in self._slots if state is not None and state.reading is None}
        if not states:
            return []
        events = []
        for state, rows in self._step_texts(list(states.values())):
            try:
                if isinstance(rows, Exception):
                    raise rows
                events.append(self._choose_token(state, rows))
            except Exception as error:  # whatever it is, it is of this text alone
                events.append(self._failed(state, error))
        return events

    def _step_texts(self, states: list[_RequestState]) -> list[tuple[_RequestState, list[np.ndarray] | Exception]]:
        """Each text with the logits of its slots after its last token, or with the error that it alone meets."""
        try:
            logits = self.decoder.step({slot: state.last for state in states for slot in state.slots})
            return [(state, [logits[slot] for slot in state.slots]) for state in states]
        except Exception as error:
            if len(states) == 1:
                return [(states[0], error)]
        # One of them spoils the step: each by itself tells which, and the rest loses nothing.
        apart: list[tuple[_RequestState, list[np.ndarray] | Exception]] = []
        for state in states:
            ((_, rows),) = self._step_texts([state])
            apart.append((state, rows if isinstance(rows, Exception) else [row.copy() for row in rows]))
            if isinstance(rows, Exception):
                self._free_slots(state)  # so that the others' steps are rid of it
        return apart

    def _admit(self) -> None:
        while self._waiting:
            state = self._waiting[0]
            free = [slot for slot, other in enumerate(self._slots) if other is None]
            needed = self.domain_inference.top if self._is_inferred(state.request) else 1
            if len(free) < needed:
                return
            self._waiting.popleft()
            state.slots = tuple(free[:needed])
            for slot in state.slots:
                self._slots[slot] = state
            state.reading = self._read(state)
            self._reading.append(state)

    def _read_block(self, state: _RequestState) -> list[Event]:
        """One turn of reading a prompt; its first event after the last one."""
        try:
            next(state.reading)
        except StopIteration as end:
            state.reading = None
            if end.value.finish:
                self._free_slots(state)
            return [end.value]
        except Exception as error:
            return [self._failed(state, error)]
        self._reading.append(state)
        return []

    def _read(self, state: _RequestState) -> Turns[Event]:
        request = state.request
        documents = self._reader.documents(request.prompt_ids)
        document = documents[-1]
        # 1. With echo, score the prompt's tokens.
        scores: tuple[Score, ...] = ()
        last_row = None
        if request.sampling.echo:
            if self._is_inferred(request):
                blocks = self._reader.mixed(documents, self.domain_inference)
            else:
                blocks = self._reader.logits(documents, self.domains.index(request.domain))
            scores, last_row = yield from self._reader.scores(documents, blocks, request.sampling.logprobs or 0)
        # 2. Find the domains that write, by inference where none is given.
        members = yield from self._writing_domains(state, documents)
        if request.sampling.max_tokens == 0:
            return Event(state.request_id, None, prompt_scores=scores, finish="length", domains=self._domains_of(state))
        # 3. Keep a slot for each of them.
        state.seen = set(request.prompt_ids)
        state.length = len(document)
        state.last = document[-1]
        for slot in state.slots[len(members) :]:
            self._slots[slot] = None
        state.slots = state.slots[: len(members)]
        # 4. Prefill each slot's cache and choose the first token. The scores' last row is what a single token is chosen
        # from; only a longer answer needs a cache.
        if last_row is not None and request.sampling.max_tokens == 1 and state.mixture is None:
            return self._choose_token(state, [last_row], scores)
        begun = []
        for slot, domain in zip(state.slots, members, strict=True):
            # Copies, because a graph's next run may write where its last result lies.
            begun.append((yield from self.decoder.begin_blocks(slot, document, domain)).copy())
            if len(begun) < len(members):
                yield
        return self._choose_token(state, begun, scores)

    def _is_inferred(self, request: Request) -> bool:
        """Whether the request's domain is inferred."""
        return request.domain == AUTO

    def _writing_domains(self, state: _RequestState, documents: Sequence[Document]) -> Turns[tuple[int, ...]]:
        """Indices of the domains that write the answer; an inferred one gets its mixture."""
        if not self._is_inferred(state.request):
            return (self.domains.index(state.request.domain),)
        log_likelihood, able = yield from self._reader.evidence(documents, self.domain_inference)
        state.mixture = self.domain_inference.begin(log_likelihood, able)
        return state.mixture.members

    def domain_probabilities(self, ids: Sequence[int]) -> dict[str, float]:
        """P(domain | text) of the domains that a text may belong to, all equally likely before; of its last document
        the end within the window counts. Raises UserError where no domain's numbers are finite."""
        *before, document = self._reader.documents(ids)
        documents = [*before, document[-self.window :]]
        try:
            log_likelihood, able = in_one_go(self._reader.evidence(documents, self.domain_inference))
        except NotFiniteError:
            raise UserError(_NOT_FINITE.format("all domains")) from None
        candidates = self.domain_inference.candidates
        shares = posteriors(log_likelihood, able / able.sum())[:, -1]
        return {self.domains[domain]: float(share) for domain, share in zip(candidates, shares, strict=True)}

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
        """Choose the answer's next token from the logits of its slots; a finished answer leaves them.

        Raises NotFiniteError.
        """
        sampling = state.request.sampling
        if not all(np.isfinite(row).all() for row in rows):
            raise NotFiniteError
        logits = rows[0] if state.mixture is None else state.mixture.mixed(rows)
        token = sample_token(self._reader.without_silent(logits), sampling, state.written, state.seen)
        logprob, top = None, ()
        if sampling.logprobs is not None:
            logprobs = log_softmax(logits)
            logprob = float(logprobs[token])
            top = likeliest(self._reader.without_silent(logprobs), sampling.logprobs)
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

    def _failed(self, state: _RequestState, error: Exception) -> Event:
        """The last event of a request that cannot go on; its slots are free."""
        self._leave(state)
        if isinstance(error, NotFiniteError):
            whose = "its domains" if state.request.domain == AUTO else state.request.domain
            return Event(state.request_id, None, finish="error", error=_NOT_FINITE.format(whose))
        message = f"an internal error ended this text ({type(error).__name__}: {error}); please report it"
        return Event(state.request_id, None, finish="error", error=message, exception=error)

    def _leave(self, state: _RequestState) -> None:
        """Take a request out of the engine, wherever it is."""
        if state.reading is not None:
            state.reading.close()
            state.reading = None
            self._reading = deque(other for other in self._reading if other is not state)
        self._free_slots(state)

    def _free_slots(self, state: _RequestState) -> None:
        for slot in state.slots:
            self._slots[slot] = None
            self.decoder.end(slot)
        state.slots = ()
