"""Warm start from another model (`run.init_from`): whether its network fits, and what a run takes over from it."""

from __future__ import annotations

from pangu_sigma.config.differences import Difference, differences, joined
from pangu_sigma.config.load_config import config_from_dict
from pangu_sigma.config.schema import Config
from pangu_sigma.errors import UserError
from pangu_sigma.wording import listed, shown


def network_differences(model: Config, other: Config) -> list[Difference]:
    """The keys of the network in which two models differ, which may have different domains. The size of the vocabulary
    is none: it is the tokenizer's unless it is written."""
    changes = differences(model, other)
    return [change for change in changes if change.init_from == "equal" and change.key.startswith("model.")]


def check_init_from(model: Config, config: Config) -> None:
    """Raises UserError, which names every key, unless `config` describes the network of `model` with its domains."""
    own, theirs = set(config.domain_names), set(model.domain_names)
    prefix = f"run.init_from = {config.run.init_from}"
    for names, sentence in (
        (own - theirs, "has no domain {}: leave it out, since a domain is added to the run that trains it"),
        (theirs - own, "also has the domain {}: list it too, or cut the others out with pangu-sigma extract"),
    ):
        if names:
            raise UserError(f"{prefix} {sentence.format(listed(names))}")
    if model.domain_names != config.domain_names:
        raise UserError(f"{prefix} has the domains {', '.join(model.domain_names)} in this order: list them likewise")
    wrong = [
        f"{change.key} is {shown(change.before)} there and {shown(change.after)} here"
        for change in differences(model, config)
        if change.init_from == "equal" or (change.init_from == "equal if written" and change.after is not None)
    ]
    if wrong:
        raise UserError(f"{prefix} is another model: {joined(wrong)}; write what it has, or leave it out")


def with_tokenizer_of(config: Config, model: Config) -> Config:
    """`config` with another model's tokenizer section, and with its vocabulary size where none is written."""
    return _with(config, model, config.run.init_from)


def with_init_from_of(config: Config, stored: Config) -> Config:
    """`config` of a run that resumes, with what its `stored` configuration took over from the model of init_from."""
    return _with(config, stored, stored.run.init_from) if stored.run.init_from is not None else config


def _with(config: Config, model: Config, init_from: str | None) -> Config:
    values, other = config.to_dict(), model.to_dict()
    values["run"]["init_from"] = init_from
    values["model"]["vocab_size"] = config.model.vocab_size or other["model"]["vocab_size"]
    values["data"]["tokenizer"] = other["data"]["tokenizer"]
    return config_from_dict(values)


def with_vocabulary(config: Config, tokenizer_size: int) -> Config:
    """The configuration with model.vocab_size filled in. Raises UserError if it is too small for the tokenizer."""
    rows = config.model.vocab_size
    if rows is not None and rows < tokenizer_size:
        raise UserError(
            f"model.vocab_size is {rows}, but the tokenizer has {tokenizer_size} ids: raise it or leave it out"
        )
    return with_vocabulary_size(config, tokenizer_size)


def with_vocabulary_size(config: Config, size: int) -> Config:
    """The configuration with `size` as model.vocab_size where none is written."""
    values = config.to_dict()
    values["model"]["vocab_size"] = config.model.vocab_size or size
    return config_from_dict(values)
