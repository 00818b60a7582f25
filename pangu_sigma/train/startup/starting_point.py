"""What a run begins with: its configuration and tokenizer, settled with those of a checkpoint whose state it continues
or whose weights it takes over."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pangu_sigma.checkpoint import Checkpoint, find_latest, resolve
from pangu_sigma.checkpoint.folder_layout import CONFIG
from pangu_sigma.checkpoint.run_config_file import DOMAIN_CHANGES, mend_config, stale_config
from pangu_sigma.config import (
    Config,
    check_resume,
    check_start,
    with_start_of,
    with_tokenizer_of,
    with_vocabulary_size,
)
from pangu_sigma.data.corpus_files import expand_paths
from pangu_sigma.errors import UserError
from pangu_sigma.trained_model import stored_config


@dataclass(frozen=True)
class Beginning:
    """The configuration to run with; `start`: the model whose weights a new run takes over; `tokenizer_of`: whose
    tokenizer stays, None to take the configured one; `messages`: what is to be said of it.
    """

    config: Config
    start: Checkpoint | None = None
    tokenizer_of: Checkpoint | None = None
    messages: list[str] = field(default_factory=list)


def last_checkpoint(run_dir: Path, resume: bool) -> tuple[Checkpoint | None, list[str]]:
    """The last complete checkpoint of a run's folder, and what is to be said of others. Raises UserError where there is
    one and the run is not to be resumed."""
    checkpoint, said = find_latest(run_dir)
    if checkpoint is not None and not resume:
        raise UserError(f"{run_dir} already holds a run at step {checkpoint.step}: add --resume or set run.dir")
    return checkpoint, said


def refuse_early(config: Config, resume: bool) -> None:
    """Raises UserError for what a run would refuse once its processes had started and met: text that is not there, a
    folder that holds another run, a configuration that is not the run's."""
    for domain in config.domains if config.data.stream is None else ():
        expand_paths(domain.name, domain.data)
    run_dir = Path(config.run.dir)
    checkpoint, _ = last_checkpoint(run_dir, resume)
    if checkpoint is None:
        begun(config)
    elif stale_config(run_dir, checkpoint) is None:  # else something is written first, which the run does
        resumed(run_dir, config, checkpoint)


def resumed(run_dir: Path, config: Config, checkpoint: Checkpoint) -> Beginning:
    """A run that goes on from its own checkpoint. Raises UserError for a configuration that is not the run's."""
    stored = stored_config(checkpoint)
    messages, changed = [], checkpoint.state.get(DOMAIN_CHANGES)
    stale = stale_config(run_dir, checkpoint)
    if stale is not None:
        # The file that the user named, or would have, is finished as the killed change would have done.
        if config.to_yaml() == stale:
            config = stored
        messages.append(mend_config(run_dir, checkpoint))
    config = with_start_of(config, stored)
    if changed and config.domain_names != stored.domain_names:
        raise UserError(
            f"pangu-sigma domains changed the domains of {run_dir} to {', '.join(stored.domain_names)}: "
            f"resume with {checkpoint.path}/{CONFIG}, or list the same domains"
        )
    if (stored.data.stream is None) != (config.data.stream is None):
        learned, how = ("its domains' files", "out") if stored.data.stream is None else ("a stream", "")
        raise UserError(
            f"{run_dir} has learned from {learned} so far: resume with{how} --stream, or begin a new run with "
            f"run.init_from={run_dir}"
        )
    # Where the tokenizer gives the size, a changed tokenizer is refused with the corpus, by its name.
    check_resume(stored, with_vocabulary_size(config, stored.model.vocab_size))
    # The tokenizer that the first domains' mix gave stays when domains come and go.
    kept = stored.run.init_from is not None or changed
    return Beginning(config, tokenizer_of=checkpoint if kept else None, messages=messages)


def begun(config: Config) -> Beginning:
    """A new run, from another model's weights if `run.init_from` names one. Raises UserError if they do not fit."""
    if config.run.init_from is None:
        return Beginning(config)
    start = resolve(config.run.init_from)
    model = stored_config(start)
    check_start(model, config)
    said = (
        f"begins with the weights, tables and tokenizer of {start.path} (step {start.step}); the optimizer's state "
        "starts fresh"
    )
    return Beginning(with_tokenizer_of(config, model), start, start, [said])
