"""From a folder to an engine that is ready for every request: loaded, compiled, tried in every domain."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from pangu_sigma.checkpoint import Checkpoint
from pangu_sigma.errors import UserError
from pangu_sigma.generation import AUTO, Request, Sampling
from pangu_sigma.generation.inference_settings import Inference
from pangu_sigma.monitor.progress import Job, progress
from pangu_sigma.serving.scheduler import Engine


class Starting:
    """What the engine's thread tells while it starts. The event loop draws it, and gives the terminal back however the
    start ends: use it as a context there."""

    def __init__(self) -> None:
        self.warning = ""
        self._loop = asyncio.get_running_loop()
        self._screen = contextlib.ExitStack()
        self._job: Job | None = None

    def __enter__(self) -> Starting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._screen.__exit__(kind, error, trace)

    def compiled(self, done: int, total: int) -> None:
        """From any thread: so many of all graphs are compiled."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._show, done, total)

    def _show(self, done: int, total: int) -> None:
        if self._job is None:
            self._job = self._screen.enter_context(progress("compile", total, unit="graphs"))
        self._job.set(done)


@dataclass(frozen=True)
class ServedModel:
    """A model's folder, the domains of it that are offered, and how a prompt's domain is inferred."""

    path: Path
    checkpoint: Checkpoint
    domains: tuple[str, ...]
    inference: Inference

    @property
    def offered(self) -> tuple[str, ...]:
        """The model ids: the domains, and `auto` where there are several to choose from."""
        return (*self.domains, AUTO) if len(self.domains) > 1 else self.domains

    @property
    def created(self) -> int:
        """When it was written, in seconds since 1970."""
        return int((self.checkpoint.path / "manifest.json").stat().st_mtime)

    def engine(self, slots: int, warm_up: bool, starting: Starting) -> Engine:
        """Load the model, compile, and let it write in every domain and all slots, for the engine's thread.

        A domain that cannot write is named in `starting.warning`; UserError if none can.
        """
        from pangu_sigma.generation.engine import Engine
        from pangu_sigma.trained_model import trained_from

        trained = trained_from(self.checkpoint)
        engine = Engine(trained.model, trained.tokenizer, slots)
        if AUTO in self.offered:
            self.inference.apply(engine, self.domains)
        if warm_up:
            engine.warm_up(starting.compiled)
        # One text a step is admitted: the first still writes when the last slot is taken.
        sampling = Sampling(max_tokens=slots + 2, temperature=0.0)
        domain_of = {
            engine.add(Request((trained.tokenizer.eod_id,), domain, sampling)): domain
            for _, domain in zip(range(max(slots, len(self.offered))), itertools.cycle(self.offered), strict=False)
        }
        errors: dict[str, str] = {}
        prior = engine.unknown.prior
        while not engine.idle:
            errors |= {domain_of[event.request_id]: event.error for event in engine.step() if event.error}
        engine.unknown.prior = prior  # nobody asked for these texts
        errors.pop(AUTO, None)  # what is wrong is said of the domain
        if errors.keys() >= set(self.domains):
            raise UserError(next(iter(errors.values())))
        starting.warning = "; ".join(errors.values())
        return engine
