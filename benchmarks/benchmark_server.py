"""A system under measurement: a process that answers requests, a line each, with a line of JSON."""

from __future__ import annotations

import json
import subprocess
import tempfile


class ServerFailed(RuntimeError):
    """A system under measurement ended or answered something else than figures."""


class Server:
    """Runs `command` for the length of a `with` block; it is ready when the block begins."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.command = command
        self.parameters = 0

    def __enter__(self) -> Server:
        self._complaints = tempfile.TemporaryFile("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints, text=True
        )
        try:
            self.parameters = self._answer()["parameters"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._complaints.close()

    def steps(self, count: int) -> dict[str, list[float]]:
        """Do `count` steps; return `seconds` and `losses` of each. Raises ServerFailed."""
        return self.ask(f"step {count}")

    def ask(self, request: str) -> dict:
        """The answer to a request of one line. Raises ServerFailed."""
        try:
            self._process.stdin.write(f"{request}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reading end says why
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        try:
            answer = json.loads(line)
        except ValueError:
            answer = {"error": line.strip()}
        if not line or "error" in answer:
            self._complaints.seek(0)
            last_lines = self._complaints.read().strip().splitlines()[-5:]
            raise ServerFailed(f"{self.name} failed: {answer.get('error') or ' / '.join(last_lines) or 'it ended'}")
        return answer
