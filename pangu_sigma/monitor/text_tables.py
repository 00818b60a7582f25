"""Results as plain aligned text: the same characters on a terminal, in a pipe and in a log file."""

import math
from collections.abc import Mapping, Sequence

from rich.cells import cell_len

from pangu_sigma.monitor.printable_text import printable


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned columns with a rule under the header; the first `left` columns are flush left, the others right.

    Widths count terminal cells, so that Chinese names stay in line. Raises ValueError if a row's length differs.
    """
    table = [[printable(cell) for cell in row] for row in (header, *rows)]
    if any(len(row) != len(header) for row in table):
        raise ValueError("every row of a table needs as many cells as its header")
    widths = [max(cell_len(row[i]) for row in table) for i in range(len(header))]
    lines = ["  ".join(_pad(c, w, i < left) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in table]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def quality_table(
    unigram: Mapping[str, float],
    after: Mapping[str, float],
    before: Mapping[str, float] | None = None,
    tokens: Mapping[str, int] | None = None,
) -> str:
    """Domain, unigram loss, validation loss before and after, gain on the unigram model (nats per token), perplexity.

    Domains in the order of `after`; `before` and `tokens` (held-out tokens) add their columns; a missing value is –.
    """
    header = ["domain", "unigram", *(["before"] if before else []), "after" if before else "loss", "gain", "perplexity"]
    header += ["tokens"] if tokens else []
    rows = []
    for domain, loss in after.items():
        row = [domain, number(unigram.get(domain))]
        row += [number(before.get(domain))] if before else []
        row += [number(loss), number(unigram.get(domain, math.nan) - loss, sign=True), number(perplexity(loss), 2)]
        row += [f"{tokens[domain]:,}" if domain in tokens else "–"] if tokens else []
        rows.append(row)
    return text_table(header, rows)


def measured_part(batches: Mapping[str, Sequence[int]]) -> str | None:
    """A sentence where less than all held-out text was measured; `batches`: domain -> (measured, in all)."""
    parts = [f"{name} {done} of {in_all} batches" for name, (done, in_all) in batches.items() if done < in_all]
    return f"Only a part of the held-out text was measured: {', '.join(parts)}." if parts else None


def matrix_table(matrix: Mapping[str, Mapping[str, float]], width: int | None = None) -> str:
    """Loss (nats per token) of each domain's text (row) under each expert group (column); * marks a row's lowest.

    With `width` (terminal cells) the columns of a wide matrix are broken into several tables one under the other.
    """
    groups = list(dict.fromkeys(group for row in matrix.values() for group in row))
    blocks, start = [], 0
    while start < len(groups) or not blocks:
        end = len(groups)
        block = _matrix_block(matrix, groups[start:end])
        while width and end - start > 1 and max(map(cell_len, block.splitlines())) > width:
            end -= 1
            block = _matrix_block(matrix, groups[start:end])
        blocks.append(block)
        start = max(end, start + 1)
    return "\n\n".join(blocks) + "\n* lowest loss of the row"


def evaluation_line(
    step: int, losses: Mapping[str, float], unigram: Mapping[str, float] | None = None, width: int = 100
) -> str:
    """Validation by domain for one line above the progress bar, continued on indented lines where `width` is full.

    With `unigram` the gain on the unigram model stands in brackets (positive is better), all in nats per token.
    """
    lines = [f"step {step} validation:"]
    for domain, loss in losses.items():
        part = f" {printable(domain)} {number(loss)}"
        if unigram and domain in unigram:
            part += f" ({number(unigram[domain] - loss, 2, sign=True)})"
        if cell_len(lines[-1]) + cell_len(part) > width:
            lines.append("   ")
        lines[-1] += part + ","
    return "\n".join(lines).removesuffix(",")


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A float for a table: fixed digits, – for None or nan, inf spelled out."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:{'+' if sign else ''},.{digits}f}"


def perplexity(loss: float) -> float:
    """exp(loss), infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 or math.isnan(loss) else math.inf


def best_of_row(row: Mapping[str, float]) -> set[str]:
    """The groups with the row's lowest finite loss; several if they are equal, none if nothing is finite."""
    finite = [v for v in row.values() if math.isfinite(v)]
    return {group for group, v in row.items() if finite and v == min(finite)}


def _matrix_block(matrix: Mapping[str, Mapping[str, float]], groups: Sequence[str]) -> str:
    rows = []
    for domain, row in matrix.items():
        best = best_of_row(row)
        rows.append([domain, *(number(row.get(g)) + ("*" if g in best else " ") for g in groups)])
    return text_table(["text \\ experts of", *(f"{group} " for group in groups)], rows)


def _pad(text: str, width: int, left: bool) -> str:
    space = " " * (width - cell_len(text))
    return text + space if left else space + text
