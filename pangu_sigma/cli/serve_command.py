"""The command `pangu-sigma serve`; nothing heavy is imported before it is called."""

from __future__ import annotations

from typing import Annotated

import typer

from pangu_sigma.cli.arguments import ModelPath, Prior, PriorTexts


def serve(
    model: ModelPath,
    domain: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Offer this domain only; may be given several times. All if left out."),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS", help="Address to listen on. Anything but 127.0.0.1 exposes the server to the network."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="Token that clients must present; better set in the environment, where `ps` does not show it.",
            envvar="PANGU_SIGMA_TOKEN",
        ),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, max=1024, metavar="N", help="Texts that are decoded together.")] = 8,
    queue: Annotated[
        int, typer.Option(min=0, metavar="N", help="Texts that may wait for a slot; beyond, clients get 429.")
    ] = 64,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Most tokens of one answer; up to the model's window if left out."),
    ] = None,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Most tokens of all prompts of a request, each counted n times; 16384, or four windows if these are "
            "more, if left out.",
        ),
    ] = None,
    max_body: Annotated[int, typer.Option(min=1024, metavar="BYTES", help="Largest request body in bytes.")] = 1 << 20,
    grace: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="Seconds that answers may go on after SIGTERM.")
    ] = 30.0,
    warm_up: Annotated[
        bool,
        typer.Option(help="Compile all graphs at startup; otherwise the first text of each length waits."),
    ] = True,
    top: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Model id auto: let so many of the likeliest domains write together."),
    ] = 1,
    prior: Annotated[
        Prior,
        typer.Option(
            help="Model id auto, prior of the domains: uniform, updating from prompt to prompt, or cached "
            "from --prior-texts."
        ),
    ] = Prior.uniform,
    prior_texts: PriorTexts = None,
) -> None:
    """Serve a model in OpenAI's format: every domain is a model id, and auto infers the domain of each prompt.

    A page to try it is at the same address.
    """
    from pangu_sigma.generation.domain_inference_settings import DomainInferenceSettings
    from pangu_sigma.serving.model_server import ModelServer
    from pangu_sigma.serving.server_settings import ServerLimits, ServerSettings

    limits = ServerLimits(
        slots=slots,
        queue=queue,
        max_tokens=max_tokens,
        prompt_tokens=max_prompt_tokens,
        body_bytes=max_body,
        grace_seconds=grace,
    )
    settings = ServerSettings(
        host=host,
        port=port,
        domains=tuple(domain or ()),
        token=token,
        limits=limits,
        warm_up=warm_up,
        inference=DomainInferenceSettings(top, prior.value, prior_texts),
    )
    ModelServer(model, settings).serve(announce=typer.echo)
    typer.echo("The server has stopped.", err=True)
