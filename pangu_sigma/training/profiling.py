"""MindSpore's profiler over the steps that `run.profile` names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pangu_sigma.config.run_sections import ProfileConfig


@contextmanager
def profile_steps(settings: ProfileConfig | None, folder: Path, steps_done: int) -> Iterator[Callable[[int], None]]:
    """Yield a function to call after every step with the number of steps done.

    Steps `start` … `start + steps - 1` (from 1) are profiled; the operators' times go to `folder` as CSV and JSON.
    Without settings nothing is profiled and MindSpore's profiler is not loaded.
    """
    if settings is None:
        yield lambda step: None
        return
    from mindspore import profiler

    session = profiler.profile(
        activities=[profiler.ProfilerActivity.CPU],
        on_trace_ready=profiler.tensorboard_trace_handler(str(folder)),
    )
    running = False

    def on_step_done(step: int) -> None:
        nonlocal running
        if running:
            session.step()
            if step >= settings.start + settings.steps - 1:
                session.stop()
                running = False
        elif settings.start - 1 <= step < settings.start + settings.steps - 1:
            session.start()
            running = True

    on_step_done(steps_done)
    try:
        yield on_step_done
    finally:
        if running:
            session.stop()
