"""Settings of the domain `auto`: how the domain of a prompt is inferred."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pangu_sigma.errors import UserError, argument
from pangu_sigma.generation.request import prompt_ids

if TYPE_CHECKING:
    from pangu_sigma.generation.engine import Engine

CACHED_TEXTS = 100  # texts that a cached prior is made of, DEMix's number


@dataclass(frozen=True)
class DomainInferenceSettings:
    """How the domain `auto` is inferred: `top` domains write together; prior: uniform, updating, or cached from
    `texts`.

    Raises UserError for settings that have no effect.
    """

    top: int = 1
    prior: str = "uniform"
    texts: Path | None = None

    def __post_init__(self) -> None:
        if (self.prior == "cached") != (self.texts is not None):
            raise UserError(
                f"{argument('prior', 'cached')} is made of some texts, and {argument('prior_texts')} names their file: "
                "give both, or neither"
            )
        given = argument("prior_texts", self.texts)
        if self.texts is not None and not self.texts.is_file():
            raise UserError(f"{given} does not exist: give a file of texts like the prompts")
        if self.texts is not None and self.texts.suffix.lower() not in (".jsonl", ".txt"):
            raise UserError(f"{given} is neither .jsonl nor .txt: convert it")

    def apply(self, engine: Engine, offered: Sequence[str] = ()) -> None:
        """Make the engine infer domains in this way, among the `offered` ones (all if empty)."""
        from pangu_sigma.generation.domain_mixture import DomainInference

        candidates = [domain for domain, name in enumerate(engine.domains) if not offered or name in offered]
        engine.set_domain_inference(DomainInference(candidates, self.top, updating=self.prior == "updating"))
        if self.texts is not None:
            engine.cache_prior(self._read(engine))

    def _read(self, engine: Engine) -> list[tuple[int, ...]]:
        from pangu_sigma.data.corpus_files import iterate_documents

        documents = islice(iterate_documents(argument("prior_texts"), [self.texts]), CACHED_TEXTS)
        return [prompt_ids(engine.tokenizer, document.text) for document in documents]
