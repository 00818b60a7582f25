"""Tables and heat map of the lifelong benchmark, from whatever runs are finished."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.lifelong_systems import QUICK_STAGES
from benchmarks.record import sentence
from pangu_sigma.lifelong.loss_heat_map import Panel
from pangu_sigma.monitor.printable_text import compact, duration

Seed = dict[str, Any]
FROZEN, TRAINED, OWN_WORDS = "rre_frozen", "rre_trained", "rre_own"


def results_name(record: dict) -> str:
    """The name of the files that the record is written to."""
    return "lifelong_quick" if record["quick"] else "lifelong"


def page(record: dict) -> str:
    """The whole record as Markdown."""
    systems, domains = record["systems"], record["domains"]
    lines = [
        "# Four domains, one after another",
        "",
        f"Written by `python -m benchmarks.lifelong{' --quick' if record['quick'] else ''}`; every figure is in "
        f"`{results_name(record)}.json`. {record['finished']} of "
        f"{record['runs']} runs are finished.",
        "",
    ]
    if record["small"]:
        lines += ["**A model this small only shows that everything runs: compare nothing.**", ""]
    if not systems:
        return "\n".join([*lines, "Nothing is finished yet.", ""])
    lines += [systems_table(record), "", _how(record), ""]
    lines += ["## Loss of every domain at the end (right after it was learned)", "", domains_table(record), ""]
    if (entry := systems.get(FROZEN)) is not None:
        lines += ["## What frozen shared parameters keep, and what they cost", "", frozen_text(record), ""]
        if not record["quick"]:
            lines += ["## Inferring the domain of a text", "", inference_table(entry, domains), ""]
        lines += ["## Properties of RRE with shared parameters frozen", "", properties_table(entry), ""]
    lines += [f"![Loss of every domain after every stage]({results_name(record)}.svg)", ""]
    lines += [sentence(record["machine"]), ""]
    return "\n".join(lines)


def systems_table(record: dict) -> str:
    """A row per system: parameters, mean loss at the end, forgetting, transfer, new domains' loss, time."""
    header = ["system", "parameters", "a token meets", "loss at the end", "forgetting", "backward transfer",
              "forward transfer", "new domains right after", "a domain adds", "training"]  # fmt: skip
    rows = []
    for entry in record["systems"].values():
        seeds = list(entry["seeds"].values())
        last = seeds[0]["costs"][-1]["parameters"]
        seconds = statistics.mean(sum(cost["seconds"] for cost in seed["costs"]) for seed in seeds)
        rows.append(
            [
                entry["title"],
                compact(last["total"]),
                compact(last["active"]),
                spread([seed["measures"]["final_loss"]["mean"] for seed in seeds]),
                *(_measure(seeds, name) for name in ("forgetting", "backward_transfer", "forward_transfer")),
                "–" if entry["joint"] else spread([new_domains(seed) for seed in seeds]),
                "–" if entry["joint"] or "floors" not in seeds[0] else _added(seeds[0]),
                duration(seconds),
            ]
        )
    return markdown(header, rows)


def domains_table(record: dict) -> str:
    """A row per system, a column per domain: loss at the end, in brackets right after learning; mean over the seeds."""
    floors = next(iter(next(iter(record["systems"].values()))["seeds"].values())).get("floors")
    rows = []
    if floors is not None:
        rows.append(["a count of each domain's tokens", *(f"{floor['unigram']:.3f}" for floor in floors)])
    for entry in record["systems"].values():
        seeds = list(entry["seeds"].values())
        cells = []
        for column, name in enumerate(record["domains"]):
            end = statistics.mean(seed["matrix"][-1][column] for seed in seeds)
            learned = statistics.mean(seed["matrix"][seed["learned"][name]][column] for seed in seeds)
            cells.append(f"{end:.3f}" if entry["joint"] else f"{end:.3f} ({learned:.3f})")
        rows.append([entry["title"], *cells])
    return markdown(["system", *record["domains"]], rows)


def frozen_text(record: dict) -> str:
    """Whether RRE with shared parameters frozen forgot anything at all, and what the new domains pay for it."""
    seeds = list(record["systems"][FROZEN]["seeds"].values())
    changes = [value for seed in seeds for value in seed["measures"]["forgetting"]["by_domain"].values()]
    largest = max(changes, key=abs)
    if largest == 0.0:
        kept = f"Forgetting is exactly 0.000 on every earlier domain ({len(changes)} figures of {len(seeds)} runs)"
    else:
        kept = f"**Forgetting is not 0**: it reaches {largest:+.6f} nats per token"
    price = _price(record, FROZEN)
    words = ""
    if OWN_WORDS in record["systems"]:
        own = _price(record, OWN_WORDS)
        words = f" With words of its own for each domain, the shared parameters frozen too, it is {own:.3f}."
    other = record["systems"].get(TRAINED)
    if other is None:
        return f"{kept}. The new domains' loss right after learning is {price:.3f}.{words}"
    trained = _price(record, TRAINED)
    lost = statistics.mean(seed["measures"]["forgetting"]["mean"] for seed in other["seeds"].values())
    return (
        f"{kept}. The price is in the new domains: right after learning their loss is {price:.3f}, "
        f"{price - trained:+.3f} against {trained:.3f} where the shared parameters train on, which forgets {lost:.3f}."
        + words
    )


def inference_table(entry: dict, domains: Sequence[str]) -> str:
    """A row per domain: how often it is inferred after so many tokens, loss with it inferred and given."""
    seeds = list(entry["seeds"].values())
    after = list(seeds[0]["rows"][-1][domains[0]]["accuracy"])
    rows = []
    for name in domains:
        last = [seed["rows"][-1][name] for seed in seeds]
        shares = [_mean([row["accuracy"][n] for row in last if row["accuracy"][n] is not None]) for n in after]
        given, auto = (statistics.mean(row[key] for row in last) for key in ("loss", "auto"))
        cells = ["–" if math.isnan(share) else f"{100 * share:.1f} %" for share in shares]
        rows.append([name, *cells, f"{given:.3f}", f"{auto:.3f}", f"{given - auto:+.3f}"])
    header = ["domain", *(f"right after {n} tokens" for n in after), "loss, domain given", "inferred", "gain"]
    return markdown(header, rows)


def properties_table(entry: dict) -> str:
    """The property table of the first seed."""
    first = next(iter(entry["seeds"].values()))
    rows = [[result["name"], result["holds"], result["number"]] for result in first["properties"]]
    return markdown(["property", "holds", "by what number (first seed)"], rows)


def panels(record: dict) -> list[Panel]:
    """A heat map's panel per system, mean over its seeds, all of one colour scale."""
    systems, domains = record["systems"], record["domains"]
    matrices = {name: _mean_matrix(entry, domains) for name, entry in systems.items()}
    if not matrices:
        return []
    lowest = np.min([np.nanmin(matrix, axis=0) for matrix in matrices.values()], axis=0)
    # Of a domain that the untrained model was not measured on, the highest loss there is.
    untrained = [np.where(np.isnan(m[0]), np.nanmax(m, axis=0), m[0]) for m in matrices.values()]
    highest = np.max(untrained, axis=0)
    return [
        Panel(
            matrix,
            ["untrained", *next(iter(systems[name]["seeds"].values()))["stages"]],
            next(iter(systems[name]["seeds"].values()))["learned"],
            systems[name]["title"],
            lowest,
            highest,
        )
        for name, matrix in matrices.items()
    ]


def new_domains(seed: Seed) -> float:
    """Mean loss, right after learning, of the domains that came after the first stage."""
    later = {name: row for name, row in seed["learned"].items() if row}
    return statistics.mean(seed["matrix"][row][seed["domains"].index(name)] for name, row in later.items())


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds, the mean alone of one."""
    mean = statistics.mean(values)
    return f"{mean:.3f}" if len(values) < 2 else f"{mean:.3f} ± {statistics.stdev(values):.3f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _measure(seeds: Sequence[Seed], name: str) -> str:
    values = [seed["measures"][name]["mean"] for seed in seeds]
    return "–" if None in values else spread(values)


def _added(seed: Seed) -> str:
    last = seed["floors"][-1]
    return f"{compact(last['parameters'])} ({compact(last['bytes'])}B)" if last["parameters"] else "–"


def _price(record: dict, name: str) -> float:
    return statistics.mean(new_domains(seed) for seed in record["systems"][name]["seeds"].values())


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(values) if values else math.nan


def _mean_matrix(entry: dict, domains: Sequence[str]) -> np.ndarray:
    def matrix(seed: Seed) -> list[list[float]]:
        return [[row[name]["loss"] for name in domains] for row in (seed["untrained"], *seed["rows"])]

    return np.mean(np.array([matrix(seed) for seed in entry["seeds"].values()], np.float64), axis=0)


def _how(record: dict) -> str:
    seed = next(iter(next(iter(record["systems"].values()))["seeds"].values()))
    tokens = sum(cost["tokens"] for cost in seed["costs"])
    order = " → ".join([" + ".join(names) for names in QUICK_STAGES] if record["quick"] else record["domains"])
    return (
        f"Nats per token on held-out text, mean and standard deviation over the seeds that are finished. "
        f"{compact(tokens)} tokens in all, an equal part of each domain, in the order {order}; "
        "the learning rate begins anew with every stage. Vocabulary and held-out text are the same everywhere. "
        "Forgetting: a domain's best loss after any earlier stage against the end (0: nothing). Backward transfer: "
        "right after learning against the end (higher is better). Forward transfer: the untrained model against just "
        "before the domain's stage (higher is better; RRE infers whose experts read it). Training: the steps alone, by "
        "the clock, with other runs beside: a rough figure."
    )
