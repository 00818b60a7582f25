"""Generate job: prompts with a model that continues them, and the record of each answer.

Mistakes in the options and prompts are found before the model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pangu_sigma.errors import UserError, argument
from pangu_sigma.generation.completion import Completion, complete
from pangu_sigma.generation.domain_inference_settings import DomainInferenceSettings
from pangu_sigma.generation.prompts import Prompt
from pangu_sigma.generation.request import AUTO, Event, Request, Sampling, pick_domain, prompt_ids

if TYPE_CHECKING:
    from pangu_sigma.generation.engine import Engine
    from pangu_sigma.trained_model import TrainedModel


@dataclass(frozen=True)
class GenerateJob:
    """Prompts, each with its request, and the engine of the model that continues them."""

    trained: TrainedModel
    engine: Engine
    prompts: Sequence[Prompt]
    requests: Sequence[Request]

    def run(
        self, on_event: Callable[[int, Event, Completion], None] | None = None, keep_going: bool = False
    ) -> list[Completion]:
        """Continue all prompts; see `complete`."""
        return complete(self.engine, self.requests, on_event, keep_going)

    def record(self, index: int, completion: Completion) -> dict[str, Any]:
        """The answer to prompt `index` as plain values for JSON."""
        prompt, request = self.prompts[index], self.requests[index]
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
            piece = self.trained.tokenizer.piece
            record["logprobs"] = [
                {
                    "token": piece(event.token_id),
                    "logprob": event.logprob,
                    "top": [{"id": i, "token": piece(i), "logprob": value} for i, value in event.top],
                }
                for event in completion.events
            ]
        return record


def prepare_generation(
    path: Path,
    prompts: Sequence[Prompt],
    domain: str | None,
    settings: Mapping[str, Any],
    slots: int = 8,
    inference: DomainInferenceSettings | None = None,
    numbered: bool = False,
) -> GenerateJob:
    """Load the model of `path` for the prompts.

    domain, settings: of prompts that have none of their own; `settings` are fields of `Sampling`. inference: how the
    domain `auto` is inferred, None for the default. `numbered`: an error names the prompt by its number. Raises
    UserError.
    """
    Sampling(**settings)
    if inference is not None and not any((prompt.domain or domain) == AUTO for prompt in prompts):
        given = ", ".join(map(argument, ("top", "prior", "prior_texts")))
        raise UserError(f"{given} say how a domain is inferred: add {argument('domain', AUTO)}")
    from pangu_sigma.trained_model import load_trained

    trained = load_trained(path)
    requests = [_request(trained, prompt, domain, settings) for prompt in prompts]
    from pangu_sigma.generation.engine import Engine

    inferred = any(request.domain == AUTO for request in requests)
    inference = inference or DomainInferenceSettings()
    engine = Engine(trained.model, trained.tokenizer, min(slots, len(requests)) * (inference.top if inferred else 1))
    if inferred:
        inference.apply(engine)
    for number, request in enumerate(requests, 1):
        try:
            engine.check(request)
        except UserError as error:
            raise UserError(f"prompt {number}: {error}" if numbered else str(error)) from error
    return GenerateJob(trained, engine, prompts, requests)


def _request(trained: TrainedModel, prompt: Prompt, domain: str | None, settings: Mapping[str, Any]) -> Request:
    names, name = trained.model.groups.names, prompt.domain or domain
    chosen = name if name == AUTO else pick_domain(names, name)
    own = {} if prompt.seed is None else {"seed": prompt.seed}
    return Request(prompt_ids(trained.tokenizer, prompt.text), chosen, Sampling(**{**settings, **own}))
