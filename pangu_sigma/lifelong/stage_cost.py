"""What a stage cost: time, tokens, parameters, bytes; read from its run's files."""

from __future__ import annotations

from typing import Any

from pangu_sigma.checkpoint import Checkpoint, folder_layout
from pangu_sigma.config.parameter_counts import parameter_counts
from pangu_sigma.domains.list_domains import list_files
from pangu_sigma.lifelong.stage_plan import Plan, Stage
from pangu_sigma.monitor.metrics_log import read_metrics
from pangu_sigma.trained_model import stored_config


def stage_cost(plan: Plan, stage: Stage, checkpoint: Checkpoint, before: Checkpoint | None) -> dict[str, Any]:
    """Figures of a finished stage, whose predecessor ended with `before`.

    seconds: training steps only (saves and evaluations left out), by the mean speed of the records where a resumed run
    has lost some of them. tokens: labels trained on. parameters: total, shared, new (came in with the stage), trained
    (those that may have changed), active (most per token). bytes: model, model with optimizer state, and
    written anew (in files that the stage before does not have).
    """
    config = stored_config(checkpoint)
    counts = parameter_counts(config, config.model.vocab_size)
    old = parameter_counts(stored_config(before), config.model.vocab_size).total if before is not None else 0
    shared_trains = stage.policy.shared != "frozen"
    phase = plan.phase(stage)
    if phase["domains"] is not None:
        trained = phase["domains"]
    else:
        # A gate sends any text to any expert; without one only the groups of what was drawn see a token.
        trained = plan.drawn(stage) if plan.by_domain else list(counts.per_domain)
    files = checkpoint.manifest.files
    known = {entry.sha256 for entry in before.manifest.files.values()} if before is not None else set()
    tensors = {path: entry for path, entry in files.items() if entry.header_bytes is not None}
    start = before.step if before is not None else 0
    tokens = int(checkpoint.state["tokens"]) - (int(before.state["tokens"]) if before is not None else 0)
    return {
        "steps": checkpoint.step - start,
        "tokens": tokens,
        "seconds": _seconds(plan, stage, start, checkpoint.step, tokens),
        "parameters": {
            "total": counts.total,
            "shared": counts.shared,
            "new": counts.total - old,
            "trained": counts.shared * shared_trains + sum(counts.per_domain[name] for name in trained),
            "active": max(counts.activated_per_token.values()),
        },
        "bytes": {
            "model": sum(e.bytes for path, e in tensors.items() if not _is_optimizer(path)),
            "with_optimizer": sum(e.bytes for e in tensors.values()),
            "written": sum(e.bytes for e in tensors.values() if e.sha256 not in known),
        },
    }


def learning(plan: Plan, stage: Stage, checkpoint: Checkpoint, texts: dict[str, int]) -> dict[str, Any]:
    """How the stage met its text: domain -> {"passes", "online_loss"}, of the domains that it learns.

    passes: tokens drawn in all stages so far over the tokens of the domain's training text (`texts`); at most 1 means
    that every text was met once. online_loss: mean training loss (nats per token), each batch being measured before
    the step that learns from it.
    """
    cursors = checkpoint.state.get("sampler", {}).get("domains", {})
    length = plan.base.data.sequence_length
    start = plan.end(stage) - stage.steps
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in stage.domains}
    for record in _train_records(plan, stage, start, checkpoint.step):
        for name, loss in record["losses"].items():
            if name in sums:
                sums[name][0] += loss * record["tokens"][name]
                sums[name][1] += record["tokens"][name]
    return {
        name: {
            "passes": cursors[name]["cursor"] * length / texts[name] if name in cursors else None,
            "online_loss": total / tokens if tokens else None,
        }
        for name, (total, tokens) in sums.items()
    }


def domain_costs(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Domain -> {"parameters", "bytes"} that the model has for it alone, optimizer state left out."""
    return {own.name: {"parameters": own.parameters, "bytes": own.bytes} for own in list_files(checkpoint.path)}


def parameter_hashes(checkpoint: Checkpoint, domain: str) -> dict[str, str]:
    """File -> sha256 of everything that a text of `domain` is read with: the shared parameters, the domain's own."""
    names = checkpoint.names(domains=[domain], optimizer=False)
    return {file: checkpoint.manifest.files[file].sha256 for file in checkpoint.files(names)}


def _is_optimizer(path: str) -> bool:
    return folder_layout.group_of_file(path).startswith("optimizer/")


def _train_records(plan: Plan, stage: Stage, start: int, end: int) -> list[dict[str, Any]]:
    records = read_metrics(plan.run_dir(stage))
    return [record for record in records if record["kind"] == "train" and start < record["step"] <= end]


def _seconds(plan: Plan, stage: Stage, start: int, end: int, tokens: int) -> float | None:
    records = _train_records(plan, stage, start, end)
    recorded = sum(sum(record["tokens"].values()) for record in records)
    return sum(record["seconds"] for record in records) * tokens / recorded if recorded else None
