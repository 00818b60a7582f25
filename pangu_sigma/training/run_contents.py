"""What a checkpoint of a run holds beside tensors, and how a live model is written into one.

The run's own checkpoints and the teacher snapshots of its phases are both made here, so that either is a model folder
that every other command reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from pangu_sigma.checkpoint import CheckpointContents, Fingerprints, SaveResult, save_checkpoint
from pangu_sigma.checkpoint.distributed import save_distributed
from pangu_sigma.checkpoint.verified_files import VerifiedFiles
from pangu_sigma.config import Config
from pangu_sigma.config.config_paths import stored_text
from pangu_sigma.data.corpus import Corpus
from pangu_sigma.model.model import Model
from pangu_sigma.model.state_dict import model_tensors, tensor_parts


def collect_contents(
    step: int, config: Config, corpus: Corpus, probe: Mapping[str, np.ndarray], state: Mapping[str, object]
) -> CheckpointContents:
    """Everything of a run's checkpoint but its tensors.

    `probe`: held-out sequences int32 [n, S + 1] by domain; `state`: the trainer's state, as JSON has it.
    """
    return CheckpointContents(
        step=step,
        domains=config.domain_names,
        coverage=config.coverage,
        config_text=stored_text(config, config.run.dir),
        tokenizer_files=corpus.tokenizer.files(),
        probe=probe,
        state=state,
        fingerprints=Fingerprints(tokenizer=corpus.tokenizer.fingerprint, corpora=corpus.fingerprints),
    )


def write_checkpoint(
    folder: Path,
    contents: CheckpointContents,
    model: Model,
    moments: Mapping[str, np.ndarray] | None,
    keep: int,
    progress: Callable[[int, int], None] | None = None,
    verified: VerifiedFiles | None = None,
    read_everything: bool = False,
) -> SaveResult:
    """Save a live model below `folder`; its processes do it together, each its own parts. See `save_checkpoint`.

    `moments`: the optimizer's state of the shared parameters by tensor name; None saves the weights alone.
    """
    how = {"keep": keep, "progress": progress, "verified": verified, "read_everything": read_everything}
    if model.processes.size == 1:
        tensors = model_tensors(model, moments)
        return save_checkpoint(folder, contents, tensors, **how)
    parts = tensor_parts(model, moments)
    return save_distributed(model.processes, folder, contents, parts, **how)
