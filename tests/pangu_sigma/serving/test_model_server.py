"""A server in a thread of the program: how its start is given up, how signals end it, what it shows. No model."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pangu_sigma.errors import UserError
from pangu_sigma.monitor.progress import progress_shown
from pangu_sigma.serving import server as server_module
from pangu_sigma.serving.model_server import ModelServer
from pangu_sigma.serving.server_settings import ServerSettings
from pangu_sigma.signals import restore_ctrl_c


@pytest.fixture
def serve_with(monkeypatch):
    """A `ModelServer` whose server is the given function of on_start and on_ready."""

    def make(body) -> ModelServer:
        monkeypatch.setattr(server_module, "serve", lambda model, settings, say, start, ready: body(start, ready))
        return ModelServer(Path("model"), ServerSettings())

    return make


def test_a_stop_before_the_server_has_an_event_loop_is_kept(serve_with):
    waits, asked = threading.Event(), threading.Event()

    def body(on_start, on_ready) -> None:
        asked.wait(10)
        on_start(waits.set)
        assert waits.wait(10)

    server = serve_with(body)
    starting = threading.Thread(target=server.start)
    starting.start()
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    time.sleep(0.05)
    asked.set()
    starting.join(10)
    stopping.join(10)
    assert waits.is_set() and not starting.is_alive() and not stopping.is_alive() and server.url is None


# Slow not for its time: a signal that comes late ends the whole process of tests.
@pytest.mark.slow
def test_a_second_ctrl_c_asks_again_and_the_call_waits_for_the_end(serve_with):
    requests, ended = [], threading.Event()
    restore_ctrl_c()  # from MindSpore, which another test may have used

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def request_stop() -> None:
        requests.append("stop")
        if len(requests) == 1:
            threading.Timer(0.2, interrupt).start()
        else:
            ended.set()

    def body(on_start, on_ready) -> None:
        on_start(request_stop)
        on_ready("http://127.0.0.1:1")
        threading.Timer(0.2, interrupt).start()
        assert ended.wait(10)
        time.sleep(0.1)
        requests.append("ended")

    serve_with(body).run()
    assert requests == ["stop", "stop", "ended"]


def serve_fake(engine, on_start=lambda stop: None) -> None:
    """`server._serve` of a model whose `engine` is the given function of the startup."""
    model = SimpleNamespace(
        offered=("code",), path=Path("model"), created=0, engine=lambda slots, warm_up, startup: engine(startup)
    )

    async def body() -> None:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            await server_module._serve(
                model, ServerSettings(), listening, lambda line: None, on_start, lambda url: None
            )

    asyncio.run(body())


def in_a_thread(function) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


def test_a_start_that_is_given_up_ends_the_engine_thread():
    compiled = []

    def engine(startup):
        for graph in range(1000):
            compiled.append(graph)
            startup.on_compiled(graph, 1000)
            time.sleep(0.01)

    in_a_thread(lambda: serve_fake(engine, lambda stop: threading.Timer(0.1, stop).start()))
    assert 0 < len(compiled) < 1000
    assert not [thread for thread in threading.enumerate() if thread.name == "engine"]


def test_a_hidden_start_draws_no_bar(capfd):
    def engine(startup):
        startup.on_compiled(0, 2)
        time.sleep(1.1)  # lines come a second apart
        startup.on_compiled(1, 2)
        time.sleep(0.1)
        raise UserError("no")

    def serve() -> None:
        with progress_shown(False), pytest.raises(UserError):
            serve_fake(engine)

    in_a_thread(serve)
    assert capfd.readouterr() == ("", "")


def test_what_is_wrong_with_a_domain_is_a_warning_where_progress_is_hidden(caplog):
    def engine(startup):
        startup.warning = "domain law writes no numbers"
        return SimpleNamespace()  # which has not what comes next

    with progress_shown(False), caplog.at_level("INFO", "pangu_sigma"), pytest.raises(AttributeError):
        serve_fake(engine)
    levels = {record.getMessage(): record.levelname for record in caplog.records if record.name == "pangu_sigma"}
    assert levels == {"Loading model …": "INFO", "Warning: domain law writes no numbers": "WARNING"}
