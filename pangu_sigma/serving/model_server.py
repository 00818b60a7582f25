"""A server in a thread of the program that asks for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path

from pangu_sigma.monitor.progress import report
from pangu_sigma.serving.server_settings import ServerSettings
from pangu_sigma.signals import stop_signals_raise


class ModelServer:
    """HTTP server of a model, with a thread of its own; a context manager that stops it.

    url: where it answers, with http:// and the port; None before it is ready.
    """

    def __init__(self, model: Path, settings: ServerSettings) -> None:
        self.model = model
        self.settings = settings
        self.url: str | None = None
        self._thread: threading.Thread | None = None
        self._request_stop: Callable[[], None] = lambda: None
        self._stopping = threading.Event()
        self._settled = threading.Event()  # ready, or ended before
        # Not Thread.join: a Ctrl-C that interrupts it marks the thread as ended.
        self._ended = threading.Event()
        self._error: BaseException | None = None

    def __repr__(self) -> str:
        return f"ModelServer({str(self.model)!r}, url={self.url!r})"

    def __fspath__(self) -> str:
        return str(self.model)

    def __enter__(self) -> ModelServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> ModelServer:
        """Load the model and return when clients can come. Raises UserError for what keeps it from that."""
        # What the caller's thread shows of progress, this one shows.
        context = copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._serve,), name="server", daemon=True)
        self._thread.start()
        try:
            self._settled.wait()
        except BaseException:
            self.stop()
            raise
        if self._error is not None:
            self.stop()
        return self

    def serve(self, announce: Callable[[str], None] = report) -> None:
        """Serve in this thread, as the command does, which ends the process where a signal interrupts the start.

        announce: gets the one line that names the address.
        """
        from pangu_sigma.serving.server import serve

        serve(self.model, self.settings, announce, self._on_start, self._on_ready)

    def run(self) -> None:
        """Serve until Ctrl-C or SIGTERM comes to the main thread, or another thread calls `stop`."""
        with stop_signals_raise():
            try:
                self.start()
                self._join()
            except KeyboardInterrupt:
                pass
            try:
                self.stop()
            except KeyboardInterrupt:
                self.stop()

    def stop(self) -> None:
        """Let the answers under way end, and stop; asked again meanwhile, end them at once.

        A start under way is given up. Raises the error by which the server ended, if it did.
        """
        self._stopping.set()
        self._request_stop()
        self._join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _join(self) -> None:
        if self._thread is not None:
            self._ended.wait()

    def _serve(self) -> None:
        try:
            self.serve()
        except BaseException as error:  # raised where the server was asked for
            self._error = error
        finally:
            self._ended.set()
            self._settled.set()

    def _on_start(self, request_stop: Callable[[], None]) -> None:
        self._request_stop = request_stop
        if self._stopping.is_set():
            request_stop()

    def _on_ready(self, url: str) -> None:
        self.url = url
        self._settled.set()
