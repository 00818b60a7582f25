"""Evaluation of a trained model per domain, in one process or several."""

from __future__ import annotations

import json
from pathlib import Path

from pangu_sigma.errors import UserError
from pangu_sigma.evaluation.evaluation_result import DomainEvaluation
from pangu_sigma.workers import is_worker, launch_on_model, launched_size


def evaluate(path: str | Path, batches: int | None = None, workers: int = 1) -> DomainEvaluation | None:
    """Measure a run's, checkpoint's or model folder's model on its domains' held-out text; a run keeps the result.

    batches: per text and group, 0 for all; what `evaluate.batches` says if left out. workers: processes of this machine
    that share the work; None comes back in all of them but the first. Raises UserError for anything wrong with `path`.
    """
    path = Path(path)
    if workers < 1:
        raise UserError(f"workers is {workers}: give at least 1")
    if workers > 1 and not is_worker():
        limit = [] if batches is None else ["--batches", str(batches)]
        return DomainEvaluation(**json.loads(launch_on_model(["evaluate", str(path), "--json", *limit], workers, path)))
    from pangu_sigma.evaluation.domain_evaluation import measure_checkpoint

    return measure_checkpoint(path, batches, launched_size())
