"""Continuing texts on the command line: where prompts come from, where text and figures go.

Everything that can be wrong with what was asked is found before the model is loaded.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pangu_sigma.errors import UserError
from pangu_sigma.generation.request import AUTO, Event, Request, Sampling, pick_domain, prompt_ids
from pangu_sigma.monitor.text import compact, printable_lines
from pangu_sigma.signals import sigterm_as_ctrl_c

if TYPE_CHECKING:
    from pangu_sigma.generation.engine import Engine
    from pangu_sigma.load import Trained

CACHED_TEXTS = 100  # texts that a cached prior is made of, DEMix's number


@dataclass
class Answer:
    """What came of one request: `text` without the prompt, every token's event, why it ended; `error` says what made
    it end before its time."""

    text: str = ""
    events: list[Event] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Prompt:
    """One text to continue; `domain` and `seed` where it brings its own."""

    text: str
    domain: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Asked:
    """Where prompts come from: `prompt` itself, `file` ("-" is standard input), or standard input if neither is given.

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
        text, name = self._text()
        if self.jsonl:
            prompts = list(_lines(text, name))
            if not prompts:
                raise UserError(f'{name} holds no prompt; give one {{"prompt": TEXT}} a line')
            return prompts
        # Editors and `echo` end a text with a line end that is not meant to be continued behind.
        return [Prompt(text.removesuffix("\n").removesuffix("\r"))]

    def _text(self) -> tuple[str, str]:
        standard = self.file is None or str(self.file) == "-"
        name = "standard input" if standard else str(self.file)
        if self.file is None and sys.stdin.isatty():
            raise UserError("no text is given; use --prompt TEXT or --file FILE, or pipe a text into standard input")
        try:
            data = sys.stdin.buffer.read() if standard else self.file.read_bytes()
        except OSError as error:
            raise UserError(f"{name} cannot be read ({error.strerror}); check --file") from error
        try:
            return data.decode("utf-8"), name
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is not UTF-8 text at byte {error.start}; convert it") from error


def _lines(text: str, name: str) -> Iterator[Prompt]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {name}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f'{where} is not JSON ({error}); write {{"prompt": TEXT}}') from error
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
            raise UserError(f'{where} has no text under "prompt"; write {{"prompt": TEXT}}')
        unknown = set(value) - {"prompt", "domain", "seed"}
        if unknown:
            raise UserError(f'{where} has the unknown key "{min(unknown)}"; known are prompt, domain and seed')
        domain, seed = value.get("domain"), value.get("seed")
        if not isinstance(domain, str | None) or not (seed is None or type(seed) is int):
            raise UserError(f'{where}: "domain" must be text and "seed" a whole number')
        yield Prompt(value["prompt"], domain, seed)


@dataclass(frozen=True)
class Inference:
    """How the domain `auto` is inferred: `top` domains write together; prior: uniform, updating, or of `texts`.

    Raises UserError for what has no effect.
    """

    top: int = 1
    prior: str = "uniform"
    texts: Path | None = None

    def __post_init__(self) -> None:
        if (self.prior == "cached") != (self.texts is not None):
            raise UserError(
                "--prior cached is made of some texts, and --prior-texts names their file: give both, or neither"
            )
        if self.texts is not None and not self.texts.is_file():
            raise UserError(f"--prior-texts {self.texts} does not exist: give a file of texts like the prompts")
        if self.texts is not None and self.texts.suffix.lower() not in (".jsonl", ".txt"):
            raise UserError(f"--prior-texts {self.texts} is neither .jsonl nor .txt: convert it")

    def apply(self, engine: Engine, offered: Sequence[str] = ()) -> None:
        """Let the engine infer domains in this way, among the `offered` ones (all if empty)."""
        from pangu_sigma.generation.unknown import UnknownDomain

        among = [number for number, name in enumerate(engine.domains) if not offered or name in offered]
        engine.set_unknown(UnknownDomain(among, self.top, updating=self.prior == "updating"))
        if self.texts is not None:
            engine.cache_prior(self._read(engine))

    def _read(self, engine: Engine) -> list[tuple[int, ...]]:
        from pangu_sigma.data.sources import iterate_documents

        documents = islice(iterate_documents("--prior-texts", [self.texts]), CACHED_TEXTS)
        return [prompt_ids(engine.tokenizer, document.text) for document in documents]


def complete(
    engine: Engine,
    requests: Iterable[Request],
    heard: Callable[[int, Event, Answer], None] | None = None,
    go_on: bool = False,
) -> list[Answer]:
    """Run requests to their end and return their answers in order.

    `heard(number, event, answer so far)` is told of every event. A request that fails ends all with UserError, or with
    `go_on` only itself: then its answer has the error.
    """
    answers: list[Answer] = []
    number_of: dict[int, int] = {}
    for number, request in enumerate(requests):
        number_of[engine.add(request)] = number
        answers.append(Answer())
    while not engine.idle:
        for event in engine.step():
            number = number_of[event.request_id]
            answer = answers[number]
            answer.text += event.text
            answer.finish, answer.error = event.finish, event.error
            if event.error is None:
                answer.events.append(event)
            elif not go_on:
                for left in number_of:
                    engine.cancel(left)
                raise UserError(event.error)
            if heard:
                heard(number, event, answer)
    return answers


def run(
    path: Path,
    asked: Asked,
    domain: str | None,
    settings: Mapping[str, Any],
    as_json: bool = False,
    stream: bool = True,
    slots: int = 8,
    inference: Inference | None = None,
) -> None:
    """The command: read the prompts, load the model of `path`, continue them, print. Raises UserError."""
    as_json = as_json or asked.jsonl
    if settings.get("logprobs") is not None and not as_json:
        raise UserError("--logprobs needs --json or --jsonl, because plain text has no place for figures")
    Sampling(**settings)
    prompts = asked.read()
    if inference is not None and not any((prompt.domain or domain) == AUTO for prompt in prompts):
        raise UserError("--top, --prior and --prior-texts say how a domain is inferred: add --domain auto")
    # MindSpore turns a Ctrl-C that comes while it compiles into SIGTERM.
    with sigterm_as_ctrl_c(), _piped():
        _continue(path, prompts, asked, domain, settings, as_json, stream, slots, inference or Inference())


def _continue(
    path: Path,
    prompts: list[Prompt],
    asked: Asked,
    domain: str | None,
    settings: Mapping[str, Any],
    as_json: bool,
    stream: bool,
    slots: int,
    inference: Inference,
) -> None:
    from pangu_sigma.load import load_trained

    trained = load_trained(path)
    requests = [_request(trained, prompt, domain, settings) for prompt in prompts]
    from pangu_sigma.generation.engine import Engine

    inferred = any(request.domain == AUTO for request in requests)
    engine = Engine(trained.model, trained.tokenizer, min(slots, len(requests)) * (inference.top if inferred else 1))
    if inferred:
        inference.apply(engine)
    for number, request in enumerate(requests, 1):
        try:
            engine.check(request)
        except UserError as error:
            raise UserError(f"prompt {number}: {error}" if asked.jsonl else str(error)) from error
    if asked.jsonl:
        _print_lines(engine, trained, prompts, requests)
    elif as_json:
        answer = complete(engine, requests)[0]
        print(_as_json(trained, prompts[0], requests[0], answer), flush=True)
    else:
        _print_text(engine, prompts[0], requests[0], stream)


def _request(trained: Trained, prompt: Prompt, domain: str | None, settings: Mapping[str, Any]) -> Request:
    names, wanted = trained.model.groups.names, prompt.domain or domain
    chosen = wanted if wanted == AUTO else pick_domain(names, wanted)
    own = {} if prompt.seed is None else {"seed": prompt.seed}
    return Request(prompt_ids(trained.tokenizer, prompt.text), chosen, Sampling(**{**settings, **own}))


def _print_text(engine: Engine, prompt: Prompt, request: Request, stream: bool) -> None:
    # A model may write control characters; a terminal must not obey them. A file or a pipe gets every character.
    shown = _terminal_text if sys.stdout.isatty() else str
    began = time.monotonic()
    first: float | None = None

    def heard(_: int, event: Event, __: Answer) -> None:
        nonlocal first
        first = first or time.monotonic()
        if stream and event.text:
            _say(shown(event.text))

    if stream:
        _say(shown(prompt.text))
    try:
        answer = complete(engine, [request], heard)[0]
        if not stream:
            _say(shown(prompt.text + answer.text))
    finally:
        # The prompt of the shell begins a line of its own, after an interruption too.
        if stream or first:
            _say("\n")
    written, after = len(answer.events), time.monotonic() - first
    rate = f", {compact((written - 1) / after)} tokens/s" if written > 1 else ""
    if answer.events[-1].domains:
        print(domains_text(answer.events[-1].domains), file=sys.stderr)
    why = {"stop": "the text ended", "length": "max-tokens or the window's end was reached"}[answer.finish]
    print(f"{written} tokens in {time.monotonic() - began:.1f} s{rate}; {why}", file=sys.stderr)


def _print_lines(engine: Engine, trained: Trained, prompts: list[Prompt], requests: list[Request]) -> None:
    """A JSON line for every prompt, in their order, as soon as those before it are printed.

    One that fails has its error in its line, and the command ends with the first of them.
    """
    from pangu_sigma.monitor.terminal import progress

    done: dict[int, Answer] = {}
    printed = 0
    with progress("generate", len(prompts), unit="prompts") as job:

        def heard(number: int, event: Event, answer: Answer) -> None:
            nonlocal printed
            if not event.finish:
                return
            done[number] = answer
            while printed in done:
                _say(_as_json(trained, prompts[printed], requests[printed], done.pop(printed)) + "\n")
                printed += 1
            job.advance()

        answers = complete(engine, requests, heard, go_on=True)
    failed = {number: answer.error for number, answer in enumerate(answers, 1) if answer.error}
    if failed:
        number, error = next(iter(failed.items()))
        raise UserError(f"{len(failed)} of {len(answers)} prompts failed; prompt {number}: {error}")


def _as_json(trained: Trained, prompt: Prompt, request: Request, answer: Answer) -> str:
    domains = answer.events[-1].domains if answer.events else ()  # none of a request that failed at once
    found: dict[str, Any] = {
        "prompt": prompt.text,
        "domain": domains[0][0] if domains else request.domain,
        **({"domains": dict(domains)} if domains else {}),
        "text": answer.text,
        "finish": answer.finish,
        "ids": [event.token_id for event in answer.events],
    }
    if answer.error:
        found["error"] = answer.error
    if request.sampling.logprobs is not None:
        piece = trained.tokenizer.piece
        found["logprobs"] = [
            {
                "token": piece(event.token_id),
                "logprob": event.logprob,
                "top": [{"id": i, "token": piece(i), "logprob": value} for i, value in event.top],
            }
            for event in answer.events
        ]
    return json.dumps(found, ensure_ascii=False)


def domains_text(domains: Sequence[tuple[str, float]]) -> str:
    """The inferred domains in one line, with their probabilities."""
    shares = ", ".join(f"{name} ({100 * share:.0f} %)" for name, share in domains)
    return f"domain {shares}" if len(domains) == 1 else f"domains {shares}"


def _terminal_text(text: str) -> str:
    return "\t".join(printable_lines(part) for part in text.split("\t"))


def _say(text: str, out: TextIO | None = None) -> None:
    out = out or sys.stdout
    out.write(text)
    out.flush()


class _piped:
    """Ends quietly when whoever reads standard output has gone (`| head`)."""

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
