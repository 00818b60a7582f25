"""Server process: binds the socket, starts the engine thread, serves, drains at a signal that asks to stop.

`serve` runs the event loop in the thread that calls it; `Scheduler.start` adds the engine thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from pangu_sigma.checkpoint import resolve
from pangu_sigma.errors import UserError, argument
from pangu_sigma.generation import pick_domain
from pangu_sigma.generation.domain_inference_settings import DomainInferenceSettings
from pangu_sigma.monitor.progress import report
from pangu_sigma.serving.bounded_connection import BoundedConnection
from pangu_sigma.serving.http_app import create_app
from pangu_sigma.serving.openai_adapter import OpenAIAdapter
from pangu_sigma.serving.scheduler import Scheduler
from pangu_sigma.serving.served_model import ServedModel, StartupProgress
from pangu_sigma.serving.server_metrics import ServerMetrics
from pangu_sigma.serving.server_settings import TOKEN_VARIABLE, ServerLimits, ServerSettings
from pangu_sigma.signals import exit_code, interruption, interruption_message, may_handle_signals
from pangu_sigma.trained_model import stored_config
from parallel.comm.stop_signals import INSISTENT, STOP_SIGNALS

# Connections at once, idle ones included; answers are bounded by slots and queue long before. Many systems give a
# process 1024 open files.
_MOST_CONNECTIONS = 768
_BACKLOG = 1024


def serve(
    path: str | Path,
    settings: ServerSettings,
    announce: Callable[[str], None],
    on_start: Callable[[Callable[[], None]], None] = lambda request_stop: None,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve the model of a run or checkpoint folder until a signal asks to stop, then drain and return.

    `announce` gets the one line that names the address. `on_start` gets a function that stops as a signal does, from
    any thread; off the main thread, where no signal comes, nothing else does. `on_ready` gets the URL. Raises
    UserError for what the user can mend, before the model is loaded where that is possible; a fault of the engine
    later ends the server with that exception.
    """
    checkpoint = resolve(path)
    names = [domain.name for domain in stored_config(checkpoint).domains]
    domains = [name for name in names if name in {pick_domain(names, d) for d in settings.domains or names}]
    _check_inference(settings, domains)
    with contextlib.closing(_bind(settings)) as listening:
        if not settings.loopback and settings.token is None:
            report(
                f"Warning: {settings.host} can be reached from other machines and no token is set: anybody there can "
                f"use the model; set {TOKEN_VARIABLE}, or token= from Python, to ask for one",
                logging.WARNING,
            )
        model = ServedModel(Path(path), checkpoint, tuple(domains), settings.inference)
        asyncio.run(_serve(model, settings, listening, announce, on_start, on_ready))


def _check_inference(settings: ServerSettings, domains: list[str]) -> None:
    """Raises UserError, before the model is loaded, for an inference that these domains do not allow."""
    inference = settings.inference
    if inference != DomainInferenceSettings() and len(domains) < 2:
        raise UserError(
            f"{', '.join(map(argument, ('top', 'prior', 'prior_texts')))} are about the model id auto, which needs "
            "several domains: leave them out"
        )
    if inference.top > min(len(domains), settings.limits.slots):
        what = f"{len(domains)} domains" if inference.top > len(domains) else f"{settings.limits.slots} slots"
        raise UserError(f"{argument('top', inference.top)} is more than the {what} there are: set it lower")


async def _serve(
    model: ServedModel, settings: ServerSettings, listening: socket.socket, announce: Callable[[str], None],
    on_start: Callable[[Callable[[], None]], None], on_ready: Callable[[str], None],
) -> None:  # fmt: skip
    limits = settings.limits
    metrics = ServerMetrics(model.offered, limits.slots)
    loop = asyncio.get_running_loop()
    with _signals() as stop:
        on_start(lambda: None if loop.is_closed() else loop.call_soon_threadsafe(stop.on_signal, signal.SIGTERM))
        # 1. Start the engine thread, which loads and compiles, and wait for it or for a signal.
        report(f"Loading {model.path} …")
        stopped = asyncio.ensure_future(stop.wait())
        try:
            with StartupProgress() as startup:
                scheduler = Scheduler(lambda: model.engine(limits.slots, settings.warm_up, startup), limits, metrics)
                loading = asyncio.ensure_future(scheduler.start())
                await asyncio.wait({loading, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not loading.done():
                    raise _InterruptedStart
                engine = loading.result()
        except _InterruptedStart:
            if stop.by_signal:
                _leave_now(stop.signal_number)
            # The program goes on, and MindSpore takes no other thread beside the one that compiles.
            loading.cancel()
            startup.give_up()
            await scheduler.stop(None)
            return
        if startup.warning:
            report(f"Warning: {startup.warning}", logging.WARNING)
        # 2. Listen.
        adapter = OpenAIAdapter(model.offered, engine.tokenizer, engine.window, limits)
        try:
            # Not before the engine is ready: whoever connects shall be answered. Another server may have bound the
            # address meanwhile.
            listening.listen(_BACKLOG)
        except OSError as error:
            await scheduler.stop()
            raise _cannot_listen(settings, error) from error
        # 3. Serve until a signal comes, the engine fails or uvicorn ends by itself.
        server = _Server(create_app(scheduler, adapter, metrics, settings, model.created), limits)
        running = asyncio.ensure_future(server.serve(sockets=[listening]))
        failed = asyncio.ensure_future(asyncio.shield(scheduler.failed))
        announce(_startup_line(model, settings, listening, engine.window))
        on_ready(_url(settings, listening))
        await asyncio.wait({running, stopped, failed}, return_when=asyncio.FIRST_COMPLETED)
        # 4. Drain, then end what still runs, uvicorn and the engine thread.
        if stopped.done() and not failed.done():
            await _drain(scheduler, stop, limits.grace_seconds)
        scheduler.abandon()
        server.should_exit = True
        await running
        await scheduler.stop()
    if failed.done():
        raise failed.result()
    failed.cancel()


async def _drain(scheduler: Scheduler, stop: _Stop, seconds: float) -> None:
    """Let running answers finish, for `seconds` at most or until a second signal."""
    if scheduler.open:
        report(f"Draining: {scheduler.open} answers still run, {seconds:g} s at most; Ctrl-C again ends them")
    drained = asyncio.ensure_future(scheduler.drain(seconds))
    again = asyncio.ensure_future(stop.again.wait())
    await asyncio.wait({drained, again}, return_when=asyncio.FIRST_COMPLETED)
    if not (drained.done() and drained.result()):
        report(f"Ended {scheduler.open} answers before they were whole")
    drained.cancel()
    again.cancel()


class _InterruptedStart(Exception):
    """A signal came before the model was ready."""


class _Server(uvicorn.Server):
    """uvicorn without its own handling of signals, which would close the socket at once and die by the signal."""

    def __init__(self, app: Callable, limits: ServerLimits) -> None:
        # On h11: the one implementation that is always there, so that every installation behaves alike.
        config = uvicorn.Config(
            app,
            http=functools.partial(BoundedConnection, limits),
            ws="none",
            loop="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            limit_concurrency=_MOST_CONNECTIONS,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        # Its warnings tell of clients that speak no HTTP: nothing that whoever runs the server could mend.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Stop:
    """Stop event: set by the first signal that asks to stop, `again` by a further Ctrl-C or SIGTERM. by_signal: whether
    signals come here; signal_number: the first."""

    def __init__(self, by_signal: bool) -> None:
        self.by_signal = by_signal
        self.signal_number: int | None = None
        self._first = asyncio.Event()
        self.again = asyncio.Event()

    async def wait(self) -> None:
        """Until the first signal."""
        await self._first.wait()

    def on_signal(self, number: int) -> None:
        """Take note of a signal."""
        if self.signal_number is None:
            self.signal_number = number
            self._first.set()
        elif number in INSISTENT:
            self.again.set()


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    stop = _Stop(by_signal=may_handle_signals())
    loop = asyncio.get_running_loop()
    numbers = [n for n in STOP_SIGNALS if stop.by_signal and signal.getsignal(n) != signal.SIG_IGN]
    for signal_number in numbers:
        loop.add_signal_handler(signal_number, stop.on_signal, signal_number)
    try:
        yield stop
    finally:
        for signal_number in numbers:
            loop.remove_signal_handler(signal_number)


def _bind(settings: ServerSettings) -> socket.socket:
    """A socket at the address. Raises UserError, before the model is loaded."""
    try:
        addresses = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = addresses[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"the host '{settings.host}' is not known here ({error.strerror}); check it") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise _cannot_listen(settings, error) from error
    return listening


def _cannot_listen(settings: ServerSettings, error: OSError) -> UserError:
    address = f"{settings.host}:{settings.port}"
    return UserError(
        f"the server cannot listen on {address} ({error.strerror}); choose another port, 0 for a free one"
    )


def _leave_now(signal_number: int) -> None:
    """End the process while another thread is inside MindSpore, which an orderly end would wait for or tear down."""
    print(interruption_message(interruption(signal_number)), file=sys.stderr, flush=True)
    os._exit(exit_code(signal_number))


def _url(settings: ServerSettings, listening: socket.socket) -> str:
    host, port = settings.host, listening.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _startup_line(model: ServedModel, settings: ServerSettings, listening: socket.socket, window: int) -> str:
    base = _url(settings, listening)
    slots = settings.limits.slots
    return (
        f"Serving {', '.join(model.offered)} of {model.path} at {base}/v1 (page: {base}/), "
        f"{slots} at a time, window {window} tokens"
    )
