"""Growing a domain's expert group: new experts are copies of old ones, moments included, and share their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pangu_sigma.checkpoint import Checkpoint
from pangu_sigma.config import Config, config_from_dict
from pangu_sigma.domains.checkpoint_editor import CheckpointEditor, EditedTensors, EditResult, check_known
from pangu_sigma.domains.split_tables import origins_of_copies, split_table
from pangu_sigma.errors import UserError, argument
from pangu_sigma.plan.requirements import check_group
from pangu_sigma.tensor_names import parse_name, table_name
from rre.routing_tables import draw_table

if TYPE_CHECKING:
    from pangu_sigma.data.domain_store import DomainStore


def resize_domain(path: Path, name: str, experts: int, *, redraw: bool = False, out: Path | None = None) -> EditResult:
    """Grow the group of the domain `name` to `experts` in every sparse layer.

    Every new expert is a copy of the old one that has most to do for each of its copies. A token stays with its expert
    or goes to a copy of it, so the function stays what it was; with `redraw` tables are drawn anew instead. Raises
    UserError for a group that would not grow.
    """
    with CheckpointEditor(path, out) as subject:
        source = subject.checkpoint
        check_known(source, name)
        sizes = {groups[name] for groups in source.coverage.values()}
        if max(sizes) >= experts:
            raise UserError(
                f"domain {name} has {max(sizes)} experts, and a group can only grow, since no expert may be lost: "
                f"set {argument('experts')} to more than {max(sizes)}"
            )
        check_group(subject.config, experts, out or path)
        by_frequency = subject.config.model.sparse.table == "frequency"
        counts = token_counts(config_from_dict(subject.values), source, name) if by_frequency else None
        new = EditedTensors()
        for layer_name, groups in source.coverage.items():
            _grow(new, source, subject.config, name, layer_name, groups[name], experts, counts, redraw)
        for tensor in source.names(domains=[name], shared=False):
            if tensor not in new.sources:
                new.copy(source, tensor)
        for entry in subject.values["domains"]:
            entry["experts"] = experts if entry["name"] == name else entry["experts"]
        return subject.write(f"resize {name}", new, experts={name: dict.fromkeys(source.coverage, experts)})


def token_counts(config: Config, checkpoint: Checkpoint, name: str) -> np.ndarray:
    """Occurrences [V] of every id in the training text of one domain; see `domain_store`."""
    counts = np.array(domain_store(config, checkpoint, name).token_counts)
    return np.pad(counts, (0, config.model.vocab_size - counts.size))


def domain_store(config: Config, checkpoint: Checkpoint, name: str) -> DomainStore:
    """The tokenised text of one domain, from the cache or made there. Raises UserError where neither is."""
    from pangu_sigma.data.domain_store import prepare_domain
    from pangu_sigma.trained_model import stored_tokenizer

    domain = next(entry for entry in config.domains if entry.name == name)
    known_corpus = checkpoint.fingerprints.corpora.get(name)
    return prepare_domain(domain, stored_tokenizer(checkpoint), config.data, known_corpus=known_corpus)


def _grow(
    new: EditedTensors, source: Checkpoint, config: Config, name: str, layer_name: str, old: int, experts: int,
    counts: np.ndarray | None, redraw: bool,
) -> None:  # fmt: skip
    """Adds one sparse layer's tensors of the grown group."""
    routing = table_name(layer_name, name)
    table = source.load([routing])[routing]
    rows = np.ones(table.size) if counts is None else counts
    origins = origins_of_copies(table, old, experts, rows)
    if redraw:
        kind, purpose = config.model.sparse.table, f"{name} of {experts}"
        grown = draw_table(kind, config.run.seed, layer_name, purpose, table.size, experts, counts)
    else:
        grown = split_table(config.run.seed, f"{layer_name} {name} {old} {experts}", table, origins, old, rows)
    for tensor in source.names(domains=[name], shared=False):
        entry = source.manifest.tensors[tensor]
        if tensor == routing:
            new.add(tensor, entry.dtype, entry.shape, lambda: grown)
        elif parse_name(tensor).layer == layer_name:

            def copied(tensor: str = tensor) -> np.ndarray:
                array = source.load([tensor])[tensor]
                return np.concatenate([array, array[origins]])

            new.add(tensor, entry.dtype, (experts, *entry.shape[1:]), copied)
