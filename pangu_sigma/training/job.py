"""Training job: from a configuration to a finished run folder.

`open_run` makes the parts of a run in the order in which they can fail cheaply: the user's files and configuration
first, then the framework and the other processes, then the model and what computes. `TrainingRun.train` does the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from pangu_sigma import runtime
from pangu_sigma.checkpoint import Checkpoint, StoredTensors, find_latest, remove_stale
from pangu_sigma.checkpoint.folder_locks import lock_run_folder
from pangu_sigma.checkpoint.run_config_file import DOMAIN_CHANGES
from pangu_sigma.checkpoint.verified_files import VerifiedFiles
from pangu_sigma.config import Config, parameter_counts, with_vocabulary
from pangu_sigma.config.config_paths import stored_text
from pangu_sigma.config.data_section import STANDARD_INPUT
from pangu_sigma.config.rules import warnings
from pangu_sigma.data.growing_file import check_source
from pangu_sigma.errors import UserError
from pangu_sigma.monitor.metrics_log import MetricsLog, NoMetrics
from pangu_sigma.monitor.progress import progress, report
from pangu_sigma.monitor.result_files import write_json, write_text
from pangu_sigma.plan.requirements import check_training
from pangu_sigma.signals import signals_held, stop_signals_raise
from pangu_sigma.trained_model import stored_weights
from pangu_sigma.training.loop import HeldoutEvaluation, TrainingRun
from pangu_sigma.training.startup.starting_point import (
    StartingPoint,
    check_before_launch,
    find_run_checkpoint,
    resume_from,
    start_fresh,
)
from pangu_sigma.training.startup.warnings import describe_differences, describe_placement
from pangu_sigma.training.streaming_input import StreamingInput
from pangu_sigma.training.task import TrainingTask
from pangu_sigma.training.training_result import TrainingResult
from pangu_sigma.workers import (
    FOLDER,
    for_launched_processes,
    is_worker,
    launch,
    processes_of,
    tell_launcher_of_stop,
    with_workers,
)
from parallel.comm.processes import Processes


def train(config: Config, resume: bool = False) -> TrainingResult:
    """Train as `config` says: here, or with `parallel.workers` above 1 in as many processes of this machine.

    Raises UserError for the user's mistakes and for training that cannot go on.
    """
    if config.adapt is not None:
        raise UserError(
            f"adapt fine-tunes a trained model: run it with pangu-sigma {config.adapt.objective} MODEL FILE.yaml"
        )
    config = for_launched_processes(config)
    run_dir = Path(config.run.dir)
    if config.parallel.workers > 1 and not is_worker():
        config = with_workers(config, config.parallel.workers)
        config = check_before_launch(config, resume)
        words = ["train", *(["--resume"] if resume else [])]
        launched = launch(words, config.parallel.workers, run_dir / FOLDER, config)
        return TrainingResult.of(run_dir, launched.stop_signal)
    if config.data.stream is not None and find_latest(run_dir)[0] is None:
        # Before anything is made on disk.
        with stop_signals_raise():
            check_source(config.data.stream.path, STANDARD_INPUT, report)
    with stop_signals_raise():
        processes = processes_of(config, run_dir)
        with open_run(config, resume, processes) as run:
            run.train()
            tell_launcher_of_stop(run.stop_signal)
            processes.leave()
    return TrainingResult.of(run_dir, run.stop_signal)


@contextmanager
def open_run(
    config: Config,
    resume: bool,
    processes: Processes | None = None,
    make_task: Callable[[StartingPoint], TrainingTask] = TrainingTask,
) -> Iterator[TrainingRun]:
    """Prepare a run over its folder.

    make_task: makes the kind of training (text, SFT, DPO) of where the run starts from.

    Several `processes` open it together: rank 0 has the lock and the metrics.
    """
    processes = processes or Processes()
    run_dir, is_first = Path(config.run.dir), processes.first
    check_training(config, is_new=not resume)
    with ExitStack() as resources:
        # 1. The folder, under its lock, and its last checkpoint.
        if is_first:
            resources.enter_context(lock_run_folder(run_dir))
        else:
            # Rank 0 comes to the meeting when the text is tokenised: it is there, and so is the last checkpoint.
            _connect(config, processes)
        messages = remove_stale(run_dir) if is_first else []
        checkpoint, messages_of_search = find_run_checkpoint(run_dir, resume)
        messages += messages_of_search
        verified = VerifiedFiles()
        if checkpoint is not None and is_first:
            # Every file that a save of this run may link; what the run does not load is looked at here alone.
            total = sum(file.bytes for file in checkpoint.manifest.files.values())
            with progress("verify the checkpoint", total, "B") as job:
                verified.read_all(checkpoint, job.advance)
        # 2. The configuration, settled with that of a checkpoint, and the text. Nothing of the framework is loaded yet.
        start = start_fresh(config) if checkpoint is None else resume_from(run_dir, config, checkpoint)
        task = make_task(start)
        tokenizer = task.corpus.tokenizer
        messages += start.messages + task.corpus.messages()
        if checkpoint is not None:
            checkpoint.check_fingerprints(tokenizer=tokenizer.fingerprint, corpora=task.corpus.fingerprints)
        config = with_vocabulary(start.config, tokenizer.vocab_size)
        check_training(config, is_new=checkpoint is None)
        # 3. The framework and the other processes.
        if is_first:
            from pangu_sigma.plan.run_summary import run_summary

            for line in run_summary(config, config.model.vocab_size, checkpoint.step if checkpoint else 0):
                report(line)
            # Only now: whatever is wrong with the user's files shows before the framework is loaded.
            _connect(config, processes)
        # 4. The model, what computes with it, and what there is to say before the first step.
        # MindSpore's C++ calls Python here, and ends the program by abort() where that is interrupted; Python itself
        # ends it by the signal where a module that loads makes a dataclass.
        with signals_held():
            run = _build(
                config, processes, task, checkpoint, start.initial_model, resume, messages, resources, verified
            )
        if is_first:
            write_text(run_dir / "config.yaml", stored_text(config, run_dir))
            counts = parameter_counts(config, run.model.vocab)
            write_json(run_dir / "summary.json", {"parameters": counts.to_dict(), "vocabulary": run.model.vocab})
        yield run


def _connect(config: Config, processes: Processes) -> None:
    """Load the framework and meet the other processes."""
    runtime.prepare(config.run.device, Path(config.run.dir) / "mindspore")
    processes.connect()


@runtime.COMPUTING
def _build(
    config: Config, processes: Processes, task: TrainingTask, checkpoint: Checkpoint | None,
    initial_model: Checkpoint | None, resume: bool, messages: list[str], resources: ExitStack,
    verified: VerifiedFiles,
) -> TrainingRun:  # fmt: skip
    """Make everything that computes: as it was in `checkpoint`, or with the weights of `initial_model`, or new.

    `resources`: closes what must be closed when the run is over.
    """
    from pangu_sigma.model.build_model import build_model, initialise_shared
    from pangu_sigma.model.state_dict import restore_model, stored_tables
    from pangu_sigma.training.checkpointing import RunCheckpointer, RunProgress
    from pangu_sigma.training.continual.controller import ContinualController
    from pangu_sigma.training.continual.teacher_snapshot import TeacherSnapshot
    from pangu_sigma.training.distributed.distributed_trainer import distributed_trainer

    # 1. The model and its trainer.
    run_dir, corpus, vocab = Path(config.run.dir), task.corpus, config.model.vocab_size
    tensors: Mapping[str, np.ndarray] = {}
    if checkpoint:
        tensors = StoredTensors(checkpoint)
    elif initial_model:
        tensors = stored_weights(initial_model, alone=processes.size == 1)
    model = build_model(
        config,
        vocab,
        corpus.tokenizer.eod_id,
        tables=stored_tables(tensors) or None,
        token_counts=corpus.token_counts(vocab),
        initialise=not tensors,
        processes=processes,
    )
    resources.callback(model.store.close)
    objective = task.objective()
    # The trainer before the weights: it may shard the shared parameters, which then take this rank's shards.
    trainer = distributed_trainer(model, objective)
    if initial_model:
        restore_model(model, tensors)
    elif not tensors and model.shared.deferred_init:
        initialise_shared(model)
    # 2. What the run reads and is measured on.
    unigram = corpus.unigram_losses(config.evaluate.batches)
    evaluation = HeldoutEvaluation(task.evaluator(model, objective), task.heldout, unigram)
    stream = None
    if config.data.stream is not None:
        stream = StreamingInput(config, corpus.tokenizer, resumed=checkpoint is not None or resume)
        resources.callback(stream.sampler.close)
    sampler = stream.sampler if stream else task.sampler(model.groups.sizes)
    # 3. What it keeps, and where it was.
    state = checkpoint.state if checkpoint else {}
    controller = ContinualController(run_dir, model, objective, corpus, TeacherSnapshot.from_state(state))
    domain_changes = state.get(DOMAIN_CHANGES, [])
    checkpointer = RunCheckpointer(run_dir, trainer, task, controller, domain_changes, verified)
    progress = RunProgress()
    if checkpoint:
        progress = checkpointer.restore(checkpoint)
        sampler.restore(state["sampler"], allow_new_domains=bool(domain_changes))
    metrics: MetricsLog | NoMetrics = NoMetrics()
    if processes.first:
        resumed_step = None if not resume else (checkpoint.step if checkpoint else -1)
        metrics = resources.enter_context(MetricsLog(run_dir, config.run.tensorboard, resumed_step))
    # 4. What there is to say before the first step.
    dubious = [*warnings(config), *corpus.warnings(), *describe_differences(model, checkpoint)]
    dubious += describe_placement(config, model.groups.sizes, progress.step)
    if resume and checkpoint:
        messages.append(f"resumed from {checkpoint.path.name} (step {checkpoint.step})")
    elif resume:
        dubious.append("no complete checkpoint to resume from: beginning at step 0")
    if config.parallel.emulate_mesh:
        messages.append(
            f"emulates {processes.size} devices: each of as many processes computes the whole graph, and its "
            "speed says nothing about theirs"
        )
    if stream is not None:
        dubious += stream.messages
    return TrainingRun(
        config, processes, corpus, model, trainer, controller, checkpointer, evaluation, sampler, stream, metrics,
        progress, messages, dubious, stop_signal=None,
    )  # fmt: skip
