"""Dry process: a process that believes it is one rank of N devices: compile there, look at the graph here.

MindSpore reads its simulation level, rank and number of ranks from the environment when it is imported, so the compile
has a process and a folder of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from parallel.dry.stand_in_libraries import DryCompileError, make_standins, plugin_folder
from parallel.operator_layout import NESTED_CALLS

LAST_PASS = "backend_pass"


def dry_environment(standins: Path, ranks: int, rank: int) -> dict[str, str]:
    """The environment in which `init("nccl")` of the wheel's GPU front end believes in `ranks` devices."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MS_", "OMPI_", "PMIX_", "RANK_"))}
    return inherited | {
        "PATH": f"{standins / 'bin'}:{os.environ['PATH']}",
        "CUDA_HOME": str(standins),
        "LD_LIBRARY_PATH": f"{standins / 'lib64'}:{plugin_folder() / 'gpu11.6'}",
        # What looks like an MPI launch; no message is ever sent.
        "OMPI_COMMAND": "dry",
        "PMIX_RANK": str(rank),
        "RANK_ID": str(rank),
        "RANK_SIZE": str(ranks),
        "MS_SIMULATION_LEVEL": "0",
        "MS_DEV_JIT_SYNTAX_LEVEL": "2",
        # Of a model of 40 layers the graphs of early passes are gigabytes of text each; the last ones are what is read.
        "MS_DEV_DUMP_IR_PASSES": LAST_PASS,
        "GLOG_v": "3",
    }


def run_dry(
    command: Sequence[str], folder: Path, ranks: int, rank: int = 0, timeout: float = 1800.0,
    more: Mapping[str, str] | None = None,
) -> str:  # fmt: skip
    """Run a Python command (what follows the interpreter) in `folder` as `rank` of `ranks`; return what it printed.

    `more`: further environment. Raises DryCompileError with what was wrong.
    """
    standins = make_standins(folder.parent / "standins")
    folder.mkdir(parents=True, exist_ok=True)
    environment = dry_environment(standins, ranks, rank) | dict(more or {})
    # The packages as this process sees them, whatever folder the child runs in.
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (os.getcwd(), *sys.path) if p)
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        raise DryCompileError(f"compiling took longer than {timeout:.0f} s: give it more time") from error
    (folder / "log.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode != 0:
        # A traceback is followed by MindSpore's own of the cells; the line that says what was wrong stands between.
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        if done.returncode < 0:
            raise DryCompileError(f"the compiler was ended by signal {-done.returncode}: give it more memory or time")
        message = next((line for line in lines if re.match(r"\w*(Error|Exception|Interrupt)\b", line)), lines[-1])
        raise DryCompileError(f"{message} (all of it: {folder / 'log.txt'})")
    return done.stdout


def start_semi_auto(dataset_strategy: str | tuple = "full_batch", save_to: str = "graphs", **context: object) -> None:
    """In the dry process: semi-auto-parallel graph mode over all ranks, graphs saved under `save_to`.

    `dataset_strategy`: of every input of the graph its cut, as numbers or as `MeshLayout.device_layout` states it.
    """
    import mindspore as ms
    from mindspore.communication import init

    ms.set_context(device_target="GPU", mode=ms.GRAPH_MODE, save_graphs=2, save_graphs_path=save_to)
    ms.set_recursion_limit(NESTED_CALLS)
    init("nccl")
    settings = {"parallel_mode": "semi_auto_parallel", "enable_alltoall": True, "dataset_strategy": dataset_strategy}
    ms.set_auto_parallel_context(**(settings | context))
