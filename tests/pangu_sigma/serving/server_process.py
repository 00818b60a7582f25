"""A real server process on a free port, and what its /health and /metrics say."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from tests.pangu_sigma.training.training_process import _environment

_ADDRESS = re.compile(r"Serving (.+) of .+ at (http://\S+)/v1 \(page: (\S+)\)")


class Server:
    """`pangu-sigma serve MODEL --port 0 OPTIONS`, ready when made. Its stderr goes to the file `log`."""

    def __init__(self, model: Path, folder: Path, *options: object, environment: dict[str, str] | None = None) -> None:
        self.model = model
        self.log = folder / "server.log"
        words = [sys.executable, "-m", "pangu_sigma", "serve", model, "--port", "0", *options]
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [*map(str, words)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=folder,
                env={**_environment(), **(environment or {})},
            )
        self.line = self.process.stdout.readline()
        match = _ADDRESS.match(self.line)
        if match is None:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"no address in {self.line!r}\n{self.stderr_text()}")
        self.domains, self.url, self.page = match[1].split(", "), match[2], match[3]

    def stderr_text(self) -> str:
        """What the server wrote to stderr so far."""
        return self.log.read_text(encoding="utf-8")

    def client(self, **options) -> httpx.Client:
        """A plain HTTP client of it, with room for a slow machine."""
        return httpx.Client(base_url=self.url, timeout=60.0, **options)

    def gauge(self, name: str, **options) -> float:
        """A number of /metrics by its full name (with labels, if it has some)."""
        with self.client(**options) as client:
            match = re.search(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
        assert match, f"{name} is not in /metrics"
        return float(match[1])

    def wait_for(self, active: int, waiting: int, seconds: float = 20.0) -> None:
        """Until the engine's own count says so."""
        deadline = time.monotonic() + seconds
        with self.client() as client:
            while True:
                health = client.get("/health").json()
                if (health["active"], health["waiting"]) == (active, waiting):
                    return
                assert time.monotonic() < deadline, f"not {active} active and {waiting} waiting, but {health}"
                time.sleep(0.02)

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)
        self.process.stdout.close()
        return self.process.returncode
