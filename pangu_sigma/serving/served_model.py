"""Served model: loads a folder's model, compiles its graphs and lets it write once in every domain, before serving."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from pangu_sigma.checkpoint import Checkpoint
from pangu_sigma.errors import UserError
from pangu_sigma.generation import AUTO, Request, Sampling
from pangu_sigma.generation.domain_inference_settings import DomainInferenceSettings
from pangu_sigma.monitor.progress import Job, progress
from pangu_sigma.serving.scheduler import DecodingEngine


class StartupProgress:
    """Progress of the startup: reported by the engine thread, drawn on the event loop.

    A context manager of the event loop's thread, so that the terminal is given back however the start ends. `warning`:
    what is wrong with single domains, set by the engine thread before the engine is handed over.
    """

    def __init__(self) -> None:
        self.warning = ""
        self._given_up = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._screen = contextlib.ExitStack()
        self._job: Job | None = None

    def __enter__(self) -> StartupProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._screen.__exit__(kind, error, trace)

    def give_up(self) -> None:
        """Let the engine thread end at its next report."""
        self._given_up.set()

    def check(self) -> None:
        """Raises UserError where the start was given up."""
        if self._given_up.is_set():
            raise UserError("the server was stopped before it was ready: start it again")

    def on_compiled(self, done: int, total: int) -> None:
        """Report `done` of `total` compiled graphs, from any thread. Raises UserError where the start was given up."""
        self.check()
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._show, done, total)

    def _show(self, done: int, total: int) -> None:
        if self._job is None:
            self._job = self._screen.enter_context(progress("compile", total, unit="graphs"))
        self._job.set(done)


@dataclass(frozen=True)
class ServedModel:
    """A model to serve: its folder, the domains of it that are offered, and how a prompt's domain is inferred."""

    path: Path
    checkpoint: Checkpoint
    domains: tuple[str, ...]
    inference: DomainInferenceSettings

    @property
    def offered(self) -> tuple[str, ...]:
        """The model ids: the domains, and `auto` where there are several to choose from."""
        return (*self.domains, AUTO) if len(self.domains) > 1 else self.domains

    @property
    def created(self) -> int:
        """When it was written, in seconds since 1970."""
        return int((self.checkpoint.path / "manifest.json").stat().st_mtime)

    def engine(self, slots: int, warm_up: bool, startup: StartupProgress) -> DecodingEngine:
        """Load the model, compile, and let it write in every domain and all slots. Runs on the engine thread.

        A domain that cannot write is named in `startup.warning`; UserError if none can.
        """
        from pangu_sigma.generation.engine import Engine
        from pangu_sigma.trained_model import trained_from

        trained = trained_from(self.checkpoint)
        engine = Engine(trained.model, trained.tokenizer, slots)
        if AUTO in self.offered:
            self.inference.apply(engine, self.domains)
        if warm_up:
            engine.warm_up(startup.on_compiled)
        # One block of a prompt is read in a step, several for a text whose domain is inferred: the first text still
        # writes when the last begins.
        offered = list(itertools.islice(itertools.cycle(self.offered), max(slots, len(self.offered))))
        blocks = sum(1 if name != AUTO else len(self.domains) + self.inference.top for name in offered)
        sampling = Sampling(max_tokens=blocks + 1, temperature=0.0)
        domain_of = {engine.add(Request((trained.tokenizer.eod_id,), name, sampling)): name for name in offered}
        errors: dict[str, str] = {}
        prior = engine.domain_inference.prior
        while not engine.idle:
            startup.check()
            errors |= {domain_of[event.request_id]: event.error for event in engine.step() if event.error}
        engine.domain_inference.prior = prior  # these texts are no evidence of what clients will send
        errors.pop(AUTO, None)  # the domains have the errors of their own
        if errors.keys() >= set(self.domains):
            raise UserError(next(iter(errors.values())))
        startup.warning = "; ".join(errors.values())
        return engine
