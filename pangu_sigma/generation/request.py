"""Requests to the engine, sampling parameters, and the events that it answers with; without MindSpore."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, NamedTuple

from pangu_sigma.config.data_section import INFERRED_DOMAIN
from pangu_sigma.errors import UserError
from pangu_sigma.wording import did_you_mean

if TYPE_CHECKING:
    from pangu_sigma.data.tokenizers.tokenizer import Tokenizer

Alternatives = tuple[tuple[int, float], ...]

AUTO = INFERRED_DOMAIN  # the domain of a text that is to be inferred from it


class NumberRange(NamedTuple):
    """Numbers that a sampling parameter takes: from `lowest` to `highest`, and 0 if `or_zero`; `whole` ones only."""

    lowest: float
    highest: float
    whole: bool = False
    or_zero: bool = False

    def check(self, name: str, value: object) -> None:
        """Raises UserError for anything else; a truth value is no number."""
        kind = Integral if self.whole else Real
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if is_number and (self.lowest <= value <= self.highest or (self.or_zero and value == 0)):  # type: ignore[operator]
            return
        what = "a whole number" if self.whole else "a number"
        zero = "0, or " if self.or_zero else ""
        lowest, highest = (str(n) if self.whole else f"{n:g}" for n in (self.lowest, self.highest))
        raise UserError(f"{name} is {_shown(value)}; give {zero}{what} from {lowest} to {highest}")


def _shown(value: object) -> str:
    try:
        text = str(value)
    except ValueError:  # a whole number of thousands of digits
        return "a number of more digits than can be shown"
    return text if len(text) <= 40 else f"{text[:40]}…"


_COUNT = 2**31 - 1
# Wide enough for whatever is meant, and narrow enough that no arithmetic with a model's logits leaves float64.
SAMPLING_RANGES = {
    "max_tokens": NumberRange(0, _COUNT, whole=True),
    "temperature": NumberRange(1e-9, 100.0, or_zero=True),
    "top_k": NumberRange(0, _COUNT, whole=True),
    "top_p": NumberRange(1e-9, 1.0),
    "repetition_penalty": NumberRange(0.01, 100.0),
    "seed": NumberRange(-(2**63), 2**64 - 1, whole=True),
    "logprobs": NumberRange(0, _COUNT, whole=True),
}


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a request, and when its text ends. Raises UserError for values out of range.

    max_tokens: most tokens to write; 0 only scores the prompt (with `echo`).
    temperature: 0 takes the likeliest token (the lower id among equals); higher is freer.
    top_k: draw among this many likeliest; 0 draws among all. top_p: draw among the likeliest that together hold this
    share of the probability, at least one.
    repetition_penalty: logits of ids that the prompt or the text hold already are divided by it where positive and
    multiplied where negative (arXiv 1909.05858, section 4.1); 1 changes nothing.
    stop: the text ends before the first of these strings. stop_ids: the text ends before one of these tokens, as it
    always does before an end-of-document token.
    seed: draws depend on (seed, index of the token in the answer) alone.
    logprobs: None, or how many of the likeliest alternatives every event names beside its own token's logarithm.
    echo: also score the prompt's tokens; the scores come with the first event.
    """

    max_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    logprobs: int | None = None
    echo: bool = False

    def __post_init__(self) -> None:
        for name, numbers in SAMPLING_RANGES.items():
            if name != "logprobs" or self.logprobs is not None:
                numbers.check(name, getattr(self, name))
        if self.max_tokens == 0 and not self.echo:
            raise UserError("max_tokens is 0; give at least 1 (0 only together with echo)")
        if any(not text for text in self.stop):
            raise UserError("a stop string is empty; leave it out")


@dataclass(frozen=True)
class Request:
    """One request: ids to continue with the experts of `domain`, or of the inferred domains (`AUTO`).

    `prompt_ids` is all that the model sees; see `prompt_ids()`.
    """

    prompt_ids: tuple[int, ...]
    domain: str
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Score:
    """Score of one prompt token: its log-probability (nats) after everything before it, None for the first;
    alternatives.
    """

    token_id: int
    logprob: float | None
    top: Alternatives = ()


@dataclass(frozen=True)
class Event:
    """Event of one request in one step; every sampled token gives exactly one event, in order.

    token_id: the token; None in the single event of a request with max_tokens 0, and in one with an error. The token
    that ended the text (end of document, one of `stop_ids`) has an event too, and is no part of the text.
    text: the text that is certain now. Bytes of an unfinished character and letters that may yet become a stop string
    wait for a later event; the texts of all events joined are the answer.
    logprob: natural logarithm of the token's probability under the model itself (before temperature, top-k, top-p and
    repetition penalty), None unless `logprobs` was asked for; top: the likeliest (id, logprob), best first.
    prompt_scores: with `echo`, in the first event: one for every prompt token; otherwise ().
    finish: None while the text goes on; "stop" at an end-of-document token, a stop id or a stop string; "length" at
    max_tokens or when the model's window is full; "error" when no token could be chosen (then token_id is None).
    error: with finish "error", the reason in a sentence. exception: what was raised, where the program is at fault.
    domains: of a text whose domain is inferred, the (domain, posterior) of those that write it, best first.
    """

    request_id: int
    token_id: int | None
    text: str = ""
    logprob: float | None = None
    top: Alternatives = ()
    prompt_scores: tuple[Score, ...] = ()
    finish: str | None = None
    error: str | None = None
    exception: Exception | None = None
    domains: tuple[tuple[str, float], ...] = ()


def document_begin(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids with which a document begins: the end of the one before, and what the tokenizer itself puts first (bos)."""
    return (tokenizer.eod_id, *(token for token in tokenizer.begin_ids if token != tokenizer.eod_id))


def prompt_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of a prompt that begins a document: `document_begin`, then the text's (maybe none)."""
    return (*document_begin(tokenizer), *tokenizer.encode(text))


def pick_domain(names: Sequence[str], name: str | None) -> str:
    """The domain to write with; a model of one domain needs none named. Raises UserError."""
    if name is None:
        if len(names) == 1:
            return names[0]
        raise UserError(f"the model has the domains {', '.join(names)}: choose one as domain")
    if name not in names:
        raise UserError(f"the model has no domain '{name}'; {did_you_mean(name, names)}")
    return name
