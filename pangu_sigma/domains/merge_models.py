"""Merging models that were trained apart from one parent: equal shared parameters, every model's domains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pangu_sigma.checkpoint import Checkpoint, Fingerprints, StreamedCheckpoint, resolve, write_model_folder
from pangu_sigma.checkpoint.model_folder import check_output
from pangu_sigma.checkpoint.streamed_checkpoint import plan_taken
from pangu_sigma.config import config_from_dict
from pangu_sigma.config.config_paths import stored_text
from pangu_sigma.config.finetuning_file import without_adaptation
from pangu_sigma.config.load_config import with_run_folder
from pangu_sigma.domains.checkpoint_editor import EditResult, check_router
from pangu_sigma.domains.sibling_models import check_siblings, different_tensors
from pangu_sigma.errors import UserError
from pangu_sigma.monitor.progress import progress
from pangu_sigma.signals import stop_signals_raise
from pangu_sigma.trained_model import stored_config


def merge_models(paths: Sequence[Path], out: Path) -> EditResult:
    """Write the model folder `out` with the domains of all models, in their order; optimizer state stays behind.

    A domain that several of them have must be the same in all, and is taken once. Raises UserError naming what differs.
    """
    if len(paths) < 2:
        raise UserError("one model alone cannot be merged: name at least two")
    out = check_output(out)
    models = [resolve(path) for path in paths]
    first = models[0]
    owners: dict[str, Checkpoint] = {}
    for model in models:
        check_router(model, stored_config(model))
        if model is not first:
            check_siblings(first, model)
        for domain in model.domains:
            _check_same(domain, owners.setdefault(domain, model), model)
    config = stored_config(first)
    values = with_run_folder(config, out)
    entries = {model.path: {e["name"]: e for e in stored_config(model).to_dict()["domains"]} for model in models}
    values["domains"] = [entries[model.path][domain] for domain, model in owners.items()]
    # What was planned for one of the models is no plan for all of their domains.
    values["train"] |= {"phases": [], "stop_at": None}
    without_adaptation(values)
    values["data"]["stream"] = None
    values["parallel"] = {}
    if not sum(entry["weight"] for entry in values["domains"]):
        values["domains"] = [{**entry, "weight": 1.0} for entry in values["domains"]]
    merged = config_from_dict(values, source="the merged configuration")
    content = StreamedCheckpoint(
        taken=[
            *plan_taken(first, ["shared"]),
            *(file for domain, model in owners.items() for file in plan_taken(model, [f"domains/{domain}"])),
        ],
        link=True,
        domains=list(owners),
        coverage={
            layer_name: {domain: model.coverage[layer_name][domain] for domain, model in owners.items()}
            for layer_name in first.coverage
        },
        config_text=stored_text(merged, out, is_model=True),
        state={
            "origin": {
                "job": "merge",
                "parents": [{"sha256": m.sha256, "step": m.step, "domains": list(m.domains)} for m in models],
            }
        },
        tokenizer_files=first.tokenizer_files(),
        fingerprints=Fingerprints(
            tokenizer=first.fingerprints.tokenizer,
            corpora={
                domain: model.fingerprints.corpora[domain]
                for domain, model in owners.items()
                if domain in model.fingerprints.corpora
            },
        ),
        step=max(model.step for model in models),
        probe={domain: sequences for domain, model in owners.items() for sequences in model.probe([domain]).values()},
    )
    with stop_signals_raise(), progress("merge", content.bytes, unit="B") as job:
        written = write_model_folder(out, content, progress=lambda done, _: job.set(done))
    return EditResult(written, merged, None)


def _check_same(domain: str, owner: Checkpoint, model: Checkpoint) -> None:
    """Raises UserError unless a domain that two models have is the same in both."""
    if owner is model:
        return
    names, others = (m.names(domains=[domain], shared=False, optimizer=False) for m in (owner, model))
    if names != others or different_tensors(owner, model, names):
        raise UserError(
            f"{owner.path} and {model.path} both have a domain {domain}, and not the same one: remove or rename it in "
            "one of them with pangu-sigma domains"
        )
