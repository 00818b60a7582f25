"""Continue a text with one domain's experts. Every token runs the whole window: plain and right, not yet fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pangu_sigma.data.tokenizer import Tokenizer
from pangu_sigma.errors import UserError
from pangu_sigma.model.build import Model
from pangu_sigma.model.inputs import Planner, graph_placeholders
from pangu_sigma.model.pangu import Logits
from rre.counted import generator


class Generator:
    """Next-token logits of one domain over a window of the model's sequence length."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.signature = model.exact_signature(1, domains=1)
        self.planner = Planner(model, self.signature, training=False)
        self.graph = Logits(model.net, model.layout, self.signature)
        self.graph.set_train(False)
        fixed = graph_placeholders(1, self.signature.length)
        names = ("tokens", "positions", "segments", "domain", "keys")
        self.graph.set_inputs(*(fixed[name] for name in names), *self.signature.placeholders())

    def next_logits(self, ids: Sequence[int], domain: str) -> np.ndarray:
        """Logits float32 [V] of the token after `ids`; the last window of a longer text counts."""
        self.graph.set_train(False)
        length = self.signature.length
        window = list(ids)[-length:]
        tokens = np.full((1, length + 1), self.model.eod_id, np.int32)
        tokens[0, : len(window)] = window
        number = np.array([self.model.groups.names.index(domain)], np.int32)
        planned = self.planner(tokens, number, np.zeros(1, np.int64), 0)
        logits = self.graph(*planned.fixed, *planned.flat(self.signature, self.model.store))
        return logits.asnumpy()[0, len(window) - 1]

    def continue_ids(
        self,
        ids: Sequence[int],
        domain: str,
        max_tokens: int,
        temperature: float = 0.8,
        top_k: int = 40,
        seed: int = 0,
        advance: Callable[[int], None] | None = None,
    ) -> list[int]:
        """Up to `max_tokens` ids after `ids`, ending at end-of-document; temperature 0 takes the likeliest."""
        written: list[int] = []
        for number in range(max_tokens):
            logits = self.next_logits([*ids, *written], domain).astype(np.float64)
            token = int(np.argmax(logits)) if temperature == 0.0 else _draw(logits, temperature, top_k, seed, number)
            if token == self.model.eod_id:
                break
            written.append(token)
            if advance:
                advance(1)
        return written


def _draw(logits: np.ndarray, temperature: float, top_k: int, seed: int, number: int) -> int:
    if 0 < top_k < logits.size:
        logits = np.where(logits >= np.partition(logits, -top_k)[-top_k], logits, -np.inf)
    scaled = (logits - logits.max()) / temperature
    p = np.exp(scaled)
    return int(generator(seed, "generate", number).choice(p.size, p=p / p.sum()))


def pick_domain(names: Sequence[str], wanted: str | None) -> str:
    """The domain to write with; a model of one domain needs none named. Raises UserError."""
    if wanted is None:
        if len(names) == 1:
            return names[0]
        raise UserError(f"the model has the domains {', '.join(names)}: choose one with --domain")
    if wanted not in names:
        from difflib import get_close_matches

        near = get_close_matches(wanted, names, n=1, cutoff=0.0)
        raise UserError(f"the model has no domain '{wanted}'; did you mean '{near[0]}'?")
    return wanted


def continue_text(
    generator_: Generator, tokenizer: Tokenizer, domain: str, prompt: str, max_tokens: int, **sampling: object
) -> str:
    """`prompt` and its continuation. An empty prompt begins a document."""
    ids = [generator_.model.eod_id, *tokenizer.encode(prompt)]
    written = generator_.continue_ids(ids, domain, max_tokens, **sampling)
    return prompt + tokenizer.decode(written)


def generate(
    path: Path,
    domain: str | None,
    prompt: str,
    max_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
) -> str:
    """Continue `prompt` with the model of a run or checkpoint folder. Raises UserError."""
    from pangu_sigma.load import load_trained
    from pangu_sigma.monitor.terminal import progress

    trained = load_trained(path)
    chosen = pick_domain(trained.model.groups.names, domain)
    with progress("generate", max_tokens, unit="tokens") as job:
        return continue_text(
            Generator(trained.model),
            trained.tokenizer,
            chosen,
            prompt,
            max_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            advance=job.advance,
        )
