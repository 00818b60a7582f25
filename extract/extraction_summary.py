"""Summary of an extraction for people: what was written, and whether it was verified."""

from __future__ import annotations

from pathlib import Path

from extract.extraction_job import Extraction
from pangu_sigma.config import parameter_counts
from pangu_sigma.trained_model import stored_config


def summary_text(extracted: Extraction, out: Path) -> str:
    """What was written; `out` is the folder as the user wrote it."""
    plan = extracted.cut
    parent = parameter_counts(stored_config(plan.parent), plan.config.model.vocab_size).total
    verification = extracted.verification.line() if extracted.verification else "not verified"
    return "\n".join(
        [
            f"{out}: {', '.join(plan.domains)}, {extracted.num_parameters:,} of {parent:,} parameters, "
            f"{extracted.bytes_written:,} bytes",
            verification[0].upper() + verification[1:],
        ]
    )
