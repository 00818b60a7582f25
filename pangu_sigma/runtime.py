"""MindSpore's process-wide settings, made once before the framework is imported anywhere else."""

from __future__ import annotations

import os
from pathlib import Path

from pangu_sigma.signals import signals_held
from parallel.operator_layout import LOCAL_SLICES


def prepare(device: str, scratch: Path | None = None) -> None:
    """Import MindSpore quietly and set it up: graph mode on `device`, its own files under `scratch`.

    Raises UserError where the device is not there.
    """
    # MindSpore's C++ side logs to the terminal, over the progress bar; errors reach the user as exceptions.
    os.environ.setdefault("GLOG_v", "4")
    os.environ.setdefault("MS_DEV_JIT_SYNTAX_LEVEL", "2")
    # Not a matter of taste: without it pipeline stages would compute other rows.
    os.environ.update(LOCAL_SLICES)
    with signals_held():
        import mindspore

    from mindspore.communication import GlobalComm

    from pangu_sigma.errors import UserError

    try:
        # Processes that have met are numbered devices to MindSpore; once they compute, the number cannot be set again.
        if not GlobalComm.INITED:
            mindspore.set_device(device)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"run.device is {device}, which MindSpore cannot use on this machine; set run.device=CPU or install CANN"
        ) from error
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    if scratch is not None:
        mindspore.set_context(save_graphs_path=str(scratch))
