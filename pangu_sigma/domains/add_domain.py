"""Adding a domain: a new expert group in every sparse layer, with routing tables of its own, from text or a sibling."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from os.path import abspath, expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pangu_sigma.checkpoint import Checkpoint, resolve
from pangu_sigma.config import Config, domain_edits
from pangu_sigma.domains.checkpoint_editor import CheckpointEditor, EditedTensors, EditResult, check_free, check_known
from pangu_sigma.domains.nearest_domain import nearest_domain
from pangu_sigma.domains.new_domain_tensors import NewDomainTensors
from pangu_sigma.domains.sibling_models import check_siblings
from pangu_sigma.errors import UserError
from pangu_sigma.monitor.progress import progress
from pangu_sigma.plan.requirements import check_group
from pangu_sigma.tensor_names import of_domain, parse_name
from pangu_sigma.trained_model import stored_config, stored_tokenizer

if TYPE_CHECKING:
    from pangu_sigma.data.domain_store import DomainStore

NEAREST = "nearest"


@dataclass(frozen=True)
class NewDomain:
    """A domain to add: its item of the configuration's `domains`, and how its experts begin (`new_domain_tensors`)."""

    name: str
    data: tuple[str, ...]
    experts: int = 4
    init: str = "mean"
    text_field: str = "text"
    weight: float = 1.0
    filters: str = "none"
    stars_field: str | None = None

    def entry(self) -> dict[str, Any]:
        """Its item of the configuration's `domains`."""
        entry = {**vars(self), "data": [abspath(expanduser(pattern)) for pattern in self.data]}
        del entry["init"]
        return entry


def add_domain(
    path: Path,
    new_domain: NewDomain,
    *,
    follow_up: domain_edits.FollowUpTraining | None = None,
    out: Path | None = None,
) -> EditResult:
    """Add a domain that begins as `wanted.init` says (see `new_domain_tensors`); its text is tokenised and checked now.

    follow_up: training that follows, in the place of the plan's remaining phases. Raises UserError; nothing is changed
    then.
    """
    with CheckpointEditor(path, out) as subject:
        source = subject.checkpoint
        check_free(source, new_domain.name)
        check_group(subject.config, new_domain.experts, out or path)
        config = _extend(subject, new_domain.entry(), follow_up)
        new, of_domain_alone, init = make_group(subject, config, new_domain)
        how = init if init == new_domain.init else f"{new_domain.init}, {init}"
        return subject.write(f"add {new_domain.name} ({how})", new, **of_domain_alone)


def make_group(
    subject: CheckpointEditor, config: Config, new_domain: NewDomain
) -> tuple[EditedTensors, dict[str, Any], str]:
    """The new domain's tensors, what else `CheckpointEditor.write` is told of it, and how it begins, nearest being
    from:DOMAIN then; its text is read for it."""
    source, name, experts, init = subject.checkpoint, new_domain.name, new_domain.experts, new_domain.init
    if init != NEAREST:
        initial = NewDomainTensors(source, subject.config, name, experts, init)
        store, probe = read_text(subject, config)
    else:
        store, probe = read_text(subject, config)
        init = f"from:{nearest_domain(source, store)}"
        initial = NewDomainTensors(source, subject.config, name, experts, init)
    rows = None
    if config.model.sparse.table == "frequency":
        rows = np.pad(np.array(store.token_counts), (0, config.model.vocab_size - store.token_counts.size))
    new = EditedTensors()
    initial.add_to(new, config, rows)
    fresh_moments(new, source, name, experts)
    coverage = {name: dict.fromkeys(source.coverage, experts)}
    return new, {"experts": coverage, "corpora": {name: store.corpus_fingerprint}, "probe": probe}, init


def add_model(
    path: Path, model: Path, domain: str | None, *, name: str | None = None, weight: float = 1.0,
    follow_up: domain_edits.FollowUpTraining | None = None, out: Path | None = None,
) -> EditResult:  # fmt: skip
    """Add the domain `domain` (None: the only one) of the sibling `model` under `name` (None: its own).

    Experts, tables, and moments where it carries them, come in as they are; both models must have the same shared
    parameters. follow_up: as of `add_domain`, whatever domain it names. Raises UserError; nothing is changed then.
    """
    with CheckpointEditor(path, out) as subject:
        source, sibling = subject.checkpoint, resolve(model)
        if domain is None and len(sibling.domains) > 1:
            raise UserError(f"{sibling.path} has the domains {', '.join(sibling.domains)}: choose one as domain")
        domain = domain if domain is not None else sibling.domains[0]
        check_known(sibling, domain)
        name = name if name is not None else domain
        check_free(source, name)
        check_siblings(source, sibling)
        theirs = next(entry for entry in stored_config(sibling).to_dict()["domains"] if entry["name"] == domain)
        _extend(subject, {**theirs, "name": name, "weight": weight}, follow_up and replace(follow_up, name=name))
        new = EditedTensors()
        for tensor in sibling.names(domains=[domain], shared=False):
            if subject.has_moments or not parse_name(tensor).is_optimizer:
                new.copy(sibling, tensor, of_domain(tensor, name))
        fresh_moments(new, source, name, theirs["experts"])
        corpora, probe = sibling.fingerprints.corpora, sibling.probe([domain])
        return subject.write(
            f"add {name} from {sibling.path.name}",
            new,
            experts={name: {layer_name: groups[domain] for layer_name, groups in sibling.coverage.items()}},
            corpora={name: corpora[domain]} if domain in corpora else None,
            probe={name: probe[domain]} if probe else None,
        )


def _extend(subject: CheckpointEditor, entry: dict[str, Any], follow_up: domain_edits.FollowUpTraining | None):
    """The configuration with the new domain, checked; `subject.values` holds it too."""
    values = subject.values
    domain_edits.add_domain(values, entry, subject.checkpoint.step, follow_up)
    return domain_edits.checked(values, f"the new domain {entry['name']}")


def read_text(subject: CheckpointEditor, config: Config) -> tuple[DomainStore, dict[str, np.ndarray]]:
    """(the new domain's token store, its probe): the text is read, tokenised and cached as training will want it."""
    from pangu_sigma.data.domain_store import prepare_domain
    from pangu_sigma.data.packed_sequences import HeldoutSequences, first_sequences

    domain, tokenizer = config.domains[-1], stored_tokenizer(subject.checkpoint)
    with progress(f"tokenise {domain.name}", None, unit="documents") as job:
        store = prepare_domain(domain, tokenizer, config.data, lambda _name, _stage, done, _total: job.set(done))
    if not store.heldout.tokens:
        return store, {}
    heldout = HeldoutSequences(store.heldout, config.data.sequence_length, tokenizer.eod_id, tokenizer.pad_id)
    return store, first_sequences({domain.name: heldout}, config.checkpoint.probe_sequences)


def fresh_moments(new: EditedTensors, source: Checkpoint, name: str, experts: int) -> None:
    """Zero moments and step counts for what `new` does not bring itself, where the model carries its optimizer."""
    for tensor in source.names(domains=[source.domains[0]], shared=False, parameters=False):
        target, entry = of_domain(tensor, name), source.manifest.tensors[tensor]
        # What is of a layer has the group on its first axis; the word table's moments and step count have not.
        shape = (experts, *entry.shape[1:]) if parse_name(tensor).layer else entry.shape
        if target not in new.sources:
            new.add(target, entry.dtype, shape, partial(np.zeros, shape, np.dtype(entry.dtype)))
