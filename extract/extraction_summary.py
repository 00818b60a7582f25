"""Summary of an extraction for people: what was written, and whether it was verified."""

from __future__ import annotations

from pathlib import Path

from extract.extraction_job import Extraction


def summary_text(extracted: Extraction, out: Path) -> str:
    """What was written; `out` is the folder as the user wrote it."""
    verification = extracted.verification.line() if extracted.verification else "not verified"
    return "\n".join(
        [
            f"{out}: {', '.join(extracted.domains)}, {extracted.num_parameters:,} of {extracted.parent_parameters:,} "
            f"parameters, {extracted.bytes_written:,} bytes",
            verification[0].upper() + verification[1:],
        ]
    )
