"""Summary of an extraction for people: what was written, whether it was verified, and what to do with it."""

from __future__ import annotations

import shlex
from pathlib import Path

from extract.extraction_job import Extraction
from pangu_sigma.config import parameter_counts
from pangu_sigma.trained_model import stored_config


def summary_text(extracted: Extraction, out: Path) -> str:
    """What was written, with the commands to try next; `out` is the folder as the user wrote it."""
    plan = extracted.cut
    parent = parameter_counts(stored_config(plan.parent), plan.config.model.vocab_size).total
    verification = extracted.verification.line() if extracted.verification else "not verified"
    example = f" --domain {plan.domains[0]}" if len(plan.domains) > 1 else ""
    return "\n".join(
        [
            f"{out}: {', '.join(plan.domains)}, {extracted.num_parameters:,} of {parent:,} parameters, "
            f"{extracted.bytes_written:,} bytes",
            verification[0].upper() + verification[1:],
            f'Try it:      pangu-sigma generate {shlex.quote(str(out))}{example} --prompt "…"',
            f"Continue it: {continue_command(out)}",
        ]
    )


def continue_command(out: Path) -> str:
    """The command line that trains a sub-model on, in a run folder of its own."""
    config, start = shlex.quote(f"{out}/config.yaml"), shlex.quote(f"run.init_from={out}")
    return f"pangu-sigma train {config} {start}"
