"""What each domain of a model owns, how much text it has seen, and its last loss; no tensor is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pangu_sigma.checkpoint import Checkpoint, resolve
from pangu_sigma.checkpoint.run_config_file import DOMAIN_CHANGES
from pangu_sigma.errors import UserError
from pangu_sigma.monitor.metrics_log import read_metrics
from pangu_sigma.tensor_names import is_routing
from pangu_sigma.trained_model import run_of, stored_config


@dataclass(frozen=True)
class DomainListing:
    """One domain of a checkpoint: experts by sparse layer, its own parameters (tables do not count), bytes, files, all
    without optimizer state."""

    name: str
    experts: dict[str, int]
    parameters: int
    bytes: int
    files: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class DomainFacts(DomainListing):
    """One domain, its bytes with moments too.

    tokens: that it gave to training, None where the model does not say. loss: the last held-out loss (nats per token)
    at `loss_step`, or the last training loss where nothing was held out (`loss_kind` evaluate or train); None before
    the first. unigram: the unigram model's loss on the text that a held-out loss was measured on.
    """

    bytes_with_optimizer: int
    tokens: int | None
    loss: float | None
    loss_step: int | None
    loss_kind: str | None
    unigram: float | None = None

    def __repr__(self) -> str:
        loss = None if self.loss is None else round(self.loss, 3)
        return f"DomainFacts({self.name!r}, parameters={self.parameters:,}, tokens={self.tokens}, loss={loss})"


def list_domains(path: str | Path) -> list[DomainFacts]:
    """The domains of a run (its last checkpoint), a checkpoint or a model folder, in the model's order.

    Raises UserError if `path` holds no whole model.
    """
    checkpoint = resolve(path)
    length = stored_config(checkpoint).data.sequence_length
    assert length is not None  # filled in when the run began
    cursors = checkpoint.state.get("sampler", {}).get("domains", {})
    losses = _losses(checkpoint)
    facts = []
    for name in checkpoint.domains:
        listing, tensors = _listing(checkpoint, name), checkpoint.names(domains=[name], shared=False)
        cursor = cursors.get(name, {"cursor": 0} if cursors else None)
        facts.append(
            DomainFacts(
                **vars(listing),
                bytes_with_optimizer=_bytes(checkpoint, checkpoint.files(tensors)),
                tokens=int(cursor["cursor"]) * length if cursor is not None else None,
                **losses.get(name, {"loss": None, "loss_step": None, "loss_kind": None}),
            )
        )
    return facts


def list_files(path: str | Path) -> list[DomainListing]:
    """What each domain owns, in the model's order; nothing but the manifest is read. Raises as `list_domains`."""
    checkpoint = resolve(path)
    return [_listing(checkpoint, domain) for domain in checkpoint.domains]


def _listing(checkpoint: Checkpoint, domain: str) -> DomainListing:
    names = checkpoint.names(domains=[domain], shared=False, optimizer=False)
    files, tensors = checkpoint.files(names), checkpoint.manifest.tensors
    return DomainListing(
        name=domain,
        experts={layer: groups[domain] for layer, groups in checkpoint.coverage.items() if domain in groups},
        parameters=sum(math.prod(tensors[name].shape) for name in names if not is_routing(name)),
        bytes=_bytes(checkpoint, files),
        files=tuple(files),
    )


def _bytes(checkpoint: Checkpoint, files: list[str]) -> int:
    return sum(checkpoint.manifest.files[file].bytes for file in files)


def _losses(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The last loss of every domain in the metrics of the checkpoint's run, up to its step."""
    run_dir = run_of(checkpoint)
    if run_dir is None:
        return {}
    try:
        records = read_metrics(run_dir)
    except UserError:
        return {}  # a run without metrics, such as one that was begun by hand
    changes = checkpoint.state.get(DOMAIN_CHANGES, [])
    last_losses: dict[str, dict[str, Any]] = {}
    for kind in ("train", "evaluate"):
        for record in records:
            if record["kind"] != kind or record["step"] > checkpoint.step:
                continue
            for recorded, loss in record["losses"].items():
                name = _name_now(recorded, record["step"], changes)
                # Nothing is told of a domain without text.
                if name is not None and math.isfinite(loss):
                    unigram = record.get("unigram", {}).get(recorded)
                    last_losses[name] = {
                        "loss": loss, "loss_step": record["step"], "loss_kind": kind, "unigram": unigram,
                    }  # fmt: skip
    return last_losses


def _name_now(name: str, step: int, changes: Sequence[Mapping[str, Any]]) -> str | None:
    """What the domain is called now that was called `name` when a record of `step` was written; None if it is gone.

    changes: the run's, in order; those of the record's step came after it.
    """
    for change in changes:
        kind, *words = change["change"].split()
        if change["step"] < step:
            continue
        if kind == "rename" and words[0] == name:
            name = words[2]
        elif (kind in ("remove", "add") and words[0] == name) or (kind == "expand" and words[1] == name):
            return None
    return name
