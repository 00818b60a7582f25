"""The `generate` command. It imports what it needs when it is called, so that its help text comes at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pangu_sigma.cli.arguments import ModelPath, Prior, PriorTexts
from pangu_sigma.errors import UserError, argument


def generate(
    model: ModelPath,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Text to continue; without it and --file, standard input is read."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="File with the text to continue; - is standard input. Its last line end is left out."
        ),
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Domain whose experts write; auto infers it. A one-domain model has only one."
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens to write.")] = 64,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 takes the likeliest token, higher is freer.")
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option(metavar="N", help="Draw among this many likeliest tokens; 0 draws among all.")
    ] = 40,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="SHARE", help="Draw among the likeliest tokens that together hold this share of the probability."
        ),
    ] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="FACTOR", help="Above 1 makes tokens unlikely that the text holds already.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Text that ends the answer, not printed; may be given several times."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the draws: the same seed gives the same text.")] = 0,
    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="With --json or --jsonl: tell every token's log-probability and this many alternatives."
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="The text is what a user says: write the answer, by the model's chat template."),
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print text as it comes, or all at the end.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end instead of text.")] = False,
    jsonl: Annotated[
        bool,
        typer.Option(
            "--jsonl",
            help='Many prompts at once: every line of the input is {"prompt": TEXT} and may name its own "domain" and '
            '"seed"; a JSON line for each comes out, in the same order.',
        ),
    ] = False,
    slots: Annotated[
        int, typer.Option(min=1, metavar="N", help="With --jsonl: prompts that are continued together.")
    ] = 8,
    top: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="With --domain auto: let so many of the likeliest domains write together."
        ),
    ] = 1,
    prior: Annotated[
        Prior,
        typer.Option(
            help="With --domain auto, prior of the domains: uniform, updating from prompt to prompt, or "
            "cached from --prior-texts."
        ),
    ] = Prior.uniform,
    prior_texts: PriorTexts = None,
) -> None:
    """Continue a text with one domain's experts. Only the text (or JSON) goes to standard output."""
    from pangu_sigma.api import load
    from pangu_sigma.cli.generate_output import print_lines, print_object, print_text
    from pangu_sigma.cli.standard_streams import piped_output
    from pangu_sigma.generation.domain_inference_settings import DomainInferenceSettings
    from pangu_sigma.generation.prompts import PromptSource
    from pangu_sigma.generation.request import AUTO, Sampling

    if logprobs is not None and not (as_json or jsonl):
        raise UserError("--logprobs needs --json or --jsonl, because plain text has no place for figures")
    inference = DomainInferenceSettings(top, prior.value, prior_texts)
    settings = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "stop": tuple(stop or ()),
        "seed": seed,
        "logprobs": logprobs,
    }
    prompts = PromptSource(prompt=prompt, file=file, jsonl=jsonl).read()
    with piped_output():
        # What is wrong with the options shows before the model is loaded.
        Sampling(**settings)
        settings["chat"] = chat
        inferred = any((prompt.domain or domain) == AUTO for prompt in prompts)
        if inference != DomainInferenceSettings() and not inferred:
            given = ", ".join(map(argument, ("top", "prior", "prior_texts")))
            raise UserError(f"{given} say how a domain is inferred: add {argument('domain', AUTO)}")
        slots = min(slots, len(prompts)) * (top if inferred else 1)
        writer = load(model, slots=slots, top=top, prior=prior.value, prior_texts=prior_texts)
        if jsonl:
            print_lines(writer, prompts, domain, settings)
        elif as_json:
            print_object(writer, prompts[0], domain, settings)
        else:
            print_text(writer, prompts[0], domain, settings, stream)
