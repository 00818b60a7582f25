"""A real HTTP server in this process whose model is a function of NumPy: nothing compiled, prompts of many blocks."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.serving.http_app import create_app
from pangu_sigma.serving.openai_adapter import OpenAIAdapter
from pangu_sigma.serving.scheduler import Scheduler
from pangu_sigma.serving.server import _Server
from pangu_sigma.serving.server_metrics import ServerMetrics
from pangu_sigma.serving.server_settings import ServerLimits, ServerSettings
from tests.pangu_sigma.generation.toy_engine import NAMES, toy_engine


@contextlib.contextmanager
def toy_server(tokenizer: Tokenizer, limits: ServerLimits) -> Iterator[tuple[str, Scheduler]]:
    """URL and scheduler of a server with limits."""
    offered = (*NAMES, "auto")
    ready, made = threading.Event(), []

    async def serve(listening: socket.socket) -> None:
        metrics = ServerMetrics(offered, limits.slots)
        scheduler = Scheduler(lambda: toy_engine(tokenizer, tokenizer.vocab_size, limits.slots), limits, metrics)
        engine = await scheduler.start()
        adapter = OpenAIAdapter(offered, tokenizer, engine.window, limits)
        server = _Server(create_app(scheduler, adapter, metrics, ServerSettings(limits=limits), 0), limits)
        made[:] = server, scheduler
        ready.set()
        await server.serve(sockets=[listening])
        scheduler.abandon()
        await scheduler.stop()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=lambda: asyncio.run(serve(listening)), daemon=True)
        thread.start()
        assert ready.wait(60)
        server, scheduler = made
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", scheduler
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
