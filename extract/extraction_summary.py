"""Summary of an extraction: what was written, whether it was verified, and what to do with it; as JSON and as text."""

from __future__ import annotations

import shlex
from pathlib import Path

from extract.extraction_job import Extraction
from pangu_sigma.config import parameter_counts
from pangu_sigma.trained_model import stored_config


def summary(extracted: Extraction) -> dict[str, object]:
    """The figures of an extraction for scripts: path, domains, parameters, bytes and the verification."""
    plan = extracted.cut
    return {
        "path": str(extracted.model.path),
        "domains": list(plan.domains),
        "parameters": parameter_counts(plan.config, plan.config.model.vocab_size).total,
        "bytes": extracted.bytes_written,
        "verification": extracted.verification and extracted.verification.to_dict(),
    }


def summary_text(extracted: Extraction, out: Path) -> str:
    """The same for people, with the commands to try next; `out` is the folder as the user wrote it."""
    plan, figures = extracted.cut, summary(extracted)
    parent = parameter_counts(stored_config(plan.parent), plan.config.model.vocab_size).total
    verification = extracted.verification.line() if extracted.verification else "not verified"
    example = f" --domain {plan.domains[0]}" if len(plan.domains) > 1 else ""
    return "\n".join(
        [
            f"{out}: {', '.join(plan.domains)}, {figures['parameters']:,} of {parent:,} parameters, "
            f"{figures['bytes']:,} bytes",
            verification[0].upper() + verification[1:],
            f'Try it:      pangu-sigma generate {shlex.quote(str(out))}{example} --prompt "…"',
            f"Continue it: {continue_command(out)}",
        ]
    )


def continue_command(out: Path) -> str:
    """The command line that trains a sub-model on, in a run folder of its own."""
    config, start = shlex.quote(f"{out}/config.yaml"), shlex.quote(f"run.init_from={out}")
    return f"pangu-sigma train {config} {start}"
