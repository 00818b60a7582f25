"""Everything the report shows, read from a run's folder and checked."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, FiniteFloat, ValidationError

from pangu_sigma.config.load_config import read_values
from pangu_sigma.errors import UserError
from pangu_sigma.monitor.metrics_log import FILE_NAME, KINDS, read_metrics, restore_numbers
from pangu_sigma.monitor.printable_text import printable
from pangu_sigma.monitor.result_files import read_json

Record = dict[str, Any]
Numbers = dict[str, float]


class Evaluation(BaseModel, strict=True, frozen=True):
    """Held-out results of one step: losses in nats per token by domain; `matrix`: text domain → expert group → loss;
    `batches`: domain → how many were measured and how many there are."""

    step: int = 0
    losses: Numbers = {}
    unigram: Numbers = {}
    tokens: Numbers = {}
    matrix: dict[str, Numbers] = {}
    batches: dict[str, list[int]] = {}

    @property
    def gains(self) -> dict[str, float]:
        """How far each domain's loss lies under the unigram model's, in nats per token: positive is better."""
        return {name: self.unigram[name] - loss for name, loss in self.losses.items() if name in self.unigram}


class TrainTables(BaseModel, strict=True):
    """What a training record holds by name, as `TrainRecord` has it."""

    losses: Numbers = {}
    tokens: Numbers = {}
    expert_load: dict[str, dict[str, list[FiniteFloat]]] = {}
    dropped_share: dict[str, Numbers] = {}


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
        for losses in [*(r["losses"] for r in self.train), *(e.losses for e in self.evaluations)]:
            names.extend(losses)
        names.extend(self.final.losses if self.final else ())
        return list(dict.fromkeys(map(str, names)))

    @property
    def trained_tokens(self) -> Counter[str]:
        """Tokens that each domain gave to training."""
        total: Counter[str] = Counter()
        for record in self.train:
            total.update(record["tokens"])
        return total

    @property
    def last_step(self) -> int:
        """The highest step of any record."""
        steps = [r["step"] for r in (*self.train, *self.checkpoints, *self.events)] + [e.step for e in self.evaluations]
        return max(steps)

    @property
    def latest(self) -> Evaluation | None:
        """The newest held-out results; of one step those of most text, of equal ones those of `evaluation.json`."""
        results = [*([self.final] if self.final else []), *self.evaluations[-1:]]
        return max(results, key=lambda result: (result.step, sum(result.tokens.values())), default=None)

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
    train, evaluations, checkpoints, events = ([r for r in records if r["kind"] == kind] for kind in KINDS)
    where = f"{run_dir / FILE_NAME}, {{kind}} record of step {{step}}"
    return RunData(
        name=run_dir.resolve().name,
        train=[{**r, **vars(_checked(TrainTables, r, where))} for r in train],
        evaluations=[_checked(Evaluation, r, where) for r in evaluations],
        checkpoints=checkpoints,
        events=events,
        final=None if final is None else _checked(Evaluation, final, str(final_path)),
        summary=summary or {},
        config=config,
        config_text=config_text,
        analysis=analysis,
    )


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.exists():
        return "", {}
    values = read_values(path, "back what stood there, from a checkpoint of the run")
    return path.read_text(encoding="utf-8"), values


def _checked(model: type[BaseModel], record: Record, where: str) -> Any:
    """A record's fields as `model` has them. Raises UserError naming the first one that is damaged."""
    try:
        return model.model_validate({key: value for key, value in record.items() if value is not None})
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{where.format(**record)}: {printable(field)} is damaged; remove that record") from None
