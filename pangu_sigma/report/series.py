"""Curves made of records: picked, smoothed, and thinned where they are smooth already."""

import math
import re
from collections.abc import Callable, Iterable, Sequence

from pangu_sigma.report.run_data import Record

Points = list[tuple[int, float]]


def pick(records: Iterable[Record], value: Callable[[Record], object]) -> Points:
    """(step, value) of every record where `value` gives a number."""
    pairs = ((record["step"], value(record)) for record in records)
    return [(step, float(v)) for step, v in pairs if isinstance(v, int | float)]


def smooth(points: Points, span: float | None = None) -> Points:
    """Exponential moving average over about `span` points, by default a fortieth of the curve.

    Values that are not finite are left out. The weights of the first points are corrected for the missing past, so that
    the curve begins at its first value.
    """
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    keep = 1 - 2 / (1 + max(1.0, len(finite) / 40 if span is None else span))
    total, weight, smoothed = 0.0, 0.0, []
    for x, y in finite:
        total, weight = total * keep + y, weight * keep + 1
        smoothed.append((x, total / weight))
    return smoothed


def every(points: Points, limit: int = 240) -> Points:
    """At most about `limit` points at equal distance and the last one: enough for a curve that is smooth already."""
    size = max(1, math.ceil(len(points) / limit))
    return points[::size] + ([points[-1]] if points and (len(points) - 1) % size else [])


def last_quarter(records: Sequence[Record]) -> Sequence[Record]:
    """The last quarter of the records, at least one."""
    return records[-max(1, len(records) // 4) :]


def expert_loads(records: Sequence[Record]) -> dict[str, dict[str, list[int]]]:
    """Rows per expert (layer → domain → rows), summed over the last quarter of the records.

    Where a group's size changed (a run went on with another configuration) only the records of its last size count.
    """
    loads: dict[str, dict[str, list[int]]] = {}
    for record in last_quarter([r for r in records if r.get("expert_load")]):
        for layer, domains in record["expert_load"].items():
            for domain, rows in domains.items():
                before = loads.setdefault(layer, {}).get(domain, [])
                same = len(before) == len(rows)
                loads[layer][domain] = [a + b for a, b in zip(before, rows, strict=True)] if same else list(rows)
    return {layer: loads[layer] for layer in sorted(loads, key=_layer_order)}


def dropped_by_layer(records: Sequence[Record]) -> dict[str, Points]:
    """Dropped share of rows per sparse layer over the steps, the mean of its domains (0..1)."""
    curves: dict[str, Points] = {}
    for record in records:
        for layer, shares in (record.get("dropped_share") or {}).items():
            if shares:
                curves.setdefault(layer, []).append((record["step"], sum(shares.values()) / len(shares)))
    return {layer: curves[layer] for layer in sorted(curves, key=_layer_order)}


def _layer_order(layer: str) -> tuple[float, str]:
    """Blocks by number (the 2nd before the 10th), the query layer after them; a file may hold any name."""
    number = re.search(r"\d+", layer)
    return (int(number[0]) if number else math.inf, layer)
