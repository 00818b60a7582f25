"""A run that learns from a stream: where its documents lie, and what it says while it waits for more."""

from __future__ import annotations

import time
from pathlib import Path

from pangu_sigma.config import Config
from pangu_sigma.config.data_section import STANDARD_INPUT
from pangu_sigma.data.growing_file import Spool
from pangu_sigma.data.stream_sampler import StreamSampler
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.errors import UserError

# Standard input cannot be read twice, so a run keeps what came through it here.
RECEIVED = "stream/received.jsonl"
_IDLE_SECONDS = 2.0
_QUIET_SECONDS = 60.0


class Stream:
    """The stream of `config` (`data.stream`), read from its beginning until the sampler is restored.

    `resumed`: what an earlier process received on standard input is learned first; else it goes. `messages`: what there
    is to say before training begins.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, resumed: bool) -> None:
        wanted = config.data.stream
        self.messages: list[str] = []
        self.spool: Spool | None = None
        path = Path(wanted.path)
        if wanted.path == STANDARD_INPUT:
            path = Path(config.run.dir) / RECEIVED
            try:
                if not resumed:
                    path.unlink(missing_ok=True)
                self.spool = Spool(path)
            except OSError as error:
                raise UserError(
                    f"{path}, which keeps standard input, cannot be written ({error.strerror}): free some space or set "
                    "another run.dir"
                ) from error
            if self.spool.cut:
                self.messages.append(f"cut {self.spool.cut} bytes off {path}: a line whose rest never arrived")
        self.sampler = StreamSampler(
            path, wanted, config.domain_names, tokenizer, config.data.sequence_length, config.run.seed, self._ended
        )
        self._said = 0.0

    def _ended(self) -> bool:
        if self.spool is None:
            return False
        if self.spool.error is not None:
            raise UserError(
                f"standard input could not be kept in {self.spool.path} ({self.spool.error.strerror}): free some space"
            )
        return self.spool.ended

    def secure(self) -> None:
        """What arrived so far survives a power cut: a checkpoint is about to name its bytes."""
        if self.spool is not None:
            self.spool.secure()

    def idle_message(self) -> str | None:
        """A sentence once the stream has been silent for a while, and not again for a minute."""
        since, now = self.sampler.waiting_since, time.monotonic()
        if since is None or now - since < _IDLE_SECONDS or (self._said and now - self._said < _QUIET_SECONDS):
            return None
        self._said = now
        read = f"{self.sampler.path} is read to byte {self.sampler.position}"
        return f"waiting for documents: {read}; Ctrl-C saves and ends"

    def close(self) -> None:
        """Stop reading; a batch that waits gives up."""
        self.sampler.stop()
        if self.spool is not None:
            self.spool.close()
