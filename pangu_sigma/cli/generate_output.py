"""What `pangu-sigma generate` prints: text as it comes, or a JSON object for each prompt."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from pangu_sigma.errors import UserError
from pangu_sigma.monitor.printable_text import compact, printable_lines

if TYPE_CHECKING:
    from pangu_sigma.generation.completion import Completion
    from pangu_sigma.generation.generate_job import GenerateJob
    from pangu_sigma.generation.request import Event


def print_object(job: GenerateJob) -> None:
    """Continue the one prompt, and print its answer as one JSON object."""
    (completion,) = job.run()
    _write(_json(job, 0, completion))


def print_text(job: GenerateJob, stream: bool) -> None:
    """Continue the one prompt, and print it and its text: as it comes, or at the end."""
    (prompt,) = job.prompts
    # A model may write control characters; a terminal must not obey them. A file or a pipe gets every character.
    shown = _terminal_text if sys.stdout.isatty() else str
    began = time.monotonic()
    first: float | None = None

    def on_event(_: int, event: Event, __: Completion) -> None:
        nonlocal first
        first = first or time.monotonic()
        if stream and event.text:
            _write(shown(event.text))

    if stream:
        _write(shown(prompt.text))
    try:
        (completion,) = job.run(on_event)
        if not stream:
            _write(shown(prompt.text + completion.text))
    finally:
        # The prompt of the shell begins a line of its own, after an interruption too.
        if stream or first:
            _write("\n")
    written, after = len(completion.events), time.monotonic() - first
    rate = f", the others at {compact((written - 1) / after)} tokens/s" if written > 1 else ""
    if completion.events[-1].domains:
        print(domains_text(completion.events[-1].domains), file=sys.stderr)
    why = {"stop": "the text ended", "length": "max-tokens or the window's end was reached"}[completion.finish]
    total = f"{written} tokens in {time.monotonic() - began:.1f} s"
    print(f"{total}: the first after {first - began:.1f} s{rate}; {why}", file=sys.stderr)


def print_lines(job: GenerateJob) -> None:
    """A JSON line for every prompt, in their order, as soon as those before it are printed.

    One that fails has its error in its line, and the command ends with the first of them.
    """
    from pangu_sigma.monitor.progress import progress

    done: dict[int, Completion] = {}
    printed = 0
    with progress("generate", len(job.prompts), unit="prompts") as bar:

        def on_event(index: int, event: Event, completion: Completion) -> None:
            nonlocal printed
            if not event.finish:
                return
            done[index] = completion
            while printed in done:
                _write(_json(job, printed, done.pop(printed)))
                printed += 1
            bar.advance()

        completions = job.run(on_event, keep_going=True)
    failed = {position: completion.error for position, completion in enumerate(completions, 1) if completion.error}
    if failed:
        position, error = next(iter(failed.items()))
        raise UserError(f"{len(failed)} of {len(completions)} prompts failed; prompt {position}: {error}")


def _json(job: GenerateJob, index: int, completion: Completion) -> str:
    return json.dumps(job.record(index, completion), ensure_ascii=False) + "\n"


def domains_text(domains: Sequence[tuple[str, float]]) -> str:
    """The inferred domains in one line, with their probabilities."""
    shares = ", ".join(f"{name} ({100 * share:.0f} %)" for name, share in domains)
    return f"domain {shares}" if len(domains) == 1 else f"domains {shares}"


def _terminal_text(text: str) -> str:
    return "\t".join(printable_lines(part) for part in text.split("\t"))


def _write(text: str, out: TextIO | None = None) -> None:
    out = out or sys.stdout
    out.write(text)
    out.flush()


class PipedOutput:
    """Context in which the command ends quietly when whoever reads standard output has gone (`| head`)."""

    def __enter__(self) -> None:
        # Text of any language goes out, whatever the locale says.
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(encoding="utf-8", newline="")

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> bool:
        if not isinstance(error, BrokenPipeError):
            return False
        # Python flushes standard output at its end, and would complain there once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return True
