"""The report's HTML tables: quality per domain, the domain × group matrix, checkpoints, events."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from pangu_sigma.monitor.printable_text import compact, duration, printable
from pangu_sigma.monitor.text_tables import best_of_row, number, perplexity
from pangu_sigma.report.run_data import Evaluation, Record


def cell(text: object) -> str:
    """Text from a file as harmless HTML."""
    return escape(printable(str(text)))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, css: str = "") -> str:
    """A table in a box that scrolls; the cells are HTML already. The first column is the row's header."""
    head = "".join(f'<th scope="col">{name}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{css}"><caption class="hidden">{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def quality(domains: Sequence[str], first: Evaluation | None, latest: Evaluation, trained: Mapping[str, int]) -> str:
    """Domain, tokens trained on, unigram loss, first and latest held-out loss, gain on unigram, perplexity."""
    header = ["Domain", "Tokens trained", "Unigram loss"]
    header += [f"Loss at step {first.step:,}"] if first else []
    header += [f"Loss at step {latest.step:,}", "Under unigram", "Perplexity"]
    rows = []
    for domain in domains:
        loss, unigram = latest.losses.get(domain), latest.unigram.get(domain)
        gain = None if loss is None or unigram is None else unigram - loss
        row = [cell(domain), compact(trained[domain]) if domain in trained else "–", number(unigram)]
        row += [number(first.losses.get(domain))] if first else []
        row += [f"<strong>{number(loss)}</strong>"]
        row += [f'<td class="{"good" if gain and gain > 0 else "bad"}">{number(gain, sign=True)}</td>' if gain else "–"]
        row += ["–" if loss is None else number(perplexity(loss), 1)]
        rows.append(row)
    return table(header, rows, "Held-out loss per domain in nats per token")


def matrix(losses: Mapping[str, Mapping[str, float]]) -> str:
    """Loss of each domain's text (row) under each expert group (column), stronger colour nearer the row's best."""
    groups = list(dict.fromkeys(group for row in losses.values() for group in row))
    rows = []
    for domain, row in losses.items():
        best, distances, cells = best_of_row(row), _distances(row), [cell(domain)]
        largest = max(distances.values(), default=0.0) or 1.0
        for group in groups:
            if group not in distances:
                cells.append(number(row.get(group)))
                continue
            strength = 0.62 * (1 - distances[group] / largest) ** 2
            mark = ' class="best"' if group in best else ""
            note = '<span class="hidden"> (lowest)</span>' if group in best else ""
            cells.append(f'<td{mark} style="--a:{strength:.2f}">{number(row[group])}{note}</td>')
        rows.append(cells)
    caption = "Loss of each domain's text under each expert group in nats per token"
    return table(["Text \\ experts of", *map(cell, groups)], rows, caption, "matrix")


def matrix_verdict(losses: Mapping[str, Mapping[str, float]]) -> str:
    """One sentence: how many domains do best under their own experts."""
    own = [domain for domain, row in losses.items() if domain in best_of_row(row)]
    if len(own) == len(losses):
        return "Every domain does best under its own experts."
    others = [
        f"{cell(d)} ({', '.join(map(cell, sorted(best_of_row(losses[d])))) or 'none'})" for d in losses if d not in own
    ]
    count = f"{len(own)} of {len(losses)} domains do best under their own experts"
    return f"{count}; better under another's: {', '.join(others)}."


def checkpoints(records: Sequence[Record]) -> str:
    """Step, path, bytes written and linked, duration of each save."""
    rows = [
        [
            f"{r['step']:,}",
            f'<td class="text">{cell(r.get("path", "–"))}</td>',
            _bytes(r.get("bytes_written")),
            _bytes(r.get("bytes_linked")),
            duration(r["seconds"]) if isinstance(r.get("seconds"), int | float) else "–",
        ]
        for r in records
    ]
    return table(["Step", '<span class="text">Path</span>', "Written", "Linked", "Time"], rows, "Checkpoints", "log")


def events(records: Sequence[Record]) -> str:
    """Step and message of each event."""
    rows = [[f"{r['step']:,}", f'<td class="text">{cell(r.get("message", "–"))}</td>'] for r in records]
    return table(["Step", '<span class="text">Event</span>'], rows, "Events", "log")


def _bytes(value: object) -> str:
    return f"{compact(value)}B" if isinstance(value, int | float) else "–"


def _distances(row: Mapping[str, float]) -> dict[str, float]:
    finite = {group: v for group, v in row.items() if math.isfinite(v)}
    return {group: v - min(finite.values()) for group, v in finite.items()}
