"""Whether two models are siblings: the same network with the same shared parameters, so that domains can move."""

from __future__ import annotations

from collections.abc import Sequence

from pangu_sigma.checkpoint import Checkpoint
from pangu_sigma.checkpoint.tensor_file import digest_of
from pangu_sigma.config.init_from import says_network
from pangu_sigma.config.resume_rules import flat_keys
from pangu_sigma.config.validation_messages import shown
from pangu_sigma.errors import UserError
from pangu_sigma.trained_model import stored_config


def check_siblings(one: Checkpoint, other: Checkpoint) -> None:
    """Raises UserError, naming what differs, unless both have one network, tokenizer and shared parameters."""
    if one.fingerprints.tokenizer != other.fingerprints.tokenizer:
        raise UserError(f"{one.path} and {other.path} have different tokenizers: only models of one parent fit")
    here, there = flat_keys(stored_config(one)), flat_keys(stored_config(other))
    for key in {**here, **there}:
        if says_network(key) and here.get(key) != there.get(key):
            raise UserError(
                f"{one.path} and {other.path} are different networks ({key} is {shown(here.get(key))} and "
                f"{shown(there.get(key))}): only models of one parent fit"
            )
    names = one.names(domains=[], optimizer=False)
    if different := different_tensors(one, other, {name: name for name in names}):
        raise UserError(
            f"{one.path} and {other.path} differ in {len(different)} of {len(names)} shared parameters ({different[0]} "
            "first), so a domain of one would be another function in the other: train both with shared parameters "
            "frozen from one parent"
        )


def different_tensors(one: Checkpoint, other: Checkpoint, names: dict[str, str]) -> list[str]:
    """Names of `one` whose bytes, type or shape are not those of `other`'s tensor of the name that they map to."""
    return [mine for mine, theirs in names.items() if not _equal(one, other, mine, theirs)]


def domain_names(checkpoint: Checkpoint, domain: str, optimizer: bool) -> Sequence[str]:
    """The tensors of one domain, after `domains.{domain}.`."""
    names = checkpoint.names(domains=[domain], shared=False, optimizer=optimizer)
    return [name.removeprefix(f"domains.{domain}.") for name in names]


def _equal(one: Checkpoint, other: Checkpoint, mine: str, theirs: str) -> bool:
    here, there = one.manifest.tensors[mine], other.manifest.tensors.get(theirs)
    if there is None or (here.dtype, here.shape) != (there.dtype, there.shape):
        return False
    if len(here.slices) == len(there.slices) == 1:
        return here.slices[0].sha256 == there.slices[0].sha256
    return digest_of(one.load([mine])[mine]) == digest_of(other.load([theirs])[theirs])
