"""Everything the report shows, read from a run's folder and checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pangu_sigma.errors import UserError
from pangu_sigma.monitor.metrics_log import FILE_NAME, read_metrics, restore_numbers
from pangu_sigma.monitor.result_files import read_json

Record = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """Held-out results of one step: losses in nats per token by domain; `matrix`: text domain → expert group → loss."""

    step: int
    losses: dict[str, float]
    unigram: dict[str, float]
    tokens: dict[str, int]
    matrix: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class RunData:
    """A run's records by kind, in order, and the files beside them; `config` is empty if there is no config.yaml."""

    name: str
    train: list[Record]
    evaluations: list[Evaluation]
    checkpoints: list[Record]
    events: list[Record]
    final: Evaluation | None
    summary: dict[str, Any]
    config: dict[str, Any]
    config_text: str
    analysis: dict[str, Any] | None = None

    @property
    def domains(self) -> list[str]:
        """Domain names: those of the configuration first, then others in the order in which they appear."""
        names = [d["name"] for d in self.config.get("domains") or [] if isinstance(d, dict) and "name" in d]
        for losses in [*(r.get("losses", {}) for r in self.train), *(e.losses for e in self.evaluations)]:
            names.extend(losses)
        names.extend(self.final.losses if self.final else ())
        return list(dict.fromkeys(map(str, names)))

    @property
    def last_step(self) -> int:
        """The highest step of any record."""
        steps = [r["step"] for r in (*self.train, *self.checkpoints, *self.events)] + [e.step for e in self.evaluations]
        return max(steps)

    @property
    def latest(self) -> Evaluation | None:
        """The newest held-out results: of `evaluation.json` unless the run evaluated later."""
        during = self.evaluations[-1] if self.evaluations else None
        if self.final and (during is None or self.final.step >= during.step):
            return self.final
        return during

    def setting(self, path: str) -> Any:
        """The configuration's value at a dotted path, None if it is not there."""
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value


def load_run(run_dir: Path) -> RunData:
    """Read `metrics.jsonl` and, where present, `evaluation.json`, `analysis.json`, `summary.json` and `config.yaml`.

    Raises UserError if the folder or its metrics are missing or empty, or if a file is damaged.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is no folder: give the folder of a run (run.dir in its configuration)")
    records = read_metrics(run_dir)
    if not records:
        raise UserError(
            f"{run_dir / FILE_NAME} holds no record yet: wait for the run's first step or choose another run"
        )
    config_text, config = _read_config(run_dir / "config.yaml")
    final_path = run_dir / "evaluation.json"
    final, summary, analysis = (
        restore_numbers(read_json(path)) for path in (final_path, run_dir / "summary.json", run_dir / "analysis.json")
    )
    source = str(run_dir / FILE_NAME)
    return RunData(
        name=run_dir.resolve().name,
        train=[_checked_train(r, source) for r in records if r["kind"] == "train"],
        evaluations=[_evaluation(r, source) for r in records if r["kind"] == "evaluate"],
        checkpoints=[r for r in records if r["kind"] == "checkpoint"],
        events=[r for r in records if r["kind"] == "event"],
        final=None if final is None else _evaluation(final, str(final_path)),
        summary=summary or {},
        config=config,
        config_text=config_text,
        analysis=analysis,
    )


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    import yaml

    try:
        text = path.read_bytes().decode()
        value = yaml.safe_load(text)
    except FileNotFoundError:
        return "", {}
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{path} is damaged (not YAML): restore it from a checkpoint of the run") from None
    return text, value if isinstance(value, dict) else {}


def _checked_train(record: Record, source: str) -> Record:
    where = f"{source}, train record of step {record['step']}"
    _numbers(record, "losses", where)
    _numbers(record, "tokens", where)
    for name in ("expert_load", "dropped_share"):
        if not _is_table(record.get(name, {}), list if name == "expert_load" else None):
            raise UserError(f"{where}: {name} is damaged; remove that line")
    return record


def _evaluation(record: Mapping[str, Any], source: str) -> Evaluation:
    step = record.get("step", 0)
    if type(step) is not int:
        raise UserError(f"{source}: step is not a whole number; delete the file and evaluate again")
    where = f"{source}, evaluation of step {step}"
    matrix = record.get("matrix") or {}
    if not _is_table(matrix, None):
        raise UserError(f"{where}: matrix is not a table of numbers; evaluate again")
    parts = {name: _numbers(record, name, where) for name in ("losses", "unigram", "tokens")}
    return Evaluation(step=step, matrix=matrix, **parts)


def _numbers(record: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    value = record.get(name) or {}
    if not isinstance(value, dict) or not all(map(_is_number, value.values())):
        raise UserError(f"{where}: {name} is not a number per domain; remove that record")
    return value


def _is_table(value: Any, cell: type | None) -> bool:
    if not isinstance(value, dict) or not all(isinstance(row, dict) for row in value.values()):
        return False
    cells = [c for row in value.values() for c in row.values()]
    if cell is list:
        return all(isinstance(c, list) and all(_is_number(n) and math.isfinite(n) for n in c) for c in cells)
    return all(map(_is_number, cells))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
