"""The version of the configuration's schema, and which keys changed their names with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pangu_sigma.errors import UserError

SCHEMA_VERSION = 2

# What version 1 wrote -> what the same is called now.
CHANGED_KEYS = (
    ("train.accumulation", "train.gradient_accumulation_steps"),
    ("schedule.final_factor", "schedule.min_lr_ratio"),
    ("optimizer.clip_norm", "optimizer.max_grad_norm"),
    ("data.domains_per_step", "data.max_domains_per_batch"),
    ("model.embedding_slots: shared, per_domain", "model.domain_parameters.embedding: shared, own"),
    ("model.sparse.router: adaptive_mixture", "model.top_layer: mixture"),
    ("model.sparse.mixture_loss", "model.mixture_loss"),
    ("data.deduplicate: true, false", "data.deduplicate: near, none"),
    ("parallel.rehearse", "parallel.emulate_mesh"),
)
# What version 2 takes for keys that a file leaves out, where version 1 took something else.
CHANGED_DEFAULTS = (
    "data.deduplicate is exact, a preset has sparse layers unless model.sparse.layers is 0, and evaluate.every and "
    "checkpoint.every follow train.steps unless they are 0"
)
# The last version of pangu-sigma that reads folders whose configuration has schema version 1.
_LAST_READER = "0.1.0"


def refuse_old_file(values: Mapping[str, Any], source: str) -> None:
    """Raises UserError, which lists the keys that changed, where `values` of the file `source` are of version 1."""
    if _is_version_1(values):
        changes = ", ".join(f"{before} -> {after}" for before, after in CHANGED_KEYS)
        raise UserError(
            f"{source}: schema_version = 1 cannot be read: set it to {SCHEMA_VERSION} and rename the keys that changed "
            f"({changes}); of what is left out, {CHANGED_DEFAULTS}"
        )


def refuse_old_folder(values: Mapping[str, Any], source: str) -> None:
    """Raises UserError where `values`, stored in a run, checkpoint or model folder, are of version 1."""
    if _is_version_1(values):
        raise UserError(
            f"{source}: schema_version = 1 cannot be read: {_LAST_READER} is the last version of pangu-sigma that "
            "reads this folder"
        )


def changed_name(key: str) -> str | None:
    """What a key path of version 1 is called now; None where it did not change."""
    names = {before.partition(":")[0]: after.partition(":")[0] for before, after in CHANGED_KEYS}
    return names.get(key)


def _is_version_1(values: Mapping[str, Any]) -> bool:
    version = values.get("schema_version")
    return version == 1 and not isinstance(version, (bool, float))
