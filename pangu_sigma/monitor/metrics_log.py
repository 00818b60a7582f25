"""The run's numbers on disk: `metrics.jsonl`, one JSON object per event, and the same scalars as TensorBoard files.

Every record has `kind` (`train`, `evaluate`, `checkpoint` or `event`) and `step`. JSON knows no infinities, so a value
that is not finite is written as the string "nan", "inf" or "-inf"; `read_metrics` turns those back into floats.
"""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pangu_sigma.errors import UserError, argument
from pangu_sigma.json_reader import parse_object
from pangu_sigma.monitor.progress import report
from pangu_sigma.monitor.result_files import atomic_file
from pangu_sigma.monitor.tensorboard_file import TensorBoardFile
from parallel.comm.plain_files import open_for_writing

FILE_NAME = "metrics.jsonl"
KINDS = ("train", "evaluate", "checkpoint", "event")
# A curve has one value per step; several events or checkpoints may belong to one.
_ONE_PER_STEP = ("train", "evaluate")
_TEXT_FIELDS = ("kind", "message", "path")
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """Records of `run_dir/metrics.jsonl` in the order they were written.

    Strings "nan", "inf" and "-inf" come back as floats. Of several `train` or `evaluate` records of one step (a step
    was evaluated again after a resume) only the last is returned. An unfinished last line, which a killed or a still
    writing run leaves, is passed over.

    Raises UserError if the file is missing or if a line other than the last is no record.
    """
    records = [record for _, record in _read_lines(Path(run_dir) / FILE_NAME)]
    last = {(r["kind"], r["step"]): i for i, r in enumerate(records) if r["kind"] in _ONE_PER_STEP}
    return [restore_numbers(r) for i, r in enumerate(records) if last.get((r["kind"], r["step"]), i) == i]


def copy_metrics(run_dir: Path, target: Path, step: int) -> None:
    """Copy a run's records up to `step` into the folder of a run that continues it; nothing where it has none.

    Raises UserError as `read_metrics`, and OSError.
    """
    if (run_dir / FILE_NAME).exists():
        _write_until(step, run_dir / FILE_NAME, target / FILE_NAME)


@dataclass(frozen=True, kw_only=True)
class TrainRecord:
    """One training record, written every `run.log_every` steps.

    `loss`, `losses` (nats per token or in what the run's objective counts, by domain), `tokens` (by domain),
    `expert_load` (layer → domain → rows per expert), `dropped_share` (layer → domain → share of rows, 0..1) and
    `seconds` cover the steps since the previous record, so that tokens may be summed over records. `skipped_steps`
    counts from the run's beginning. `experts` (stored in all sparse layers; activated and touched, i.e. updated, in a
    step) and `store` (bytes_to_step, bytes_from_step, bytes_read, bytes_written, update_seconds, all a step;
    prefetch_hit_rate, 0..1) tell what the expert store did. `figures`: means that the objective tells beside its loss,
    by name.
    """

    loss: float
    losses: Mapping[str, float]
    tokens: Mapping[str, int]
    learning_rate: float
    gradient_norm: float
    loss_scale: float | None = None
    tokens_per_second: float
    flops_per_second: float
    skipped_steps: int = 0
    expert_load: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict)
    dropped_share: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    auxiliary_loss: float | None = None
    experts: Mapping[str, float] = field(default_factory=dict)
    store: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    seconds: float


class NoMetrics:
    """Makes records and writes none: the log of a process for which another one speaks."""

    def train(self, step: int, **record: Any) -> None:
        """A `TrainRecord`."""
        self.write({"kind": "train", "step": step, **vars(TrainRecord(**record))})

    def evaluate(
        self,
        step: int,
        *,
        losses: Mapping[str, float],
        unigram: Mapping[str, float],
        tokens: Mapping[str, int],
        figures: Mapping[str, float] | None = None,
    ) -> None:
        """Held-out loss and the unigram model's loss (nats per token) and the number of held-out tokens, by domain;
        `figures`: means that the evaluator tells beside the loss, by name.
        """
        record = {"kind": "evaluate", "step": step, "losses": losses, "unigram": unigram, "tokens": tokens}
        self.write({**record, "figures": figures} if figures else record)

    def checkpoint(self, step: int, *, path: Path | str, **figures: float) -> None:
        """A finished save: its path from the run's folder, bytes_written anew, bytes_linked from the previous
        checkpoint, and its seconds."""
        self.write({"kind": "checkpoint", "step": step, "path": str(path), **figures})

    def event(self, step: int, message: str) -> None:
        """Anything worth a sentence: a resume, a skipped step, a new phase."""
        self.write({"kind": "event", "step": step, "message": message})

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record."""


class MetricsLog(NoMetrics):
    """Writes a run's records; a context manager that closes its files.

    `run_dir` is made if needed. `tensorboard` also writes scalars to `run_dir/tensorboard/`. `resume_step` is None for
    a new run, or the step of the checkpoint the run goes on from: records of later steps (from a run that was killed
    after that checkpoint) are then dropped, `dropped_lines` of them, so that no curve has two values for one step. A
    run that begins anew in its old folder passes -1, which drops everything.

    Raises UserError if `resume_step` is None and the folder already holds records, if an earlier line is damaged, if
    tensorboardX is missing, or if the disk is full.
    """

    def __init__(self, run_dir: Path | str, tensorboard: bool = False, resume_step: int | None = None) -> None:
        self.path = Path(run_dir) / FILE_NAME
        self.dropped_lines = 0
        self._tensorboard: TensorBoardFile | None = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size:
            if resume_step is None:
                raise UserError(
                    f"{self.path} already holds a run's metrics: go on with {argument('resume', True)}, or use another "
                    "run.dir"
                )
            self.dropped_lines = _write_until(resume_step, self.path, self.path)
        if tensorboard:
            self._tensorboard = TensorBoardFile(self.path.parent / "tensorboard", resume_step)
        self._descriptor: int | None = open_for_writing(self.path, append=True)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; `kind` and `step` are required. NumPy scalars and arrays are accepted as values.

        Raises ValueError for an unknown kind, a record without step or a closed log, and UserError if the disk is full.
        """
        if self._descriptor is None:
            raise ValueError(f"{self.path} is closed")
        if record.get("kind") not in KINDS:
            raise ValueError(f"a metrics record needs a kind of {KINDS}, not {record.get('kind')!r}")
        plain = _plain(record)
        if type(plain.get("step")) is not int:
            raise ValueError(f"a metrics record needs a whole number as step, not {record.get('step')!r}")
        self._append(json.dumps(plain, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        if self._tensorboard is not None:
            try:
                self._tensorboard.write(plain["step"], _scalars(record))
            except OSError as error:
                self._give_up_tensorboard(plain["step"], error)

    def close(self) -> None:
        """Flush and close both files; closing twice does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._tensorboard is not None:
            with suppress(OSError):  # what `metrics.jsonl` has too
                self._tensorboard.close()
            self._tensorboard = None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _give_up_tensorboard(self, step: int, error: OSError) -> None:
        """A training does not end, or wait, for what `metrics.jsonl` has too."""
        self._tensorboard = None
        folder = self.path.parent / "tensorboard"
        message = f"{folder} cannot be written ({error.strerror}): this run adds no more to it"
        report(message, logging.WARNING)
        self.event(step, message)

    def _append(self, line: bytes) -> None:
        # One system call per line: a killed process then leaves whole lines behind.
        size = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
        except OSError as error:
            reason = error.strerror
        else:
            if written == len(line):
                return
            os.ftruncate(self._descriptor, size)
            reason = "No space left on device"
        raise UserError(
            f"{self.path} cannot be written ({reason}): make room and go on with {argument('resume', True)}"
        )


def _read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """(line as it stands, record) for every line but an unfinished last one."""
    try:
        lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the folder of a run that has begun to train") from None
    records = []
    for line_number, line in enumerate(lines, start=1):
        try:
            record = parse_object(line)
            if record["kind"] not in KINDS or type(record["step"]) is not int:
                raise ValueError
        except (ValueError, TypeError, KeyError):
            if line_number == len(lines):
                break
            raise UserError(f"{path} is damaged: line {line_number} is no metrics record; remove that line") from None
        records.append((line, record))
    return records


def _write_until(step: int, source: Path, target: Path) -> int:
    """Write the records of `source` up to `step` to `target` in one rename. Returns the number of lines left out."""
    total = len(source.read_bytes().splitlines())
    kept = [line for line, record in _read_lines(source) if record["step"] <= step]
    with atomic_file(target) as temporary, open(temporary, "wb") as file:
        file.writelines(line + b"\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    return total - len(kept)


def _plain(value: Any) -> Any:
    """The value in JSON's own types; what is not finite becomes a string."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Sequence):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, without importing NumPy
        return _plain(value.tolist())
    raise ValueError(f"a metrics record cannot hold a {type(value).__name__}")


def restore_numbers(value: Any, field: str = "") -> Any:
    """Strings "nan", "inf", "-inf" anywhere in the value as floats again, except in fields that hold text."""
    if isinstance(value, dict):
        return {k: restore_numbers(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [restore_numbers(v) for v in value]
    if isinstance(value, str) and field not in _TEXT_FIELDS:
        return _NON_FINITE.get(value, value)
    return value


def _scalars(record: Mapping[str, Any]):
    """(name, value) pairs for TensorBoard; an expert load becomes its busiest expert's rows over the mean."""
    if record["kind"] == "train":
        for name, value in record.items():
            if name not in ("kind", "step") and not isinstance(value, Mapping) and value is not None:
                yield f"train/{name}", value
        for domain, value in record.get("losses", {}).items():
            yield f"train_loss/{domain}", value
        for name, value in record.get("figures", {}).items():
            yield f"train/{name}", value
        for layer, domains in record.get("expert_load", {}).items():
            for domain, rows in domains.items():
                if sum(rows):
                    yield f"expert_load_max_over_mean/{layer}/{domain}", max(rows) * len(rows) / sum(rows)
        for layer, domains in record.get("dropped_share", {}).items():
            for domain, value in domains.items():
                yield f"dropped_share/{layer}/{domain}", value
    elif record["kind"] == "evaluate":
        for domain, value in record.get("losses", {}).items():
            yield f"validation_loss/{domain}", value
        for name, value in record.get("figures", {}).items():
            yield f"validation/{name}", value
    elif record["kind"] == "checkpoint":
        for name in ("bytes_written", "bytes_linked", "seconds"):
            yield f"checkpoint/{name}", record[name]
