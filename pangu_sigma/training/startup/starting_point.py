"""Where a run starts from: nothing, another model's weights, or its own last checkpoint.

Its configuration and tokenizer are settled here with those of that checkpoint, before the framework is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pangu_sigma.checkpoint import Checkpoint, find_latest, resolve
from pangu_sigma.checkpoint.folder_layout import CONFIG, STATE
from pangu_sigma.checkpoint.run_config_file import DOMAIN_CHANGES, mend_config, stale_config
from pangu_sigma.checkpoint.trainer_state import check_resumable
from pangu_sigma.config import (
    Config,
    check_init_from,
    check_resume,
    with_init_from_of,
    with_kept_keys,
    with_tokenizer_of,
    with_vocabulary_size,
)
from pangu_sigma.config.data_section import DomainConfig
from pangu_sigma.config.load_config import read_stored
from pangu_sigma.data.corpus_files import expand_paths
from pangu_sigma.data.domain_store import find_store, is_text_here
from pangu_sigma.errors import UserError, argument
from pangu_sigma.monitor.progress import report
from pangu_sigma.plan.requirements import check_training
from pangu_sigma.trained_model import stored_config


@dataclass(frozen=True)
class StartingPoint:
    """The settled configuration of a run and the checkpoints that it takes something from.

    initial_model: whose weights a new run takes over. tokenizer_checkpoint: whose tokenizer stays, None to take the
    configured one. known_corpora: domain -> fingerprint of the text that a resumed run learns from. messages: what the
    user should know of it.
    """

    config: Config
    initial_model: Checkpoint | None = None
    tokenizer_checkpoint: Checkpoint | None = None
    known_corpora: Mapping[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


def find_run_checkpoint(run_dir: Path, resume: bool) -> tuple[Checkpoint | None, list[str]]:
    """The last complete checkpoint of a run's folder, and messages about incomplete ones.

    Raises UserError where there is one and the run is not to be resumed.
    """
    checkpoint, messages = find_latest(run_dir)
    if checkpoint is not None and not resume:
        raise UserError(
            f"{run_dir} already holds a run at step {checkpoint.step}: add {argument('resume', True)} or set run.dir"
        )
    return checkpoint, messages


def check_before_launch(config: Config, resume: bool) -> Config:
    """Refuse in the launching process what a run would refuse once its processes had started and met; the configuration
    by which they run, in which all counts as written.

    Raises UserError for text that is not there, a folder that holds another run, a configuration that is not the run's.
    """
    check_training(config, is_new=not resume)
    run_dir = Path(config.run.dir)
    checkpoint, _ = find_run_checkpoint(run_dir, resume)
    for domain in config.domains if config.data.stream is None else ():
        if checkpoint is None or not _is_tokenised(domain, config, checkpoint):
            expand_paths(domain.name, domain.data)
    if checkpoint is None:
        start_fresh(config)
    elif stale_config(run_dir, checkpoint) is None:  # else something is written first, which the run does
        start = resume_from(run_dir, config, checkpoint)
        for message in start.messages:  # the run's own have nothing left to say of it
            report(message)
        return start.config
    return config


def start_fresh(config: Config) -> StartingPoint:
    """The starting point of a new run, from another model's weights if `run.init_from` names one.

    Raises UserError if they do not fit.
    """
    if config.run.init_from is None:
        return StartingPoint(config)
    initial_model = resolve(config.run.init_from)
    stored = stored_config(initial_model)
    check_init_from(stored, config)
    for domain in config.domains if config.adapt is None and config.data.stream is None else ():
        try:
            expand_paths(domain.name, domain.data)
        except UserError as error:  # an imported model has none
            raise UserError(f"{error}, or set domains.{domain.name}.data to the text to learn from") from error
    message = (
        f"begins with the weights, tables and tokenizer of {initial_model.path} (step {initial_model.step}); the "
        "optimizer's state starts fresh"
    )
    config = with_tokenizer_of(config, stored)
    return StartingPoint(config, initial_model, initial_model, messages=[message])


def resume_from(run_dir: Path, config: Config, checkpoint: Checkpoint) -> StartingPoint:
    """The starting point of a run that continues its own checkpoint.

    Raises UserError for a configuration that is not the run's.
    """
    stored = stored_config(checkpoint)
    check_resumable(checkpoint.state, checkpoint.path / STATE)
    messages, changed = [], checkpoint.state.get(DOMAIN_CHANGES)
    stale = stale_config(run_dir, checkpoint)
    if stale is not None:
        # The file that the user named, or would have, is finished as the killed change would have done.
        if config == read_stored(stale, run_dir / CONFIG):
            config = stored
        messages.append(mend_config(run_dir, checkpoint))
    # After skipped steps more batches are drawn than steps are done.
    drawn = max(checkpoint.step, checkpoint.state["sampler"].get("step", 0))
    config, kept = with_kept_keys(config, stored, drawn)
    messages += kept
    config = with_init_from_of(config, stored)
    if changed and config.domain_names != stored.domain_names:
        raise UserError(
            f"pangu-sigma domains changed the domains of {run_dir} to {', '.join(stored.domain_names)}: "
            f"resume with {checkpoint.path}/{CONFIG}, or list the same domains"
        )
    if (stored.data.stream is None) != (config.data.stream is None):
        learned, how = ("its domains' files", "out") if stored.data.stream is None else ("a stream", "")
        raise UserError(
            f"{run_dir} has learned from {learned} so far: resume with{how} data.stream, or begin a new run with "
            f"run.init_from={run_dir}"
        )
    # Where the tokenizer gives the size, a changed tokenizer is refused with the corpus, by its name.
    check_resume(stored, with_vocabulary_size(config, stored.model.vocab_size), drawn)
    gone = [domain for domain in config.domains if not is_text_here(domain)] if config.data.stream is None else []
    for domain in gone:
        if _is_tokenised(domain, config, checkpoint):
            messages.append(
                f"the text of domain {domain.name} is not at {', '.join(domain.data)}: the run learns from what it "
                f"tokenised before ({config.data.cache})"
            )
    # The tokenizer that the first domains' mix gave stays when domains come and go, and when their text is gone.
    model_file = config.data.tokenizer.path
    is_here = Path(model_file).is_file() if model_file is not None else not gone
    keep_tokenizer = stored.run.init_from is not None or changed or not is_here
    return StartingPoint(
        config,
        tokenizer_checkpoint=checkpoint if keep_tokenizer else None,
        known_corpora=checkpoint.fingerprints.corpora,
        messages=messages,
    )


def _is_tokenised(domain: DomainConfig, config: Config, checkpoint: Checkpoint) -> bool:
    """Whether the text that a run learns a domain from is in its cache, so that its files are not needed."""
    known = checkpoint.fingerprints
    corpus = known.corpora.get(domain.name)
    return corpus is not None and find_store(domain, known.tokenizer, config.data, corpus) is not None
