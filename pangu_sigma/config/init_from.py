"""Whether a new run can begin with another model's weights (`run.init_from`), and what it takes over from it."""

from __future__ import annotations

import re

from pangu_sigma.config.load_config import config_from_dict
from pangu_sigma.config.resume_rules import flat_keys
from pangu_sigma.config.schema import Config
from pangu_sigma.config.validation_messages import shown
from pangu_sigma.errors import UserError

# Keys of the model section that say how it trains or was first drawn, not which function its tensors are.
_FREE = re.compile(
    r"model\.(preset|vocab_size|dropout|init_std|init_cutoff|init_scale_residual|attention\.dropout)"
    r"|model\.sparse\.(table|resample|dispatch|capacity_factor|capacity_samples|jitter|balance)"
    r"|model\.sparse\.(aux|z|importance|load)_loss_weight"
)


def says_network(key: str) -> bool:
    """Whether a key ("model.heads") says which function a model's tensors are. The size of the vocabulary does not: it
    is the tokenizer's unless it is written."""
    return key.startswith("model.") and not _FREE.fullmatch(key)


def check_start(model: Config, wanted: Config) -> None:
    """Raises UserError, which names every key, unless `wanted` describes the network of `model` with its domains."""
    here, there = set(wanted.domain_names), set(model.domain_names)
    where = f"run.init_from = {wanted.run.init_from}"
    for names, sentence in (
        (here - there, "has no domain {}: leave it out, since a domain is added to the run that trains it"),
        (there - here, "also has the domain {}: list it too, or cut the others out with pangu-sigma extract"),
    ):
        if names:
            raise UserError(f"{where} {sentence.format(', '.join(sorted(names)))}")
    if model.domain_names != wanted.domain_names:
        raise UserError(f"{where} has the domains {', '.join(model.domain_names)} in this order: list them likewise")
    before, after = flat_keys(model), flat_keys(wanted)
    compared = [key for key in {**before, **after} if says_network(key)]
    compared += [f"domains.{name}.experts" for name in model.domain_names]
    if wanted.model.vocab_size is not None:
        compared.append("model.vocab_size")
    named = [
        f"{key} is {shown(before.get(key))} there and {shown(after.get(key))} here"
        for key in compared
        if before.get(key) != after.get(key)
    ]
    if named:
        more = f"; and {len(named) - 5} more" if len(named) > 5 else ""
        raise UserError(f"{where} is another model: {'; '.join(named[:5])}{more}; write what it has, or leave it out")


def with_tokenizer_of(config: Config, model: Config) -> Config:
    """`config` with another model's tokenizer section, and with its vocabulary size where none is written."""
    return _with(config, model, config.run.init_from)


def with_start_of(config: Config, stored: Config) -> Config:
    """`config` of a run that resumes, with what it took over when it began (`stored`, the run's own configuration)."""
    return _with(config, stored, stored.run.init_from) if stored.run.init_from is not None else config


def _with(config: Config, model: Config, init_from: str | None) -> Config:
    values, other = config.to_dict(), model.to_dict()
    values["run"]["init_from"] = init_from
    values["model"]["vocab_size"] = config.model.vocab_size or other["model"]["vocab_size"]
    values["data"]["tokenizer"] = other["data"]["tokenizer"]
    return config_from_dict(values)


def with_vocabulary(config: Config, tokenizer_size: int) -> Config:
    """The configuration with model.vocab_size filled in. Raises UserError if it is too small for the tokenizer."""
    wanted = config.model.vocab_size
    if wanted is not None and wanted < tokenizer_size:
        raise UserError(
            f"model.vocab_size is {wanted}, but the tokenizer has {tokenizer_size} ids: raise it or leave it out"
        )
    return with_vocabulary_size(config, tokenizer_size)


def with_vocabulary_size(config: Config, size: int) -> Config:
    """The configuration with `size` as model.vocab_size where none is written."""
    values = config.to_dict()
    values["model"]["vocab_size"] = config.model.vocab_size or size
    return config_from_dict(values)
