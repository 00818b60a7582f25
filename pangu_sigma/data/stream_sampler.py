"""Stream sampler: training batches from an endless stream of documents, in the order in which they arrive.

Every domain's documents are strung together; whenever S + 1 tokens of a domain are there, they are its next sequence
(neighbours share one token, so that each token is a label once), and B sequences are a step's batch. So a batch depends
on the documents' order alone, not on when they came, and a resumed run learns what an uninterrupted one would have.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pangu_sigma.config.data_section import StreamConfig
from pangu_sigma.data.corpus_files import document_form, json_object, text_of
from pangu_sigma.data.growing_file import GrowingFileReader, StreamLine, digests_before
from pangu_sigma.data.mixture_sampler import Batch
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.errors import UserError

STATE_KIND = "stream"
_STATE_VERSION = 1
_POLL_SECONDS = 0.05


class StreamEnded(Exception):
    """The stream has ended and fewer sequences than a batch takes are left."""


class StreamSampler:
    """Sampler of batches from the documents of the growing file ``path``; has the methods of ``MixtureSampler``.

    ``domains``: names in the order of their numbers. ``ended()``: whether nothing more will be written to the file. A
    batch waits until it is full; ``waiting_since`` is the monotonic time since which it does, None while it does not.
    Raises UserError that names file and line for a document that cannot be used: the good ones before it stand.
    """

    def __init__(
        self,
        path: Path,
        config: StreamConfig,
        domains: Sequence[str],
        tokenizer: Tokenizer,
        sequence_length: int,
        seed: int,
        ended: Callable[[], bool] = lambda: False,
    ):
        self.path = path
        self.domains = list(domains)
        self.waiting_since: float | None = None
        self._config = config
        self._tokenizer = tokenizer
        self._length = sequence_length
        self._seed = seed
        self._ended = ended
        self._stop = threading.Event()
        self._step = 0
        self._sample = 0
        self._sequences = np.zeros(len(self.domains), np.int64)
        self._file = GrowingFileReader(path)
        self._tails = {name: np.empty(0, np.int32) for name in self.domains}
        self._line: StreamLine | None = None  # the document whose sequences are being given
        self._given = 0  # sequences that it gave already
        self._ready: list[tuple[int, np.ndarray]] = []  # what it still has to give

    # --- batches

    def next_batch(self, batch_size: int, rows: slice | None = None) -> Batch:
        """The next ``batch_size`` sequences, or ``rows`` of them; waits. Raises StreamEnded where none will come."""
        tokens = np.empty((batch_size, self._length + 1), np.int32)
        domain = np.empty(batch_size, np.int32)
        for row in range(batch_size):
            domain[row], tokens[row] = self._next_sequence()
        local_rows = np.arange(batch_size)[rows or slice(None)]
        batch = Batch(tokens[local_rows], domain[local_rows], self._sample + local_rows, self._step)
        self._sequences += np.bincount(domain, minlength=len(self.domains))
        self._sample += batch_size
        self._step += 1
        return batch

    def _next_sequence(self) -> tuple[int, np.ndarray]:
        while not self._ready:
            self._line = None
            line = self._wait_for_line()
            self._open(line)
        self._given += 1
        return self._ready.pop(0)

    def _wait_for_line(self) -> StreamLine:
        while True:
            # Asked before looking: what was written until then is seen.
            over = self._ended()
            line = self._file.next_line()
            if line is not None:
                self.waiting_since = None
                return line
            if over or self._stop.is_set():
                raise StreamEnded
            if self.waiting_since is None:
                self.waiting_since = time.monotonic()
            self._stop.wait(_POLL_SECONDS)

    def _open(self, line: StreamLine, given: int = 0) -> None:
        """Take a document in: its sequences but the first ``given`` are ready, the rest is its domain's tail."""
        self._line, self._given, self._ready = line, given, []
        name, ids = self._read(line)
        if not len(ids):
            return
        string = np.concatenate([self._tails[name], ids, [self._tokenizer.eod_id]]).astype(np.int32)
        count = max(0, (len(string) - 1) // self._length)
        domain_id = self.domains.index(name)
        starts = range(given * self._length, count * self._length, self._length)
        self._ready = [(domain_id, string[start : start + self._length + 1]) for start in starts]
        self._before = self._tails
        self._tails = {**self._tails, name: string[count * self._length :]}

    def _read(self, line: StreamLine) -> tuple[str, np.ndarray]:
        """(domain, token ids) of a line; no ids for one without text."""
        if not line.content.strip():
            return self.domains[0], np.empty(0, np.int32)
        where, config = f"{self.path}:{line.line_number}", self._config
        try:
            text = line.content.decode("utf-8-sig" if line.start == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: the line is not UTF-8 ({error.reason}); write it as UTF-8") from error
        record = json_object(text, where, document_form(config.text_field))
        name = config.domain
        if name is None:
            if config.domain_field not in record:
                raise UserError(
                    f"{where}: the field '{config.domain_field}' is missing, which names the document's domain; set "
                    "data.stream.domain_field, or data.stream.domain for all documents"
                )
            name = record[config.domain_field]
        if name not in self.domains:
            raise UserError(
                f"{where}: the domain {name!r} is not one of the run's ({', '.join(self.domains)}); correct the line, "
                "or add the domain with pangu-sigma domains add"
            )
        document = text_of(record, where, config.text_field, "set data.stream.text_field")
        ids = self._tokenizer.encode_batch([document])[0] if document.strip() else np.empty(0, np.int32)
        return name, ids

    # --- state

    @property
    def position(self) -> int:
        """The byte up to which documents have been taken in."""
        return self._file.offset

    def state(self) -> dict:
        """A JSON-able snapshot: the byte of the next document, or of the one whose sequences are being given and how
        many it gave; every domain's tokens that were left over before it, and how many sequences it has given.
        """
        line = self._line if self._ready else None
        byte, line_number = (line.start, line.line_number) if line else (self._file.offset, self._file.line_number)
        tails = self._before if line else self._tails
        return {
            "kind": STATE_KIND,
            "version": _STATE_VERSION,
            "seed": self._seed,
            "step": self._step,
            "sample": self._sample,
            "sequence_length": self._length,
            "tokenizer": self._tokenizer.fingerprint,
            "byte": byte,
            "line": line_number,
            "given": self._given if line else 0,
            "domains": {n: {"cursor": int(count)} for n, count in zip(self.domains, self._sequences, strict=True)},
            "tails": {name: tail.tolist() for name, tail in tails.items() if len(tail)},
            "read": digests_before(self.path, byte),
        }

    def restore(self, state: Mapping, allow_new_domains: bool = False) -> None:
        """Continue from ``state()`` at its byte; a new domain begins without tokens left over, allowed or not.

        Raises UserError where what the file holds before it is not what was learned from, or other settings differ.
        """
        if state.get("kind") != STATE_KIND or state.get("version") != _STATE_VERSION:
            raise UserError(
                "the run has learned from its domains' files, not from a stream: begin a new run with run.init_from, "
                "or resume without data.stream"
            )
        for what, current in (("seed", self._seed), ("sequence_length", self._length),
                           ("tokenizer", self._tokenizer.fingerprint)):  # fmt: skip
            if state[what] != current:
                raise UserError(f"the stream was read with another {what.replace('_', ' ')}: restore it to resume")
        byte = int(state["byte"])
        if digests_before(self.path, byte) != state["read"]:
            raise UserError(
                f"the stream {self.path} does not hold before byte {byte} what the run has learned from: restore it, "
                "or begin a new run with run.init_from"
            )
        self._step, self._sample = int(state["step"]), int(state["sample"])
        given = {name: int(entry["cursor"]) for name, entry in state["domains"].items()}
        self._sequences = np.array([given.get(name, 0) for name in self.domains], np.int64)
        kept = {name: np.array(tail, np.int32) for name, tail in state["tails"].items() if name in self.domains}
        self._tails = {name: kept.get(name, np.empty(0, np.int32)) for name in self.domains}
        self._file.close()
        self._file = GrowingFileReader(self.path, byte, int(state["line"]))
        self._ready = []
        if state["given"]:
            line = self._file.next_line()
            if line is None:
                raise UserError(f"the stream {self.path} ends before line {state['line']} is complete: restore it")
            self._open(line, int(state["given"]))

    def stop(self) -> None:
        """Make a batch that waits give up; may be called from any thread."""
        self._stop.set()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
