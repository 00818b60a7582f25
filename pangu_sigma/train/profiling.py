"""MindSpore's own profiler over the steps that the configuration names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pangu_sigma.config.run_sections import ProfileConfig


@contextmanager
def profiled_steps(wanted: ProfileConfig | None, folder: Path, done: int) -> Iterator[Callable[[int], None]]:
    """Yield a function to call after every step with the number of steps done.

    Steps `start` … `start + steps - 1` (from 1) are watched; the operators' times go to `folder` as CSV and JSON.
    """
    if wanted is None:
        yield lambda step: None
        return
    from mindspore import profiler

    watched = profiler.profile(
        activities=[profiler.ProfilerActivity.CPU],
        on_trace_ready=profiler.tensorboard_trace_handler(str(folder)),
    )
    running = False

    def after(step: int) -> None:
        nonlocal running
        if running:
            watched.step()
            if step >= wanted.start + wanted.steps - 1:
                watched.stop()
                running = False
        elif wanted.start - 1 <= step < wanted.start + wanted.steps - 1:
            watched.start()
            running = True

    after(done)
    try:
        yield after
    finally:
        if running:
            watched.stop()
