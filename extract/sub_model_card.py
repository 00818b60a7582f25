"""The model card of a sub-model: a README that says where it came from, how large and how good it is, how to use it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from extract.extraction_plan import ExtractionPlan
from extract.verify_sub_model import Verification
from pangu_sigma.checkpoint import Checkpoint
from pangu_sigma.checkpoint.disk_space import human_bytes
from pangu_sigma.config import parameter_counts
from pangu_sigma.errors import UserError
from pangu_sigma.monitor.printable_text import printable
from pangu_sigma.monitor.result_files import read_json
from pangu_sigma.monitor.text_tables import number, perplexity
from pangu_sigma.tensor_names import is_routing
from pangu_sigma.trained_model import run_of
from pangu_sigma.version import VERSION


@dataclass(frozen=True)
class HeldoutQuality:
    """Held-out figures of a run at one step: domain -> mean loss in nats per token, its own and a unigram model's;
    held-out tokens that both are of."""

    step: int
    losses: dict[str, float]
    unigram: dict[str, float]
    tokens: dict[str, int]


def measured(checkpoint: Checkpoint) -> HeldoutQuality | None:
    """What the checkpoint's run measured at its step on most text; None where nothing was, or where it has no run."""
    run = run_of(checkpoint)
    if run is None:
        return None
    results = [read_json(run / "evaluation.json")]
    if (run / "metrics.jsonl").is_file():
        from pangu_sigma.monitor.metrics_log import read_metrics

        results += [record for record in reversed(read_metrics(run)) if record["kind"] == "evaluate"]
    try:
        found = [
            HeldoutQuality(result["step"], result["losses"], result["unigram"], result["tokens"])
            for result in results
            if result is not None and result["step"] == checkpoint.step
        ]
    except KeyError as error:
        path = run / "evaluation.json"
        raise UserError(f"{path} is damaged: delete it, or make it anew with pangu-sigma evaluate") from error
    return max(found, key=lambda quality: sum(quality.tokens.values()), default=None)


def model_card(
    cut: ExtractionPlan, bytes_written: int, quality: HeldoutQuality | None, verification: Verification | None
) -> str:
    """The card as Markdown; `found` is None for a sub-model that was not verified."""
    config, parent = cut.config, cut.parent
    counts = parameter_counts(config, config.model.vocab_size)
    domain_names = ", ".join(cut.domains)
    kind = "a dense PanGu-α" if cut.fold else "a PanGu-Σ model"
    sizes = {d: sorted({groups[d] for groups in parent.coverage.values()}) for d in cut.domains}
    run = run_of(parent) or parent.path
    lines = [
        f"# {printable(domain_names)}: cut out of {printable(run.name)}",
        "",
        f"The shared layers of a PanGu-Σ model and the experts of {len(cut.domains)} of its {len(parent.domains)} "
        f"domains: {kind} of its own.",
        "",
        "| | |",
        "| --- | --- |",
        f"| domains | {domain_names} |",
        f"| parent | {printable(run.name)}, step {parent.step}, {len(parent.domains)} domains |",
        f"| parent's manifest, sha256 | `{parent.sha256}` |",
        f"| parameters | {counts.total:,} ({counts.shared:,} shared"
        + "".join(f", {counts.per_domain[d]:,} of {d}" for d in cut.domains)
        + ") |",
        "| activated per token | " + ", ".join(f"{counts.activated_per_token[d]:,} ({d})" for d in cut.domains) + " |",
        "| experts in a sparse layer | "
        + (
            "none: the one expert of each became its dense layer"
            if cut.fold
            else ", ".join(f"{' or '.join(map(str, sizes[d]))} ({d})" for d in cut.domains)
        )
        + " |",
        f"| stored as | {_types(cut)}, {human_bytes(bytes_written)} |",
        f"| vocabulary, longest sequence | {config.model.vocab_size:,} ids, {config.model.positions:,} tokens |",
        f"| tokenizer's fingerprint | `{parent.fingerprints.tokenizer}` |",
        f"| cut by | pangu-sigma {VERSION} |",
        "",
        "## Quality",
        "",
    ]
    lines += _quality(cut, quality, verification)
    lines += ["", "## Verification", "", _verification(verification), "", "## Use", "", "```sh"]
    domain = f" --domain {cut.domains[0]}" if len(cut.domains) > 1 else ""
    lines += [
        f'pangu-sigma generate DIR{domain} --prompt "…"',
        "pangu-sigma serve DIR",
        "pangu-sigma evaluate DIR",
        "# continues it in a new folder NEW; the optimizer's state starts fresh:",
        "pangu-sigma train DIR/config.yaml run.init_from=DIR run.dir=NEW",
        "```",
        "",
        "`DIR` is this folder. `manifest.json` lists every file and tensor with its sha256.",
        "",
    ]
    return "\n".join(lines)


def _types(cut: ExtractionPlan) -> str:
    """The element types of the weights."""
    stored = {cut.stored_type(source) for name, source in cut.sources.items() if not is_routing(name)}
    return ", ".join(sorted(stored))


def _quality(cut: ExtractionPlan, quality: HeldoutQuality | None, verification: Verification | None) -> list[str]:
    lines = []
    if quality is not None:
        lines += [
            f"Held-out text of the parent's run at step {quality.step}, nats per token, measured in the parent:",
            "",
            "| domain | loss | perplexity | unigram model's loss | tokens |",
            "| --- | --- | --- | --- | --- |",
        ]
        for domain in cut.domains:
            loss = quality.losses.get(domain, math.nan)
            unigram = number(quality.unigram.get(domain))
            tokens = f"{quality.tokens.get(domain, 0):,}"
            lines.append(f"| {domain} | {number(loss)} | {number(perplexity(loss), 2)} | {unigram} | {tokens} |")
        lines.append("")
    if verification is not None:
        lines += [
            "Loss on the few probe sequences that travel in this folder, nats per token. It shows that both models "
            "agree; of so little text it cannot be compared with the loss of the held-out text:",
            "",
            "| domain | parent | this model | sequences |",
            "| --- | --- | --- | --- |",
        ]
        for domain, (parent, own) in verification.probe_losses.items():
            lines.append(f"| {domain} | {number(parent, 6)} | {number(own, 6)} | {verification.sequences[domain]} |")
    return lines or ["Not measured: the parent's run was not at hand. `pangu-sigma evaluate DIR` measures it."]


def _verification(verification: Verification | None) -> str:
    if verification is None:
        return "Not verified, as whoever cut it out chose; every copied byte was checked against the parent's hashes."
    return (
        f"This model beside its parent, computed in {verification.precision} on {verification.device} in batches of "
        f"{verification.batch_size} × {verification.sequence_length} tokens: {verification.line()}. "
        "Details are in `verification.json`."
    )
