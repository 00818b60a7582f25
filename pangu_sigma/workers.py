"""Worker processes of one command: started by --workers or msrun, and ended together with one sentence.

A command of several processes runs the same code in each of them. Who is who comes from the environment, which the
launcher fills as msrun does; what they do together goes through `parallel.comm.processes`.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from pangu_sigma.checkpoint import Checkpoint, resolve
from pangu_sigma.checkpoint.folder_layout import CONFIG
from pangu_sigma.checkpoint.folder_locks import lock_run_folder
from pangu_sigma.config import Config
from pangu_sigma.config.config_paths import stored_text
from pangu_sigma.config.load_config import config_from_dict, load_values
from pangu_sigma.errors import INTERRUPTED, STOPPED, USER_ERROR, UserError, argument, spelled_as
from pangu_sigma.monitor.progress import is_progress_shown
from pangu_sigma.monitor.result_files import write_text
from pangu_sigma.plan.requirements import check_processes
from pangu_sigma.signals import interruption
from pangu_sigma.trained_model import run_of, stored_config
from parallel.comm.launch import WATCHED, JobResult, Launch, end_with_launcher
from parallel.comm.processes import LaunchEnvironment, Processes
from parallel.comm.watchdog import Watchdog

# In the folder of a launch: the sentence by which rank 0 ended; the signal at which all saved and stopped.
_ERROR, _STOPPED = "error.txt", "stopped.txt"
FOLDER = "workers"  # in the run's folder: logs, and the files by which processes know of each other
TAKEN = "another job of several processes works in"


def with_workers(config: Config, workers: int) -> Config:
    """The configuration for so many processes: on its own mesh if that has as many ranks, else, if it has one rank, on
    as many expert parts as the experts divide into and as much data parallelism as is left. A batch that nobody wrote
    is a multiple of those that read. Raises UserError."""
    values = config.written()
    parallel = values.setdefault("parallel", {})
    if config.parallel.mesh.size == 1 and workers > 1:
        parallel |= _mesh_of(config, workers)
    parallel["workers"] = workers
    return load_values(values, argument("workers", workers))


def for_launched_processes(config: Config) -> Config:
    """The configuration for as many processes as msrun started, where it makes no mesh itself: as `with_workers`, but
    that the processes are there already. Unchanged in a process that nobody launched."""
    size = launched_size()
    if size == 1 or config.parallel.mesh.size > 1:
        return config
    values = config.written()
    values["parallel"] = {**values.get("parallel", {}), **_mesh_of(config, size)}
    return load_values(values, f"{size} processes")


def launched_size() -> int:
    """How many processes of this command were started together: 1 where nobody launched this one. Raises UserError."""
    started = _launched()
    return 1 if started is None else started.size


def _launched() -> LaunchEnvironment | None:
    try:
        return LaunchEnvironment.read()
    except ValueError as error:
        raise UserError(str(error)) from None


def _mesh_of(config: Config, processes: int) -> dict[str, int]:
    """As many expert parts as the experts divide into, and as much data parallelism as is left."""
    parts = math.gcd(processes, config.experts_in_layer) if config.model.sparse_prefixes else 1
    return {"expert": parts, "data": processes // parts}


def processes_of(config: Config, folder: Path) -> Processes:
    """This process's rank and mesh among the processes of its command; the watchdog's files lie in `folder`.

    Raises UserError unless there are as many processes as `parallel` says.
    """
    started = _launched()
    mesh = config.parallel.mesh
    size = 1 if started is None else started.size
    if size != mesh.size:
        counted = f"a mesh of {mesh.size} ranks ({mesh.axes})"
        if started is None:
            how = f"start {mesh.size} processes with msrun (docs/cluster.md), or set parallel.emulate_mesh"
            if config.run.device == "CPU":
                how = f"set parallel.workers={mesh.size}, or start as many with msrun"
            raise UserError(f"parallel makes {counted}: {how}")
        raise UserError(
            f"{size} processes were started, but parallel makes {counted}: start {mesh.size}, or change parallel.data "
            "or parallel.expert"
        )
    if started is None:
        return Processes()
    launcher_folder = os.environ.get(WATCHED)
    files = Path(launcher_folder) if launcher_folder else folder / FOLDER
    try:
        watch = Watchdog(files, started.rank, size, config.parallel.timeout, quiet=end_with_launcher())
    except BlockingIOError:
        raise UserError(f"{TAKEN} {files}: wait for it or set another run.dir") from None
    return Processes(mesh, started.rank, watch)


def is_worker() -> bool:
    """Whether this process was started as one of several."""
    return os.environ.get("MS_ROLE") == "MS_WORKER"


def check_started_as_several(command: str | None, commands: Collection[str]) -> None:
    """Raises UserError in one of several processes of a command that is none of `commands`: each would do its work."""
    if launched_size() > 1 and command is not None and command not in commands:
        raise UserError(f"{command} runs in one process, and {launched_size()} were started: start it without msrun")


@dataclass(frozen=True)
class LaunchOutput:
    """What several processes came to: what the first wrote to standard output, and the signal by which all of them
    stopped after they had saved, or that came too late for them, None where none came."""

    text: str
    stop_signal: signal.Signals | None


def launch_on_model(words: Sequence[str], workers: int, model: Path) -> str:
    """`launch` for a job on a run, whose folder takes the logs, or on a model that stands alone."""
    checkpoint = resolve(model)
    with_workers_for(checkpoint, workers)  # a mesh that does not divide the model shows before anything is started
    run = run_of(checkpoint)
    if run is not None:
        # Beside those of a training that goes on.
        return launch(words, workers, run / FOLDER / words[0]).text
    with TemporaryDirectory(prefix="pangu-sigma-") as folder:
        return launch(words, workers, Path(folder)).text


def with_workers_for(checkpoint: Checkpoint, workers: int) -> Config:
    """The configuration by which so many processes measure a checkpoint, whatever mesh it was trained on.

    Raises UserError where the model does not divide.
    """
    config = stored_config(checkpoint)
    values = config.to_dict()
    if config.parallel.mesh.size != workers or config.parallel.emulate_mesh:
        values["parallel"] = {"timeout": config.parallel.timeout}
    # Nothing trains, and how many sequences are measured at a time changes no figure: both follow the processes.
    values["train"] |= {"batch_size": workers, "gradient_accumulation_steps": 1}
    values["evaluate"]["batch_size"] = -(-config.evaluate.batch_size // workers) * workers
    return with_workers(config_from_dict(values, str(checkpoint.path)), workers)


def launch(words: Sequence[str], workers: int, folder: Path, config: Config | None = None) -> LaunchOutput:
    """Run `pangu-sigma WORDS --workers N` in N processes.

    Logs go to `folder`, and so does `config`, whose file then follows the first of the words. Raises UserError with
    what rank 0 ended by or naming another rank that failed, and where another job of several processes has the folder;
    KeyboardInterrupt where a signal ended it before it saved.
    """
    check_processes(workers)
    first, *others = words
    written = [] if config is None else [str(folder / CONFIG)]
    command = [sys.executable, "-m", "pangu_sigma", first, *written, *others, "--workers", str(workers)]
    # The run's, where the folder is one of its `workers`.
    run_dir = next((path.parent for path in (folder, *folder.parents) if path.name == FOLDER), None)
    with lock_run_folder(folder, TAKEN, run_dir, prepared=None):
        for name in (_ERROR, _STOPPED):
            (folder / name).unlink(missing_ok=True)
        if config is not None:
            write_text(folder / CONFIG, stored_text(config, folder))
        with Launch(command, workers, folder, not is_progress_shown(), spelled_as()) as job:
            ended = job.wait()
        if ended.failed_rank is None:
            if any(ended.codes):
                go_on = f"continue with {argument('resume', True)}"
                raise UserError(f"the processes lost each other: see {job.folder}; {go_on}")
            return LaunchOutput(job.results.read_text(encoding="utf-8"), _received(ended))
        rank, code = ended.failed_rank, ended.codes[ended.failed_rank]
        if code == USER_ERROR:
            sentence = _last_line(job.log(rank) if rank else folder / _ERROR).removeprefix("Error: ")
            if rank == 0:
                raise UserError(sentence)
            named = sentence if sentence.startswith(f"rank {rank} ") else f"rank {rank}: {sentence}"
            raise UserError(f"{named} ({job.log(rank)})")
        if ended.received_signal is not None or code in (STOPPED, INTERRUPTED):
            if (folder / _STOPPED).exists():
                number = int((folder / _STOPPED).read_text(encoding="utf-8"))
                return LaunchOutput(job.results.read_text(encoding="utf-8"), signal.Signals(number))
            number = _received(ended) or (signal.SIGINT if code == INTERRUPTED else signal.SIGTERM)
            raise interruption(number, ended.ended_at_once)
        last_line = _last_line(job.log(rank)) if rank or job.quiet else ""
        log_end = f"; its log {job.log(rank)} ends: {last_line}" if last_line and code > 0 else ""
        goes_on = f"; what the training had saved is whole: continue with {argument('resume', True)}"
        saved = goes_on if first == "train" else ""
        raise UserError(f"rank {rank} of {workers} {ended.cause}, so all processes were stopped{saved}{log_end}")


def _received(ended: JobResult) -> signal.Signals | None:
    return None if ended.received_signal is None else signal.Signals(ended.received_signal)


def tell_launcher_of_stop(stop_signal: signal.Signals | None) -> None:
    """Tell whoever launched this process, if it is rank 0, that all have saved and stop at this signal."""
    folder = os.environ.get(WATCHED)
    if stop_signal is not None and folder is not None and os.environ.get("RANK_ID") == "0":
        write_text(Path(folder) / _STOPPED, str(int(stop_signal)))


def leave_to_launcher(sentence: str) -> bool:
    """Leave the sentence by which this process ends to whoever launched it; False unless it is rank 0 of a `launch`."""
    folder = os.environ.get(WATCHED)
    if folder is None or os.environ.get("RANK_ID") != "0":
        return False
    write_text(Path(folder) / _ERROR, sentence)
    return True


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def leave(code: int) -> NoReturn:
    """End this worker. MindSpore's own way out waits for processes that may not answer any more, up to minutes; only
    under msrun and after success is it taken, because msrun's scheduler counts on it."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code or end_with_launcher():
        os._exit(code)
    sys.exit(code)
