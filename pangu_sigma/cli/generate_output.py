"""What `pangu-sigma generate` prints: text as it comes, or a JSON object for each prompt."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from pangu_sigma.errors import UserError
from pangu_sigma.monitor.printable_text import compact, printable_lines

if TYPE_CHECKING:
    from pangu_sigma.generation.completion import Completion
    from pangu_sigma.generation.prompts import Prompt
    from pangu_sigma.generation.request import Event
    from pangu_sigma.language_model import LanguageModel


def print_object(model: LanguageModel, prompt: Prompt, domain: str | None, options: dict[str, Any]) -> None:
    """Continue a prompt, and print its answer as one JSON object."""
    (completion,) = model.complete([prompt], domain, **options)
    _write(_json(model, prompt, domain, completion))


def print_text(
    model: LanguageModel, prompt: Prompt, domain: str | None, options: dict[str, Any], stream: bool
) -> None:
    """Continue a prompt, and print it and its text: as it comes, or at the end; of a chat the answer alone."""
    # A model may write control characters; a terminal must not obey them. A file or a pipe gets every character.
    shown = _terminal_text if sys.stdout.isatty() else str
    began = time.monotonic()
    first: float | None = None
    events: list[Event] = []
    coming = model.events(prompt, domain, **options)
    before = "" if options.get("chat") else prompt.text
    if stream:
        _write(shown(before))
    try:
        for event in coming:
            first = first or time.monotonic()
            events.append(event)
            if stream and event.text:
                _write(shown(event.text))
        if not stream:
            _write(shown(before + "".join(event.text for event in events)))
    finally:
        # The prompt of the shell begins a line of its own, after an interruption too.
        if stream or first:
            _write("\n")
    written, after = len(events), time.monotonic() - first
    rate = f", the others at {compact((written - 1) / after)} tokens/s" if written > 1 else ""
    if events[-1].domains:
        print(domains_text(events[-1].domains), file=sys.stderr)
    why = {"stop": "the text ended", "length": "max-tokens or the window's end was reached"}[events[-1].finish]
    total = f"{written} tokens in {time.monotonic() - began:.1f} s"
    print(f"{total}: the first after {first - began:.1f} s{rate}; {why}", file=sys.stderr)


def print_lines(
    model: LanguageModel, prompts: Sequence[Prompt], domain: str | None, options: dict[str, Any]
) -> None:
    """A JSON line for every prompt, in their order, as soon as those before it are printed.

    One that fails has its error in its line, and the command ends with the first of them.
    """
    from pangu_sigma.monitor.progress import progress

    with progress("generate", len(prompts), unit="prompts") as bar:

        def on_completion(index: int, completion: Completion) -> None:
            _write(_json(model, prompts[index], domain, completion))
            bar.advance()

        completions = model.complete(prompts, domain, on_completion=on_completion, keep_going=True, **options)
    failed = {position: completion.error for position, completion in enumerate(completions, 1) if completion.error}
    if failed:
        position, error = next(iter(failed.items()))
        raise UserError(f"{len(failed)} of {len(completions)} prompts failed; prompt {position}: {error}")


def _json(model: LanguageModel, prompt: Prompt, domain: str | None, completion: Completion) -> str:
    """The answer to a prompt as a line of JSON."""
    events = completion.events
    domains = events[-1].domains if events else ()  # none of a request that failed at once
    record: dict[str, Any] = {
        "prompt": prompt.text,
        "domain": domains[0][0] if domains else prompt.domain or domain or model.domains[0],
        **({"domains": dict(domains)} if domains else {}),
        "text": completion.text,
        "finish": completion.finish,
        "ids": [event.token_id for event in events],
    }
    if completion.error:
        record["error"] = completion.error
    if any(event.logprob is not None for event in events):
        record["logprobs"] = _logprobs(model, prompt, events)
    return json.dumps(record, ensure_ascii=False) + "\n"


def _logprobs(model: LanguageModel, prompt: Prompt, events: Sequence[Event]) -> list[dict[str, Any]]:
    from pangu_sigma.generation import prompt_ids
    from pangu_sigma.generation.token_text import TokenTexts

    texts = TokenTexts(model.tokenizer, prompt_ids(model.tokenizer, prompt.text))

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        token = texts.token(token_id)
        return {"id": token_id, "token": token.text, "bytes": list(token.bytes) or None, "logprob": logprob}

    table = []
    for event in events:
        table.append({**entry(event.token_id, event.logprob), "top": [entry(*other) for other in event.top]})
        texts.push(event.token_id)
    return table


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
