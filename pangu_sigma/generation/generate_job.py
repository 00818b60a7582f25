"""Generate job of the command line: reads prompts, loads a model, runs its engine and prints text or JSON.

Mistakes in the options and prompts are found before the model is loaded.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pangu_sigma.errors import UserError
from pangu_sigma.generation.completion import Completion, complete
from pangu_sigma.generation.domain_inference_settings import DomainInferenceSettings
from pangu_sigma.generation.prompts import Prompt, PromptSource
from pangu_sigma.generation.request import AUTO, Event, Request, Sampling, pick_domain, prompt_ids
from pangu_sigma.monitor.printable_text import compact, printable_lines
from pangu_sigma.signals import sigterm_as_ctrl_c

if TYPE_CHECKING:
    from pangu_sigma.generation.engine import Engine
    from pangu_sigma.trained_model import TrainedModel


def run(
    path: Path,
    source: PromptSource,
    domain: str | None,
    settings: Mapping[str, Any],
    as_json: bool = False,
    stream: bool = True,
    slots: int = 8,
    inference: DomainInferenceSettings | None = None,
) -> None:
    """Run the command: read the prompts, load the model of `path`, continue them, print. Raises UserError."""
    as_json = as_json or source.jsonl
    if settings.get("logprobs") is not None and not as_json:
        raise UserError("--logprobs needs --json or --jsonl, because plain text has no place for figures")
    Sampling(**settings)
    prompts = source.read()
    if inference is not None and not any((prompt.domain or domain) == AUTO for prompt in prompts):
        raise UserError("--top, --prior and --prior-texts say how a domain is inferred: add --domain auto")
    # MindSpore turns a Ctrl-C that comes while it compiles into SIGTERM.
    with sigterm_as_ctrl_c(), _PipedOutput():
        _continue(
            path, prompts, source, domain, settings, as_json, stream, slots, inference or DomainInferenceSettings()
        )


def _continue(
    path: Path,
    prompts: list[Prompt],
    source: PromptSource,
    domain: str | None,
    settings: Mapping[str, Any],
    as_json: bool,
    stream: bool,
    slots: int,
    inference: DomainInferenceSettings,
) -> None:
    from pangu_sigma.trained_model import load_trained

    trained = load_trained(path)
    requests = [_request(trained, prompt, domain, settings) for prompt in prompts]
    from pangu_sigma.generation.engine import Engine

    inferred = any(request.domain == AUTO for request in requests)
    engine = Engine(trained.model, trained.tokenizer, min(slots, len(requests)) * (inference.top if inferred else 1))
    if inferred:
        inference.apply(engine)
    for position, request in enumerate(requests, 1):
        try:
            engine.check(request)
        except UserError as error:
            raise UserError(f"prompt {position}: {error}" if source.jsonl else str(error)) from error
    if source.jsonl:
        _print_lines(engine, trained, prompts, requests)
    elif as_json:
        completion = complete(engine, requests)[0]
        print(_as_json(trained, prompts[0], requests[0], completion), flush=True)
    else:
        _print_text(engine, prompts[0], requests[0], stream)


def _request(trained: TrainedModel, prompt: Prompt, domain: str | None, settings: Mapping[str, Any]) -> Request:
    names, name = trained.model.groups.names, prompt.domain or domain
    chosen = name if name == AUTO else pick_domain(names, name)
    own = {} if prompt.seed is None else {"seed": prompt.seed}
    return Request(prompt_ids(trained.tokenizer, prompt.text), chosen, Sampling(**{**settings, **own}))


def _print_text(engine: Engine, prompt: Prompt, request: Request, stream: bool) -> None:
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
        completion = complete(engine, [request], on_event)[0]
        if not stream:
            _write(shown(prompt.text + completion.text))
    finally:
        # The prompt of the shell begins a line of its own, after an interruption too.
        if stream or first:
            _write("\n")
    written, after = len(completion.events), time.monotonic() - first
    rate = f", {compact((written - 1) / after)} tokens/s" if written > 1 else ""
    if completion.events[-1].domains:
        print(domains_text(completion.events[-1].domains), file=sys.stderr)
    why = {"stop": "the text ended", "length": "max-tokens or the window's end was reached"}[completion.finish]
    print(f"{written} tokens in {time.monotonic() - began:.1f} s{rate}; {why}", file=sys.stderr)


def _print_lines(engine: Engine, trained: TrainedModel, prompts: list[Prompt], requests: list[Request]) -> None:
    """A JSON line for every prompt, in their order, as soon as those before it are printed.

    One that fails has its error in its line, and the command ends with the first of them.
    """
    from pangu_sigma.monitor.progress import progress

    done: dict[int, Completion] = {}
    printed = 0
    with progress("generate", len(prompts), unit="prompts") as job:

        def on_event(index: int, event: Event, completion: Completion) -> None:
            nonlocal printed
            if not event.finish:
                return
            done[index] = completion
            while printed in done:
                _write(_as_json(trained, prompts[printed], requests[printed], done.pop(printed)) + "\n")
                printed += 1
            job.advance()

        completions = complete(engine, requests, on_event, keep_going=True)
    failed = {position: completion.error for position, completion in enumerate(completions, 1) if completion.error}
    if failed:
        position, error = next(iter(failed.items()))
        raise UserError(f"{len(failed)} of {len(completions)} prompts failed; prompt {position}: {error}")


def _as_json(trained: TrainedModel, prompt: Prompt, request: Request, completion: Completion) -> str:
    domains = completion.events[-1].domains if completion.events else ()  # none of a request that failed at once
    record: dict[str, Any] = {
        "prompt": prompt.text,
        "domain": domains[0][0] if domains else request.domain,
        **({"domains": dict(domains)} if domains else {}),
        "text": completion.text,
        "finish": completion.finish,
        "ids": [event.token_id for event in completion.events],
    }
    if completion.error:
        record["error"] = completion.error
    if request.sampling.logprobs is not None:
        piece = trained.tokenizer.piece
        record["logprobs"] = [
            {
                "token": piece(event.token_id),
                "logprob": event.logprob,
                "top": [{"id": i, "token": piece(i), "logprob": value} for i, value in event.top],
            }
            for event in completion.events
        ]
    return json.dumps(record, ensure_ascii=False)


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


class _PipedOutput:
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
