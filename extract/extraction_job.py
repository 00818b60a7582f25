"""The extraction job: plan, copy, verify, name the folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from extract.extraction_plan import ExtractionPlan, choose_domains
from extract.sub_model_card import measured, model_card
from extract.verify_sub_model import Verification, raise_if_different, verify
from pangu_sigma.checkpoint import Checkpoint, resolve, write_model_folder
from pangu_sigma.checkpoint.model_folder import CARD, check_output, output_write
from pangu_sigma.checkpoint.streamed_checkpoint import DOCUMENT_BYTES
from pangu_sigma.config import parameter_counts
from pangu_sigma.errors import UserError
from pangu_sigma.monitor.progress import progress
from pangu_sigma.signals import stop_signals_raise
from pangu_sigma.trained_model import stored_config

VERIFICATION = "verification.json"


@dataclass(frozen=True)
class Extraction:
    """A sub-model that was written: its folder, what it holds, and the verification, if there was one."""

    model: Checkpoint
    cut: ExtractionPlan
    bytes_written: int
    verification: Verification | None

    def __repr__(self) -> str:
        return f"Extraction({str(self.path)!r}, domains={self.domains})"

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def path(self) -> Path:
        """The sub-model's folder."""
        return self.model.path

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that it has."""
        return self.cut.domains

    @property
    def num_parameters(self) -> int:
        """Its trained values."""
        return parameter_counts(self.cut.config).total

    @property
    def parent_parameters(self) -> int:
        """The trained values of the model that it was cut out of."""
        return parameter_counts(stored_config(self.cut.parent)).total

    def to_dict(self) -> dict[str, object]:
        """Path, domains, parameters, bytes and the verification as plain values for JSON."""
        return {
            "path": str(self.path),
            "domains": list(self.domains),
            "parameters": self.num_parameters,
            "bytes": self.bytes_written,
            "verification": self.verification and self.verification.to_dict(),
        }


def plan(
    model: str | Path,
    domains: Sequence[str],
    out: str | Path | None = None,
    *,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    fold: bool = False,
) -> ExtractionPlan:
    """What would be cut out of a run (its last checkpoint), a checkpoint or a model folder.

    Raises UserError for a model that is not whole, an unknown domain, what cannot be cut, and (with `out`) an output
    that is not empty or a disk that is too small.
    """
    parent = resolve(model)
    cut = ExtractionPlan(parent, choose_domains(parent, domains), dtype, max_shard_bytes, fold)
    if out is not None:
        path = check_output(out)
        if path.is_relative_to(parent.path.resolve()):
            raise UserError(f"{out} lies inside {parent.path}, which it is cut out of: choose another folder")
        cut.folder(path).check_space(output_write(path), DOCUMENT_BYTES)
    return cut


def extract(cut: ExtractionPlan, out: str | Path, *, check: bool = True, device: str = "CPU") -> Extraction:
    """Write the sub-model to `out`; with `check`, only after it was found to be the same function (on `device`).

    Raises UserError as `plan` does, VerificationError when the sub-model is another function, and leaves nothing then,
    nor when it is interrupted.
    """
    folder = cut.folder(check_output(out))
    quality = measured(cut.parent)
    verification: Verification | None = None

    def copied(done: int, total: int) -> None:
        if done <= total:  # beyond are the few documents of the end
            job.set(done)
        if done == total:
            copying.close()

    def finish(written: Checkpoint) -> dict[str, str]:
        nonlocal verification
        documents = {}
        if check:
            with progress("verify", None, unit="batches") as verifying:
                verification = verify(cut.parent, written, cut, device=device, advance=verifying.advance)
            raise_if_different(verification)
            documents[VERIFICATION] = json.dumps(verification.to_dict(), ensure_ascii=False, indent=2) + "\n"
        return {**documents, CARD: model_card(cut, folder.bytes, quality, verification)}

    with stop_signals_raise(), ExitStack() as copying:
        job = copying.enter_context(progress("copy", folder.bytes, unit="B"))
        model = write_model_folder(out, folder, finish=finish, progress=copied)
    return Extraction(model, cut, folder.bytes, verification)
