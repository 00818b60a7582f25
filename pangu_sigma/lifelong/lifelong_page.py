"""The measurement as one self-contained HTML page: property table, matrix, measures, costs."""

from __future__ import annotations

from collections.abc import Iterator

from pangu_sigma.lifelong.lifelong_results import Results
from pangu_sigma.lifelong.loss_heat_map import heat_map
from pangu_sigma.lifelong.property_table import NO, UNKNOWN, YES
from pangu_sigma.monitor.text_tables import number
from pangu_sigma.report.html_page import html_page
from pangu_sigma.report.html_tables import cell, table

_MEANING = {
    "backward transfer": "quality at the end against right after learning; below 0: later stages cost it",
    "forgetting": "best quality of any earlier stage against the end; above 0: something was lost",
    "forward transfer": "quality just before its stage against the untrained model",
    "learned loss": "loss right after learning, lower is better",
    "final loss": "loss at the end, lower is better",
}


def render(results: Results, name: str) -> str:
    """The page as text; `name` is the measurement's. Whatever comes from files is escaped."""
    planned = len(results.plan["stages"])
    state = f"{planned} stages" if results.complete else f"{len(results.rows)} of {planned} stages so far"
    model = results.plan["base"]["model"]
    router = model["sparse"]["router"] if results.costs and _sparse(model) else "dense"
    line = f"{state} · {len(results.domains)} domains · {router} · {cell(_policies(results))}"
    return html_page(name, "lifelong learning", f"<p>{line}</p>", _sections(results))


def _sections(results: Results) -> Iterator[tuple[str, str, str]]:
    if results.rows:
        yield "properties", "Lifelong-learning properties", _properties(results)
    note = (
        "<p>Held-out loss in nats per token: a row per stage, a column per domain. Red: above the domain's lowest. "
        "Outlined: the stage that learned the domain; below it, the change since then; italic: before. A domain "
        "without experts of its own is read with those of the domain that its text seems to belong to.</p>"
    )
    yield "matrix", "Loss after every stage", f'{note}<div class="card scroll">{heat_map([results.panel])}</div>'
    if results.rows:
        yield "measures", "Transfer and forgetting", _measures(results)
        yield "costs", "What every stage cost", _costs(results)
        yield "learning", "Learning as the text comes", _learning(results)


def _properties(results: Results) -> str:
    rows = []
    for result in results.properties:
        css = {YES: "good", NO: "bad", UNKNOWN: "none"}.get(result.holds, "")
        rows.append(
            [
                f"{cell(result.name)}{_note(result.question)}",
                f'<td class="{css}"><strong>{cell(result.holds)}</strong></td>',
                f'<td class="text">{cell(result.number)}{_note(result.rule)}</td>',
            ]
        )
    return table(["Property", "Holds", '<span class="text">Number</span>'], rows, "Lifelong-learning properties")


def _measures(results: Results) -> str:
    rows = [
        [f"{name.capitalize()}{_note(_MEANING[name])}", f"<strong>{mean}</strong>", *each]
        for name, mean, *each in results.measure_rows()
    ]
    header = ["In nats per token", "Mean", *map(cell, results.domains)]
    return table(header, rows, "Backward transfer, forgetting, forward transfer")


def _costs(results: Results) -> str:
    rows = [[cell(name), *figures] for name, *figures in results.cost_rows(with_moments=True)]
    header = ["Stage", "Steps", "Tokens", "Time", "Parameters", "New", "Trained", "A token meets"]
    header += ["Model", "With moments", "Written anew"]
    return table(header, rows, "Cost of every stage")


def _learning(results: Results) -> str:
    rows = []
    for name, stage in zip(results.stages, results.learning, strict=True):
        for domain, result in stage.items():
            passes = "–" if result["passes"] is None else f"{result['passes']:.2f}"
            rows.append([f"{cell(name)}: {cell(domain)}", passes, number(result["online_loss"])])
    note = "<p>Passes over the domain's training text so far; loss of each batch before the step that learns it.</p>"
    return note + table(["Stage and domain", "Passes", "Loss before learning"], rows, "Learning as the text comes")


def _note(text: str) -> str:
    return f'<br><small style="font-weight:400;color:var(--soft)">{cell(text)}</small>'


def _policies(results: Results) -> str:
    """What the stages after the first do with what was learned before, in a few words."""
    sentences = []
    for stage in results.plan["stages"][1:]:
        policy = stage["policy"]
        replay = f" with {100 * policy['replay']:.0f} % replay" if policy["replay"] else ""
        penalties = {k: v for k, v in (policy["regularise"] or {}).items() if v and k in ("output", "l2", "ewc")}
        by = f" ({', '.join(f'{key} {weight:g}' for key, weight in penalties.items())})" if penalties else ""
        sentences.append(f"shared parameters {policy['shared']}{by}{replay}")
    return ", ".join(dict.fromkeys(sentences)) or "one stage"


def _sparse(model: dict) -> bool:
    return bool(model["sparse"]["layers"]) or model["sparse"]["pattern"] != "top"
