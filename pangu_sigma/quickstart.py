"""The quickstart: train, measure every domain under every expert group, write a sample per domain, draw the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pangu_sigma.config import Config
from pangu_sigma.config.mesh_rules import check_one_process
from pangu_sigma.errors import UserError
from pangu_sigma.monitor.metrics_log import read_metrics
from pangu_sigma.monitor.printable_text import printable_lines
from pangu_sigma.monitor.progress import progress
from pangu_sigma.monitor.result_files import write_json
from pangu_sigma.monitor.text_tables import matrix_table, quality_table

PROMPT_TOKENS = 16
SAMPLE_TOKENS = 48


@dataclass(frozen=True)
class Finished:
    """A quickstart that came to its end: the run's folder, and domain -> ids of a held-out beginning."""

    folder: Path
    beginnings: dict[str, tuple[int, ...]]


def quickstart(config: Config) -> Finished | None:
    """Run the whole job in one process and print what came of it; a run that was interrupted continues.

    Returns None if it was interrupted again.
    """
    from pangu_sigma.evaluation.domain_evaluation import measure_with_progress
    from pangu_sigma.report import write_report
    from pangu_sigma.training.job import open_run

    if config.data.heldout_fraction == 0:
        raise UserError("the quickstart measures on held-out text, and data.heldout_fraction is 0: hold some out")
    check_one_process(config, "run it with `pangu-sigma train … --workers`, or set parallel={}")
    folder = Path(config.run.dir)
    with open_run(config, resume=(folder / "checkpoints").is_dir()) as run:
        step = run.train().step
        if step < config.train.steps:
            print(f"stopped at step {step} of {config.train.steps}; the same command continues")
            return None
        measured = run.evaluation
        result = measure_with_progress(measured.evaluator, measured.sequences, measured.unigram, step)
        write_json(folder / "evaluation.json", result.to_dict())
        beginnings = _beginnings(run)
        samples = write_samples(run.model, run.corpus.tokenizer, beginnings)
    before = next((r["losses"] for r in read_metrics(folder) if r["kind"] == "evaluate" and r["step"] == 0), None)
    print("\nHeld-out loss in nats per token\n")
    print(quality_table(result.unigram, result.losses, before, result.tokens))
    print("\nLoss of a domain's text (row) under a domain's experts (column)\n")
    print(matrix_table(result.matrix))
    for domain, (prompt, text) in samples.items():
        print(f"\n--- {domain}: a held-out beginning ▸ and what the model writes on\n")
        print(printable_lines(f"{prompt}▸{text}"))
    print(f"\nReport: {write_report(folder)}")
    print(f"Run:    {folder}")
    return Finished(folder, beginnings)


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
