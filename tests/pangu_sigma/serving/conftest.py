"""A small model with a window long enough to be served, and a server that most tests share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from pangu_sigma.checkpoint import open_checkpoint
from tests.pangu_sigma.altered_checkpoint import alter
from tests.pangu_sigma.serving.server_process import Server
from tests.pangu_sigma.training.training_process import trained_two_steps

WINDOW = 96


@pytest.fixture(scope="session")
def served_run(small_yaml, tmp_path_factory) -> Path:
    return trained_two_steps(small_yaml, tmp_path_factory.mktemp("served"), WINDOW)


@pytest.fixture(scope="session")
def server(served_run, tmp_path_factory) -> Iterator[Server]:
    """Slots and a queue that hold 100 clients."""
    server = Server(served_run, tmp_path_factory.mktemp("server"), "--slots", 8, "--queue", 120)
    yield server
    assert server.stop() == 0, server.stderr_text()


@pytest.fixture
def client(server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture
def copied_served_run(served_run, tmp_path) -> Path:
    """A copy to damage."""
    shutil.copytree(served_run, tmp_path / "copied")
    return tmp_path / "copied"


@pytest.fixture(scope="session")
def broken_run(served_run, tmp_path_factory) -> Path:
    """A copy whose domain `law` computes no numbers, as after a training that diverged."""

    def diverge(content: bytearray) -> None:
        content[:] = np.full(len(content) // 4, np.nan, np.float32).tobytes()

    run = tmp_path_factory.mktemp("broken") / "run"
    shutil.copytree(served_run, run)
    (checkpoint,) = (run / "checkpoints").iterdir()
    layer_name = next(iter(open_checkpoint(checkpoint).coverage))
    alter(checkpoint, f"domains.law.{layer_name}.experts.down.bias", diverge)
    return run
