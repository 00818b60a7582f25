"""Extraction at the quickstart's end: cut out one domain, verify it, and sample from the sub-model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from extract.extraction_job import extract, plan
from extract.extraction_summary import summary_text
from pangu_sigma.checkpoint import folder_layout
from pangu_sigma.checkpoint.model_folder import check_output
from pangu_sigma.monitor.printable_text import printable_lines
from pangu_sigma.quickstart import Finished, write_samples
from pangu_sigma.trained_model import trained_from

FOLDER = "extracted"


def cut_out_and_show(finished: Finished, device: str) -> None:
    """Cut the first domain of a finished run into its folder, and print the verification and a sample."""
    domain, beginning = next(iter(finished.beginnings.items()))
    out = finished.folder / FOLDER / domain
    make_room(out)
    print(f"\n--- {domain}: cut out of the model\n")
    extracted = extract(plan(finished.folder, [domain], out), out, device=device)
    print(summary_text(extracted, _relative(out)))
    trained = trained_from(extracted.model)
    samples = write_samples(trained.model, trained.tokenizer, {domain: beginning})
    prompt, text = samples[domain]
    print(f"\n--- {domain}: the same beginning ▸ and what the sub-model writes on\n")
    print(printable_lines(f"{prompt}▸{text}"))


def make_room(out: Path) -> None:
    """A quickstart that is run again replaces what it cut out before; anything else in its place is refused."""
    state = out / folder_layout.STATE
    if state.is_file() and json.loads(state.read_text(encoding="utf-8")).get("origin", {}).get("job") == "extract":
        shutil.rmtree(out)
    check_output(out)


def _relative(out: Path) -> Path:
    """The folder as a user would type it."""
    return out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out
