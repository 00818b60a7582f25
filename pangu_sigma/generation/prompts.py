"""Prompts of the command line: read from an option, a file or standard input, and checked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pangu_sigma.errors import UserError
from pangu_sigma.json_reader import UnreadableText, parse_object
from pangu_sigma.regular_file import regular


@dataclass(frozen=True)
class Prompt:
    """One text to continue; `domain` and `seed` where it has its own."""

    text: str
    domain: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class PromptSource:
    """Source of prompts: `prompt` itself, `file` ("-" is standard input), or standard input if neither is given.

    With `jsonl`, every line is a prompt of its own.
    """

    prompt: str | None = None
    file: Path | None = None
    jsonl: bool = False

    def read(self) -> list[Prompt]:
        """The prompts. Raises UserError naming the file, and the line where one is at fault."""
        if self.prompt is not None:
            if self.file is not None or self.jsonl:
                raise UserError("--prompt cannot be given together with --file or --jsonl; leave one out")
            return [Prompt(self.prompt)]
        text, name = self._read()
        if self.jsonl:
            prompts = list(_parse_lines(text, name))
            if not prompts:
                raise UserError(f'{name} holds no prompt; give one {{"prompt": TEXT}} a line')
            return prompts
        # Editors and `echo` end a text with a line end that is not meant to be continued behind.
        return [Prompt(text.removesuffix("\n").removesuffix("\r"))]

    def _read(self) -> tuple[str, str]:
        standard = self.file is None or str(self.file) == "-"
        name = "standard input" if standard else str(self.file)
        if self.file is None and sys.stdin.isatty():
            raise UserError("no text is given; use --prompt TEXT or --file FILE, or pipe a text into standard input")
        try:
            data = sys.stdin.buffer.read() if standard else regular(self.file).read_bytes()
        except OSError as error:
            raise UserError(f"{name} cannot be read ({error.strerror}); check --file") from error
        try:
            return data.decode("utf-8-sig"), name
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is not UTF-8 text at byte {error.start}; convert it") from error


def _parse_lines(text: str, name: str) -> Iterator[Prompt]:
    for line_number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        source = f"line {line_number} of {name}"
        try:
            value = parse_object(line)
        except UnreadableText as error:
            raise UserError(f'{source} is {error.problem}; write {{"prompt": TEXT}}') from error
        if not isinstance(value.get("prompt"), str):
            raise UserError(f'{source} has no text under "prompt"; write {{"prompt": TEXT}}')
        unknown = set(value) - {"prompt", "domain", "seed"}
        if unknown:
            raise UserError(f'{source} has the unknown key "{min(unknown)}"; known are prompt, domain and seed')
        domain, seed = value.get("domain"), value.get("seed")
        if not isinstance(domain, str | None) or not (seed is None or type(seed) is int):
            raise UserError(f'{source}: "domain" must be text and "seed" a whole number')
        yield Prompt(value["prompt"], domain, seed)
