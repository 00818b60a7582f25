"""The `adapt` section: fine-tuning on answers (sft) and on preferences (dpo), over the same loop as training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pangu_sigma.config.data_section import DomainName, Paths
from pangu_sigma.config.section import Field, ListOf, Section, Violations, positive_sum


class ExamplesConfig(Section, resume="fixed", init_from="free"):
    """The examples of one domain; they train with the domain's experts."""

    name: DomainName
    """Domain of the model that the examples belong to."""
    data: Paths = Field(min_length=1, is_path=True, resume="free")
    """Files of examples, or globs of them: .jsonl, one object a line."""
    weight: float = Field(1.0, ge=0)
    """How often the domain's examples are drawn, relative to the others'."""


class AdaptConfig(Section, resume="fixed", init_from="free"):
    """Fine-tuning of the model that run.init_from names."""

    objective: Literal["sft", "dpo"]
    """sft: loss on the answer to a prompt. dpo: the chosen answer before the rejected one."""
    examples: ListOf[ExamplesConfig] = Field(min_length=1)
    """The examples, domain by domain."""
    template: Literal["chat", "plain"] = "chat"
    """Chat: as the server writes a conversation. Plain: the answer right behind the prompt."""
    heldout_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of a domain's examples kept from training for evaluation."""
    beta: float = Field(0.1, gt=0)
    """With dpo, how strongly the model is held to the reference: larger stays nearer."""
    auxiliary_losses: bool = False
    """Whether the routers' auxiliary losses (balance, importance, load, z) count too."""

    def violations(self, domains: Sequence[str]) -> Violations:
        """Broken rules of the examples of a model that has these domains."""
        seen: set[str] = set()
        for index, examples in enumerate(self.examples):
            key = f"adapt.examples.{index}.name"
            if examples.name not in domains:
                yield f"{key} = {examples.name} is no domain of the model: it has {', '.join(domains)}"
            if examples.name in seen:
                yield f"{key} = {examples.name} is named twice: list all its files in one item"
            seen.add(examples.name)
        yield from positive_sum("adapt.examples have weights that", (examples.weight for examples in self.examples))
