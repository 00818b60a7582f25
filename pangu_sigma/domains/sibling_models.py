"""Whether two models are siblings: the same network with the same shared parameters, so that domains can move."""

from __future__ import annotations

from collections.abc import Sequence

from pangu_sigma.checkpoint import Checkpoint
from pangu_sigma.checkpoint.tensor_file import digest_of
from pangu_sigma.config.init_from import network_differences
from pangu_sigma.errors import UserError
from pangu_sigma.trained_model import stored_config
from pangu_sigma.wording import shown


def check_siblings(one: Checkpoint, other: Checkpoint) -> None:
    """Raises UserError, naming what differs, unless both have one network, tokenizer and shared parameters."""
    if one.fingerprints.tokenizer != other.fingerprints.tokenizer:
        raise UserError(f"{one.path} and {other.path} have different tokenizers: only models of one parent fit")
    for change in network_differences(stored_config(one), stored_config(other)):
        raise UserError(
            f"{one.path} and {other.path} are different networks ({change.key} is {shown(change.before)} and "
            f"{shown(change.after)}): only models of one parent fit"
        )
    names = one.names(domains=[], optimizer=False)
    if different := different_tensors(one, other, names):
        raise UserError(
            f"{one.path} and {other.path} differ in {len(different)} of {len(names)} shared parameters ({different[0]} "
            "first), so a domain of one would be another function in the other: train both with shared parameters "
            "frozen from one parent"
        )


def different_tensors(one: Checkpoint, other: Checkpoint, names: Sequence[str]) -> list[str]:
    """Those of the tensors `names` of `one` whose bytes, type or shape are not `other`'s."""
    return [name for name in names if not _equal(one, other, name)]


def _equal(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    entry, other_entry = one.manifest.tensors[name], other.manifest.tensors.get(name)
    if other_entry is None or (entry.dtype, entry.shape) != (other_entry.dtype, other_entry.shape):
        return False
    if len(entry.slices) == len(other_entry.slices) == 1:
        return entry.slices[0].sha256 == other_entry.slices[0].sha256
    return digest_of(one.load([name])[name]) == digest_of(other.load([name])[name])
