"""Growing a model of learned gates for a new domain, as Lifelong-MoE does (Chen et al. 2023, arXiv 2305.12281).

Every sparse layer gets new experts and every gate a column for each; in the phase that follows, the old experts and
their columns keep every bit, the other shared parameters train near the model as it was before it grew (`regularise`),
which is kept with the run.

How new columns begin, per input row of the gate: as draws of a normal distribution with the mean and standard deviation
of the row's old columns (at least `model.init_std`), so that new experts are chosen about as often as old ones; with
`from:DOMAIN` as that domain's columns, in turn, plus a hundredth of such a draw, which breaks ties with the originals.
Columns of a tensor that begins as a constant (a noisy gate's noise) begin as the mean of the old ones. Experts begin as
`domains.initial` says.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from pangu_sigma.checkpoint import Checkpoint
from pangu_sigma.checkpoint.float_types import as_float32
from pangu_sigma.config import Config, domain_edits
from pangu_sigma.domains.add_domain import NEAREST, NewDomain, make_group
from pangu_sigma.domains.checkpoint_editor import CheckpointEditor, EditedTensors, EditResult, check_free
from pangu_sigma.errors import UserError
from pangu_sigma.tensor_names import gate_weight, parse_name
from pangu_sigma.training.continual.teacher_snapshot import TEACHER_KEY, TeacherSnapshot, hash_tensors, link_snapshot
from rre.counted_random import generator

_BREAKS_TIES = 0.01


def expand_domain(path: Path, new_domain: NewDomain, follow_up: domain_edits.FollowUpTraining) -> EditResult:
    """Add a domain to the run `path` of a learned gate, with experts and gate columns, and plan its training.

    Only the new domain's experts and columns train, and the other shared parameters as `follow_up` says. No old
    domain's file changes by a byte. Raises UserError; nothing is changed then.
    """
    with CheckpointEditor(path, None, any_router=True) as subject:
        source = subject.checkpoint
        _check_gate(source, subject.config)
        if new_domain.init == NEAREST:
            raise UserError(
                f"init {NEAREST} compares the domains' expert groups, and behind a gate there are none: take mean, or "
                "from:DOMAIN"
            )
        check_free(source, new_domain.name)
        values = subject.values
        domain_edits.add_domain(values, new_domain.entry(), source.step, follow_up)
        phases = values["train"]["phases"]
        phases[-1]["domains"] = [new_domain.name]
        config = domain_edits.checked(values, f"the new domain {new_domain.name}")
        new, of_domain_alone, _ = make_group(subject, config, new_domain)
        _add_shared(new, source, config, new_domain)
        kept = link_snapshot(subject.run_dir, source)
        snapshot = TeacherSnapshot(len(phases) - 1, source.step, hash_tensors(kept))
        return subject.write(
            f"expand by {new_domain.name} ({new_domain.init})",
            new,
            **of_domain_alone,
            extra_state={TEACHER_KEY: asdict(snapshot)},
        )


def _check_gate(source: Checkpoint, config: Config) -> None:
    if not source.coverage:
        raise UserError(f"{source.path} has no sparse layers, whose gates could grow: upcycle it first")
    if not config.model.router_spec.learned:
        adds = config.model.router_spec.separates_domains
        raise UserError(
            f"{source.path} routes by {config.model.router_setting}, which has no gate to expand: "
            + ("use pangu-sigma domains add" if adds else "expand a model with a learned gate")
        )
    if config.model.domain_parameters.embedding != "shared":
        raise UserError(
            f"{source.path} has model.domain_parameters.embedding = own, and before it grows no table reads the "
            "new text: expand models of one shared word embedding"
        )


def _add_shared(new: EditedTensors, source: Checkpoint, config: Config, new_domain: NewDomain) -> None:
    """The shared tensors and their moments as they are, the gates' with more columns."""
    for name in source.names(domains=[]):
        weight = gate_weight(name, config.model.router_spec)
        if weight is None or not weight.by_expert:
            new.copy(source, name)
            continue
        entry = source.manifest.tensors[name]
        shape = (*entry.shape[:-1], entry.shape[-1] + new_domain.experts)
        new.add_converted(name, entry.dtype, shape, partial(_grown_gate, source, config, new_domain, name))


def _grown_gate(source: Checkpoint, config: Config, new_domain: NewDomain, name: str) -> np.ndarray:
    old = as_float32(name, source.load([name])[name])
    shape, parsed = (*old.shape[:-1], new_domain.experts), parse_name(name)
    if parsed.is_optimizer:
        columns = np.zeros(shape, np.float32)
    elif gate_weight(name, config.model.router_spec).initial is not None:
        columns = np.broadcast_to(old.mean(-1, keepdims=True), shape)
    else:
        rng = generator(config.run.seed, f"gate columns {new_domain.name} {name}")
        spread = np.maximum(old.std(-1, keepdims=True), config.model.init_std)
        drawn = rng.standard_normal(shape, np.float32) * spread
        kind, _, of = new_domain.init.partition(":")
        if kind == "from":
            sizes = list(source.coverage[parsed.layer].values())
            domain_id = source.domains.index(of)
            first = sum(sizes[:domain_id])
            columns = old[..., first + np.arange(new_domain.experts) % sizes[domain_id]] + _BREAKS_TIES * drawn
        else:
            columns = old.mean(-1, keepdims=True) + drawn
    return np.concatenate([old, columns.astype(np.float32)], -1)
