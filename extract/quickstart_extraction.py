"""Extraction at the quickstart's end: cut out one domain, verify it, and sample from the sub-model."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from extract.extraction_job import Extraction, extract, plan
from pangu_sigma.checkpoint import CheckpointError, open_checkpoint
from pangu_sigma.checkpoint.model_folder import check_output
from pangu_sigma.quickstart import Quickstart, write_samples
from pangu_sigma.trained_model import trained_from

FOLDER = "extracted"


def cut_out_first(done: Quickstart, device: str) -> tuple[Extraction, tuple[str, str]]:
    """Cut the first domain of a quickstart into its folder: (the extraction, (its beginning, its continuation))."""
    domain, beginning = next(iter(done.beginnings.items()))
    out = done.folder / FOLDER / domain
    make_room(out)
    extraction = extract(plan(done.folder, [domain], out), out, device=device)
    trained = trained_from(extraction.model)
    return extraction, write_samples(trained.model, trained.tokenizer, {domain: beginning})[domain]


def make_room(out: Path) -> None:
    """A quickstart that is run again replaces what it cut out before; anything else in its place is refused."""
    with suppress(CheckpointError):  # what is no whole model is not ours to delete
        origin = open_checkpoint(out).state.get("origin")
        if isinstance(origin, dict) and origin.get("job") == "extract":
            shutil.rmtree(out)
    check_output(out)
