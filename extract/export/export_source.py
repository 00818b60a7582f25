"""What is exported: an opened checkpoint, its configuration and tokenizer, and the domains that go along."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

from extract.extraction_plan import choose_domains
from pangu_sigma.checkpoint import Checkpoint, resolve
from pangu_sigma.config import Config
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.errors import UserError
from pangu_sigma.tensor_names import TensorName, is_routing, parse_name
from pangu_sigma.trained_model import stored_config, stored_tokenizer


@dataclass(frozen=True)
class ExportSource:
    """A model on disk; nothing of its weights is in memory. `domains` are the chosen ones in the model's order."""

    checkpoint: Checkpoint
    config: Config
    tokenizer: Tokenizer
    domains: tuple[str, ...]

    @property
    def experts(self) -> tuple[int, ...]:
        """Experts of each chosen domain in every sparse layer."""
        size = self.config.expert_groups
        return tuple(size[name] for name in self.domains)

    @property
    def vocab(self) -> int:
        """Rows of the word embedding, which may be more than the tokenizer has ids."""
        return self.config.model.vocab_size

    @cached_property
    def names(self) -> list[str]:
        """Names of the shared tensors and of the chosen domains', sorted."""
        return self.checkpoint.names(domains=self.domains, optimizer=False)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape by the manifest."""
        return self.checkpoint.manifest.tensors[name].shape

    def dtype(self, name: str) -> str:
        """The type that a tensor is stored in."""
        return self.checkpoint.manifest.tensors[name].dtype

    @property
    def main_dtype(self) -> str:
        """The type in which most of the weights are stored."""
        values: dict[str, int] = {}
        for name in self.names:
            if not is_routing(name):
                values[self.dtype(name)] = values.get(self.dtype(name), 0) + prod(self.shape(name))
        return max(values, key=lambda dtype: values[dtype])

    @property
    def imported_dtypes(self) -> Mapping[str, str]:
        """Types of the tensors of an import's source that are stored wider here; nothing once the model has trained."""
        origin = self.checkpoint.state.get("origin")
        dtypes = origin.get("dtypes") if isinstance(origin, dict) else None
        return dtypes if isinstance(dtypes, dict) else {}

    def by_owner(self) -> Iterator[tuple[str, int | None, TensorName]]:
        """(name, number of the chosen domain or None, the name taken apart) of every tensor."""
        for name in self.names:
            parsed = parse_name(name)
            yield name, None if parsed.domain is None else self.domains.index(parsed.domain), parsed


def open_source(model: str | Path, domains: Sequence[str] | None = None) -> ExportSource:
    """Open what a user names. Raises UserError: no whole model, unknown domain, a gate that cannot be cut."""
    checkpoint = resolve(model)
    config = stored_config(checkpoint)
    chosen = choose_domains(checkpoint, domains or checkpoint.domains)
    if config.model.sparse_prefixes and not config.model.separates_domains and chosen != config.domain_names:
        raise UserError(
            f"the model's gate ({config.model.router_setting}) chooses among the experts of all domains, so it cannot "
            "be exported with some of them; leave domain out"
        )
    return ExportSource(checkpoint, config, stored_tokenizer(checkpoint), chosen)
