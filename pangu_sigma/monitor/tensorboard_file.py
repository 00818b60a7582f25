"""Scalars as TensorBoard's event file, written in the thread that gives them.

tensorboardX's own `SummaryWriter` hands them to a thread, which an error of the disk ends: every later scalar would
wait for it for ever, and the training with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from pangu_sigma.errors import UserError

_FLUSH_SECONDS = 30.0


class TensorBoardFile:
    """A new event file in `folder`. `resume_step`: of the checkpoint that a run goes on from; TensorBoard forgets what
    an earlier, killed run wrote from the next step on. Raises UserError without tensorboardX, OSError in every method.
    """

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
        except ImportError:
            raise UserError("tensorboardX is not installed: install it or set run.tensorboard=false") from None
        folder.mkdir(parents=True, exist_ok=True)
        # The suffix keeps a resume in the same second from taking the earlier file's name, which is made of seconds.
        suffix = "" if resume_step is None else f".from{resume_step + 1}"
        self._writer = EventsWriter(str(folder / "events"), suffix)
        self._flushed_at = -_FLUSH_SECONDS
        if resume_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))

    def write(self, step: int, scalars: Iterable[tuple[str, float]]) -> None:
        """Append (name, value) pairs of a step; they are on the disk within half a minute of further ones."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in scalars:
            self._writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        if time.monotonic() - self._flushed_at >= _FLUSH_SECONDS:
            self._writer.flush()
            self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
