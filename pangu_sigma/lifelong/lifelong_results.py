"""What a lifelong measurement found: matrix, measures, costs; as JSON, CSV and tables."""

from __future__ import annotations

import csv
import io
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pangu_sigma.lifelong import forgetting_measures
from pangu_sigma.lifelong.domain_floors import HEADER as FLOORS
from pangu_sigma.lifelong.domain_floors import DomainFloor, domain_floors
from pangu_sigma.lifelong.forgetting_measures import Measure
from pangu_sigma.lifelong.loss_heat_map import Panel
from pangu_sigma.lifelong.property_table import Property, properties
from pangu_sigma.monitor.printable_text import compact, duration
from pangu_sigma.monitor.text_tables import number, text_table

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Results:
    """Everything measured so far.

    plan: `Plan.to_dict`. learned: domain -> number of the stage that learns it first. untrained and each of `rows` (one
    per finished stage): domain -> {"loss", "how", "auto", "accuracy", "tokens"} (see `matrix_row`). costs and
    learning: per finished stage, see `stage_cost`. by_domain: whether a text is read by the experts of its domain.
    unigram, heldout_bytes, domain_costs: by domain, the loss of a unigram model and the bytes of the text that is
    measured, and what the last model has for the domain alone (`stage_cost.domain_costs`). stop_signal: the signal at
    which a stage saved and stopped, None if none came.
    """

    plan: Mapping[str, Any]
    learned: Mapping[str, int | None]
    by_domain: bool
    untrained: Mapping[str, Mapping[str, Any]]
    rows: Sequence[Mapping[str, Mapping[str, Any]]]
    costs: Sequence[Mapping[str, Any]]
    learning: Sequence[Mapping[str, Mapping[str, Any]]]
    unigram: Mapping[str, float]
    heldout_bytes: Mapping[str, int]
    domain_costs: Mapping[str, Mapping[str, int]]
    stop_signal: signal.Signals | None = None

    @property
    def domains(self) -> list[str]:
        """The domains in the configuration's order."""
        return list(self.learned)

    @property
    def stages(self) -> list[str]:
        """Names of the finished stages."""
        return [stage["name"] for stage in self.plan["stages"][: len(self.rows)]]

    @property
    def complete(self) -> bool:
        """Whether every stage of the plan is finished."""
        return len(self.rows) == len(self.plan["stages"])

    @property
    def losses(self) -> np.ndarray:
        """Nats per token [finished stages, domains], NaN where nothing was measured."""
        return np.array([[row[name]["loss"] for name in self.domains] for row in self.rows], np.float64)

    @property
    def measures(self) -> dict[str, Measure]:
        """backward_transfer, forgetting, forward_transfer, learned_loss, final_loss; of the finished stages."""
        if not self.rows:
            return {}
        done = len(self.rows)
        learned = [
            learned_at if learned_at is not None and learned_at < done else None for learned_at in self.learned.values()
        ]
        untrained = np.array([self.untrained[name]["loss"] for name in self.domains], np.float64)
        return {
            "backward_transfer": forgetting_measures.backward_transfer(self.losses, learned),
            "forgetting": forgetting_measures.forgetting(self.losses, learned),
            "forward_transfer": forgetting_measures.forward_transfer(self.losses, untrained, learned),
            "learned_loss": forgetting_measures.learned_loss(self.losses, learned),
            "final_loss": forgetting_measures.final_loss(self.losses, learned),
        }

    @property
    def properties(self) -> list[Property]:
        """The property table, each with the number that supports it; empty before the first stage is finished."""
        if not self.rows:
            return []
        return properties(self.domains, self.measures, self.rows[-1], self.costs, self.learning, self.by_domain)

    @property
    def floors(self) -> list[DomainFloor]:
        """Every domain beside its unigram model."""
        return domain_floors(self.learned, self.rows, self.unigram, self.heldout_bytes, self.domain_costs)

    @property
    def warnings(self) -> list[str]:
        """A sentence for every learned domain that ends above its unigram model."""
        return [floor.warning for floor in self.floors if floor.warning is not None]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        named = {
            name: {"mean": result.mean, "by_domain": {self.domains[j]: v for j, v in result.by_domain.items()}}
            for name, result in self.measures.items()
        }
        return {
            "format_version": FORMAT_VERSION,
            "complete": self.complete,
            "domains": self.domains,
            "learned": dict(self.learned),
            "by_domain": self.by_domain,
            "stages": self.stages,
            "matrix": [[row[name]["loss"] for name in self.domains] for row in self.rows],
            "measures": named,
            "properties": [vars(result) for result in self.properties],
            "floors": [vars(floor) for floor in self.floors],
            "warnings": self.warnings,
            "untrained": self.untrained,
            "rows": list(self.rows),
            "costs": list(self.costs),
            "learning": list(self.learning),
            "plan": self.plan,
        }

    def csv(self) -> str:
        """One line per stage (0: untrained) and domain: stage, name, domain, learned, how, loss, auto, tokens."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["stage", "name", "domain", "learned", "how", "loss", "auto", "tokens"])
        for stage, (name, row) in enumerate(self.named_rows()):
            for domain, learned_at in self.learned.items():
                result = row[domain]
                seen = int(learned_at is not None and learned_at < stage)
                loss, auto = ("" if result[key] is None else repr(result[key]) for key in ("loss", "auto"))
                writer.writerow([stage, name, domain, seen, result["how"], loss, auto, result["tokens"]])
        return out.getvalue()

    def measure_rows(self) -> list[list[str]]:
        """Every measure's name, mean and part of each domain, as text."""
        rows = []
        for name, result in self.measures.items():
            signed = name not in ("learned_loss", "final_loss")
            each = [number(result.by_domain.get(j), sign=signed) for j in range(len(self.domains))]
            rows.append([name.replace("_", " "), number(result.mean, sign=signed), *each])
        return rows

    def cost_rows(self, with_moments: bool) -> list[list[str]]:
        """Every finished stage's name and what it cost, as text: steps, tokens, time, parameters (in all, new, trained,
        active), bytes of the model, `with_moments` of it and its moments, and written anew."""
        rows = []
        for name, cost in zip(self.stages, self.costs, strict=True):
            seconds = cost["seconds"]
            time = "–" if seconds is None else duration(seconds)
            parameters = [compact(cost["parameters"][key]) for key in ("total", "new", "trained", "active")]
            sizes = ("model", *(("with_optimizer",) if with_moments else ()), "written")
            stored = [f"{compact(cost['bytes'][key])}B" for key in sizes]
            rows.append([name, f"{cost['steps']:,}", compact(cost["tokens"]), time, *parameters, *stored])
        return rows

    @property
    def panel(self) -> Panel:
        """The matrix for `heat_map`."""
        rows = self.named_rows()
        losses = np.array([[row[name]["loss"] for name in self.domains] for _, row in rows], np.float64)
        return Panel(losses, [name for name, _ in rows], self.learned)

    def named_rows(self) -> list[tuple[str, Mapping[str, Mapping[str, Any]]]]:
        """(name, row) of the untrained model and of every finished stage."""
        return [("untrained", self.untrained), *zip(self.stages, self.rows, strict=True)]


def as_text(results: Results, folder: Path) -> str:
    """Everything for the terminal; `folder` is the measurement's."""
    parts = ["Held-out loss in nats per token", matrix_text(results)]
    if results.rows:
        measures = text_table(["nats per token", "mean", *results.domains], results.measure_rows())
        header = ["stage", "steps", "tokens", "time", "parameters", "new", "trained", "active", "model", "written"]
        costs = text_table(header, results.cost_rows(with_moments=False))
        holds = [[result.name, result.holds, result.number] for result in results.properties]
        properties_text = text_table(["property", "holds", "by what number"], holds, left=3)
        beside = text_table(FLOORS, [floor.row() for floor in results.floors])
        parts += ["Transfer and forgetting", measures, "Every domain beside a count of its tokens", beside]
        parts += [f"Warning: {sentence}" for sentence in results.warnings]
        parts += ["What every stage cost", costs]
        parts += ["Lifelong-learning properties", properties_text, f"Page: {folder / 'report.html'}"]
    if not results.complete:
        stages = results.plan["stages"]
        stage_index = len(results.rows)
        parts.append(
            f"stopped in stage {stage_index + 1} ({stages[stage_index]['name']}) of {len(stages)}; "
            "the same command continues"
        )
    return "\n\n".join(parts)


def matrix_text(results: Results) -> str:
    """The matrix as an aligned table; a loss in brackets is of a domain that was not learned yet."""
    rows = []
    for stage, (name, row) in enumerate(results.named_rows()):
        cells = []
        for domain, learned_at in results.learned.items():
            loss = number(row[domain]["loss"])
            cells.append(f"{loss} " if learned_at is not None and learned_at < stage else f"({loss})")
        rows.append([name, *cells])
    return text_table(["after stage \\ loss of", *results.domains], rows) + "\n(…) not learned yet"
