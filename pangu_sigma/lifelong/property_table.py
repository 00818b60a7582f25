"""The lifelong-learning property table (Biesialska et al., arXiv 2012.09823), each line with the number behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pangu_sigma.lifelong.forgetting_measures import Measure
from pangu_sigma.monitor.printable_text import compact
from pangu_sigma.monitor.text_tables import number

# Nats per token that a property may be off and still hold; what is below does not show in any table.
TOLERANCE = 0.0005
# Nats per token that an inferred domain may cost before text needs to be told its domain.
BOUNDARY_TOLERANCE = 0.05

YES, PARTLY, NO, UNKNOWN = "yes", "partly", "no", "not measured"


@dataclass(frozen=True)
class Property:
    """One line: what is asked, whether it holds (`yes`, `partly`, `no`, `not measured`), the number, the rule."""

    name: str
    question: str
    holds: str
    number: str
    rule: str


def properties(
    domains: Sequence[str],
    measures: Mapping[str, Measure],
    last: Mapping[str, Mapping[str, Any]],
    costs: Sequence[Mapping[str, Any]],
    learning: Sequence[Mapping[str, Mapping[str, Any]]],
    by_domain: bool,
) -> list[Property]:
    """The six properties; `last` is the matrix' last row, the rest as in `Results`."""
    return [
        _retention(domains, measures["forgetting"]),
        _transfer(
            "Forward transfer", "Does what was learned help a domain before its first step?",
            measures["forward_transfer"], "no domain came after the first stage",
        ),
        _transfer(
            "Backward transfer", "Do later stages improve earlier domains?",
            measures["backward_transfer"], "no domain was learned before the last stage", "; no: 0 or below",
        ),
        _online(learning),
        _boundaries(last, by_domain),
        _capacity(costs),
    ]  # fmt: skip


def _retention(domains: Sequence[str], forgetting: Measure) -> Property:
    question = "Is what was learned still there after later stages?"
    rule = "yes: no domain forgets anything that three digits show; partly: the mean is so"
    if forgetting.mean is None:
        return Property("Knowledge retention", question, UNKNOWN, "no domain was learned before the last stage", rule)
    worst = max(forgetting.by_domain, key=lambda j: forgetting.by_domain[j])
    most = forgetting.by_domain[worst]
    holds = YES if most <= TOLERANCE else PARTLY if forgetting.mean <= TOLERANCE else NO
    evidence = f"forgetting {number(forgetting.mean, sign=True)} nats per token, most {number(most, sign=True)}"
    return Property("Knowledge retention", question, holds, f"{evidence} ({domains[worst]})", rule)


def _transfer(name: str, question: str, measured: Measure, none: str, further_rule: str = "") -> Property:
    rule = f"yes: above 0 on the mean and for every domain; partly: on the mean{further_rule}"
    if measured.mean is None:
        return Property(name, question, UNKNOWN, none, rule)
    all_of_them = all(value > TOLERANCE for value in measured.by_domain.values())
    holds = NO if measured.mean <= TOLERANCE else YES if all_of_them else PARTLY
    return Property(name, question, holds, f"{number(measured.mean, sign=True)} nats per token", rule)


def _online(learning: Sequence[Mapping[str, Mapping[str, Any]]]) -> Property:
    question = "Does it learn from text that it meets once?"
    rule = "yes: every training text was met at most once; partly: some were; no: none"
    passes = [measured["passes"] for stage in learning for measured in stage.values() if measured["passes"] is not None]
    losses = [measured["online_loss"] for stage in learning for measured in stage.values() if measured["online_loss"]]
    if not passes:
        return Property("Online learning", question, UNKNOWN, "the run does not tell what it has read", rule)
    once = [value <= 1.0 for value in passes]
    holds = YES if all(once) else PARTLY if any(once) else NO
    evidence = f"{min(passes):.2f} to {max(passes):.2f} passes over a domain's text"
    if losses:
        evidence += f"; loss of text before learning from it {number(sum(losses) / len(losses))}"
    return Property("Online learning", question, holds, evidence, rule)


def _boundaries(last: Mapping[str, Mapping[str, Any]], by_domain: bool) -> Property:
    name, question = "No task boundaries", "Can text be used whose domain is not given?"
    rule = f"yes: inferring the domain costs at most {BOUNDARY_TOLERANCE} nats per token; in training it is always told"
    if not by_domain:
        return Property(name, question, YES, "the model asks for no domain when it is used", rule)
    own = [row for row in last.values() if row["how"] == "own"]
    if any(row["auto"] is None for row in own) or any(row["how"] == "unchanged" for row in last.values()):
        return Property(name, question, UNKNOWN, "no domain was inferred (measure: all does so)", rule)
    if len(own) < 2:
        return Property(name, question, UNKNOWN, "there is one domain only", rule)
    cost = sum(row["auto"] - row["loss"] for row in own) / len(own)
    after = list(own[0]["accuracy"])
    shares = {n: [row["accuracy"][n] for row in own if row["accuracy"][n] is not None] for n in after}
    right = ", ".join(f"{100 * sum(v) / len(v):.0f} % after {n}" for n, v in shares.items() if v)
    evidence = f"inferring the domain costs {number(cost)} nats per token; right {right} tokens"
    return Property(name, question, YES if cost <= BOUNDARY_TOLERANCE else NO, evidence, rule)


def _capacity(costs: Sequence[Mapping[str, Any]]) -> Property:
    question = "Does the model stay as large as it was?"
    rule = "yes: stored parameters stay; partly: only the active ones per token stay; no: both grow"
    first, last = costs[0]["parameters"], costs[-1]["parameters"]
    stored, active = last["total"] / first["total"], last["active"] / first["active"]
    holds = YES if stored <= 1.0 else PARTLY if active <= 1.0 else NO
    evidence = (
        f"{compact(first['total'])} to {compact(last['total'])} parameters ({stored:.2f} ×), active per token "
        f"{compact(first['active'])} to {compact(last['active'])} ({active:.2f} ×)"
    )
    return Property("Fixed model capacity", question, holds, evidence, rule)
