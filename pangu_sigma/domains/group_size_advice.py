"""Proposed sizes of expert groups, from how much text each domain has and how much of it is not yet predicted.

A domain's claim is the square root of its tokens (at a given compute the best number of parameters grows as the square
root of the tokens do: Hoffmann et al., arXiv 2203.15556) times the share of its unigram loss that is left (what more
experts may still win). The experts of a sparse layer are dealt out by claim, by largest remainders, at least one each.
It is a rule of thumb and says its numbers: measure what a proposal gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pangu_sigma.domains.checkpoint_editor import check_router
from pangu_sigma.domains.list_domains import DomainFacts, list_domains
from pangu_sigma.errors import UserError, argument


@dataclass(frozen=True)
class Advice:
    """One domain: experts now and proposed, tokens of its training text, losses (nats per token), claim (sum 1).

    loss is None where it was not measured; the whole unigram loss (None where nothing is held out) counts as left
    then. tokens_per_parameter: training tokens that each expert of the proposed group gets in a pass over the text, for
    every parameter that it has.
    """

    name: str
    experts: int
    proposed: int
    tokens: int
    loss: float | None
    unigram: float | None
    left: float
    claim: float
    tokens_per_parameter: float


def deal(claims: Mapping[str, float], total: int) -> dict[str, int]:
    """`total` experts to domains in proportion to `claims` (> 0), by largest remainders, at least one each."""
    if total < len(claims):
        raise UserError(f"{argument('experts', total)} cannot give each of {len(claims)} domains one: set it higher")
    free, dealt = total - len(claims), dict.fromkeys(claims, 1)
    quotas_by_claim = {name: claim * total / sum(claims.values()) for name, claim in claims.items()}
    # What a domain has claim to beyond its one expert; the small ones that got more than theirs have none.
    beyond = {name: max(0.0, share - 1.0) for name, share in quotas_by_claim.items()}
    scale = free / sum(beyond.values()) if sum(beyond.values()) else 0.0
    quotas = {name: share * scale for name, share in beyond.items()}
    floors = {name: math.floor(quota + 1e-9) for name, quota in quotas.items()}  # 2.9999… of rounding is 3
    by_remainder = sorted(quotas, key=lambda name: quotas[name] - floors[name], reverse=True)
    for name in quotas:
        dealt[name] += floors[name]
    for name in by_remainder[: total - sum(dealt.values())]:
        dealt[name] += 1
    # Claims so equal that nobody has more than one expert's worth leave all that is free: it goes round.
    for turn in range(total - sum(dealt.values())):
        dealt[by_remainder[turn % len(by_remainder)]] += 1
    return dealt


def advise(path: str | Path, total: int | None = None) -> list[Advice]:
    """Advice for a run's, checkpoint's or model's domains; `total` experts in a sparse layer, None keeps their number.

    The text must be where the configuration says (it is tokenised if it is not in the cache); losses are the run's last
    held-out ones. Raises UserError.
    """
    from pangu_sigma.checkpoint import resolve
    from pangu_sigma.data.domain_store import unigram_loss
    from pangu_sigma.domains.resize_domain import domain_store
    from pangu_sigma.trained_model import stored_config, with_text_cache

    checkpoint = resolve(path)
    config = stored_config(checkpoint)
    check_router(checkpoint, config)
    facts = {fact.name: fact for fact in list_domains(path)}
    with TemporaryDirectory() as scratch:
        config = with_text_cache(config, checkpoint, Path(scratch))
        stores = {name: domain_store(config, checkpoint, name) for name in checkpoint.domains}
        # A loss is compared with the unigram model's on the same text, often a part of what is held out.
        unigram = {
            name: unigram_loss(store.token_counts, store.heldout.counts(store.token_counts.size))
            for name, store in stores.items()
            if store.heldout.tokens
        } | {name: fact.unigram for name, fact in facts.items() if fact.unigram is not None}
        tokens = {name: int(store.tokens["train"]) for name, store in stores.items()}
    losses = {name: fact.loss if fact.unigram is not None else None for name, fact in facts.items()}
    return proposals(facts, tokens, losses, unigram, total)


def proposals(
    facts: Mapping[str, DomainFacts],
    tokens: Mapping[str, int],
    losses: Mapping[str, float | None],
    unigram: Mapping[str, float],
    total: int | None,
) -> list[Advice]:
    """The rule itself, on figures of all domains; see `advise`."""
    left = {name: 1.0 if losses[name] is None else min(1.0, losses[name] / unigram[name]) for name in facts}
    claims = {name: math.sqrt(tokens[name]) * left[name] for name in facts}
    everything = sum(claims.values())
    sizes = {name: max(fact.experts.values()) for name, fact in facts.items()}
    dealt = deal(claims, sum(sizes.values()) if total is None else total)
    return [
        Advice(
            name=name,
            experts=sizes[name],
            proposed=dealt[name],
            tokens=tokens[name],
            loss=losses[name],
            unigram=unigram.get(name),
            left=left[name],
            claim=claims[name] / everything,
            tokens_per_parameter=tokens[name] / dealt[name] / (fact.parameters / sizes[name] / len(fact.experts)),
        )
        for name, fact in facts.items()
    ]


def advice_text(advices: list[Advice], model: str) -> str:
    """The advice as a table, its reasoning, and the commands that follow it."""
    from pangu_sigma.monitor.text_tables import number, text_table

    rows = [
        [
            a.name, f"{a.tokens:,}", "–" if a.loss is None else number(a.loss), number(a.unigram),
            f"{100 * a.left:.0f} %", f"{100 * a.claim:.1f} %", str(a.experts), str(a.proposed),
            f"{a.tokens_per_parameter:.2g}",
        ]
        for a in advices
    ]  # fmt: skip
    header = ["domain", "tokens", "loss", "unigram", "left", "claim", "experts", "proposed", "tokens/parameter"]
    total = sum(a.proposed for a in advices)
    lines = [
        text_table(header, rows),
        "",
        "claim = √tokens × left, left = loss / unigram loss: much text, or text that is still badly predicted, asks "
        f"for more experts; {total} experts of a sparse layer are dealt out by claim, at least one each.",
    ]
    for a in advices:
        if a.unigram is None:
            lines.append(f"{a.name} has no held-out text to measure with, so all of its loss counts as left.")
        elif a.loss is None:
            lines.append(f"{a.name} was not measured since it came, so all of its unigram loss counts as left.")
        if a.proposed > 1 and a.tokens_per_parameter < 1:
            lines.append(
                f"{a.name}: each of {a.proposed} experts would meet fewer tokens in a pass than it has parameters; "
                "more text helps it more than more experts."
            )
    grown = [a for a in advices if a.proposed > a.experts]
    shrunk = [a.name for a in advices if a.proposed < a.experts]
    lines += [f"pangu-sigma domains resize {model} --name {a.name} --experts {a.proposed}" for a in grown]
    if shrunk:
        lines.append(f"A group cannot shrink; {', '.join(shrunk)} would get fewer experts only in a new run.")
    if not grown and not shrunk:
        lines.append("The groups are as proposed.")
    return "\n".join(lines)
