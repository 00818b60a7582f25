"""Streaming input: documents that arrive while the run trains, in a growing file or on standard input.

Standard input is copied to a file in the run's folder by a thread of its own (`StandardInputSpool`) and read there,
so that a resumed run reads the same bytes. The reading thread of the training loop draws batches through `sampler`.
"""

from __future__ import annotations

import time
from pathlib import Path

from pangu_sigma.config import Config
from pangu_sigma.config.data_section import STANDARD_INPUT
from pangu_sigma.data.growing_file import StandardInputSpool
from pangu_sigma.data.stream_sampler import StreamSampler
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.errors import UserError

# Standard input cannot be read twice, so a run keeps what came through it here.
RECEIVED = "stream/received.jsonl"
_IDLE_SECONDS = 2.0
_QUIET_SECONDS = 60.0


class StreamingInput:
    """The stream of `config` (`data.stream`), read from its beginning until the sampler is restored.

    resumed: what an earlier process received on standard input is learned first; else it is deleted.
    messages: what the user should know before training begins. Raises UserError where the copy cannot be written.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, resumed: bool) -> None:
        settings = config.data.stream
        self.messages: list[str] = []
        self.spool: StandardInputSpool | None = None
        path = Path(settings.path)
        if settings.path == STANDARD_INPUT:
            path = Path(config.run.dir) / RECEIVED
            try:
                if not resumed:
                    path.unlink(missing_ok=True)
                self.spool = StandardInputSpool(path)
            except OSError as error:
                raise UserError(
                    f"{path}, which keeps standard input, cannot be written ({error.strerror}): free some space or set "
                    "another run.dir"
                ) from error
            if self.spool.cut:
                self.messages.append(f"cut {self.spool.cut} bytes off {path}: a line whose rest never arrived")
        self.sampler = StreamSampler(
            path,
            settings,
            config.domain_names,
            tokenizer,
            config.data.sequence_length,
            config.run.seed,
            self._has_ended,
        )
        self._last_message_at = 0.0

    def _has_ended(self) -> bool:
        if self.spool is None:
            return False
        if self.spool.error is not None:
            raise UserError(
                f"standard input could not be kept in {self.spool.path} ({self.spool.error.strerror}): free some space"
            )
        return self.spool.ended

    def sync(self) -> None:
        """Make what arrived so far survive a power cut: a checkpoint is about to name its bytes."""
        if self.spool is not None:
            self.spool.secure()

    def take_idle_message(self) -> str | None:
        """A sentence once the stream has been silent for a while, and not again for a minute."""
        since, now = self.sampler.waiting_since, time.monotonic()
        if (
            since is None
            or now - since < _IDLE_SECONDS
            or (self._last_message_at and now - self._last_message_at < _QUIET_SECONDS)
        ):
            return None
        self._last_message_at = now
        read = f"{self.sampler.path} is read to byte {self.sampler.position}"
        return f"waiting for documents: {read}; Ctrl-C saves and ends"

    def close(self) -> None:
        """Stop reading; a thread that waits for a batch gives up."""
        self.sampler.stop()
        if self.spool is not None:
            self.spool.close()
