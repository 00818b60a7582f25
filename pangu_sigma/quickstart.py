"""The quickstart: train, measure every domain under every expert group, write a sample per domain, draw the report."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pangu_sigma.config import Config
from pangu_sigma.config.mesh_rules import check_one_process
from pangu_sigma.errors import UserError
from pangu_sigma.evaluation.evaluation_result import DomainEvaluation
from pangu_sigma.monitor.metrics_log import read_metrics
from pangu_sigma.monitor.progress import progress
from pangu_sigma.monitor.result_files import write_json

PROMPT_TOKENS = 16
SAMPLE_TOKENS = 48


@dataclass(frozen=True)
class Quickstart:
    """What a quickstart came to.

    step, steps: done and planned; where they differ, or a `stop_signal` came, it was interrupted and there is nothing
    else. before: held-out
    losses of the untrained model, in nats per token. beginnings: domain -> ids of a held-out beginning. samples: domain
    -> (its beginning, the model's continuation). report: the HTML file.
    """

    folder: Path
    step: int
    steps: int
    evaluation: DomainEvaluation | None = None
    before: dict[str, float] | None = None
    beginnings: dict[str, tuple[int, ...]] = field(default_factory=dict)
    samples: dict[str, tuple[str, str]] = field(default_factory=dict)
    report: Path | None = None
    stop_signal: signal.Signals | None = None


def quickstart(config: Config) -> Quickstart:
    """Run the whole job in one process; a run that was interrupted continues. Raises UserError."""
    from pangu_sigma.evaluation.domain_evaluation import measure_with_progress
    from pangu_sigma.report import write_report
    from pangu_sigma.training.job import open_run

    if config.data.heldout_fraction == 0:
        raise UserError("the quickstart measures on held-out text, and data.heldout_fraction is 0: hold some out")
    check_one_process(config, "run it with `pangu-sigma train`, or set parallel={}")
    folder, steps = Path(config.run.dir), config.train.steps
    with open_run(config, resume=(folder / "checkpoints").is_dir()) as run:
        step = run.train().step
        if step < steps or run.stop_signal is not None:
            return Quickstart(folder, step, steps, stop_signal=run.stop_signal)
        measured = run.evaluation
        result = measure_with_progress(measured.evaluator, measured.sequences, measured.unigram, step)
        write_json(folder / "evaluation.json", result.to_dict())
        beginnings = _beginnings(run)
        samples = write_samples(run.model, run.corpus.tokenizer, beginnings)
    before = next((r["losses"] for r in read_metrics(folder) if r["kind"] == "evaluate" and r["step"] == 0), None)
    return Quickstart(folder, step, steps, result, before, beginnings, samples, write_report(folder))


def _beginnings(run) -> dict[str, tuple[int, ...]]:
    # Held-out text begins with an end-of-document token, as every document does in training. Half the window is
    # left to write in.
    tokens = min(PROMPT_TOKENS, run.config.data.sequence_length // 2)
    return {
        domain: tuple(int(i) for i in heldout.sequence(0)[0][: tokens + 1])
        for domain, heldout in run.evaluation.sequences.items()
    }


def write_samples(model, tokenizer, beginnings: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, str]]:
    """domain -> (its beginning, the model's continuation), drawn with the same seed for a domain in every model."""
    from pangu_sigma.generation import Request, Sampling
    from pangu_sigma.generation.completion import complete
    from pangu_sigma.generation.engine import Engine

    seed = model.config.run.seed
    requests = [
        Request(ids, domain, Sampling(SAMPLE_TOKENS, temperature=0.7, top_k=40, seed=seed))
        for domain, ids in beginnings.items()
    ]
    engine = Engine(model, tokenizer, slots=len(requests))
    with progress("sample", len(requests) * SAMPLE_TOKENS, unit="tokens") as job:
        answers = complete(engine, requests, lambda *_: job.advance(1), keep_going=True)
        job.set(len(requests) * SAMPLE_TOKENS)
    return {
        domain: (tokenizer.decode(ids), answer.text if answer.error is None else f"({answer.error})")
        for (domain, ids), answer in zip(beginnings.items(), answers, strict=True)
    }
