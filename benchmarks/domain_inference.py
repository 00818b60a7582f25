"""How hard it is to infer the domain of a text: short texts, domains that are close, texts of two domains.

    python -m benchmarks.domain_inference MODEL [--batches N] [--out DIR]

MODEL is a trained model whose domains have expert groups. Held-out text of every domain is read under every group.
Written to benchmarks/results/domain_inference.md: how often each domain is taken for each other one after so many
tokens, what that costs beside ln G / n, and what texts whose second half is another domain's cost.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.record import RESULTS, machine, sentence, write_results
from pangu_sigma.data.packed_sequences import HeldoutSequences
from pangu_sigma.errors import UserError
from pangu_sigma.evaluation.inferred_domains import DomainLikelihood, accuracy_after
from pangu_sigma.generation.domain_inference import auto_log_probabilities, posteriors
from pangu_sigma.trained_model import load_trained


class MixedDocuments:
    """Texts whose first half of S labels is one domain's and whose second is another's, for as many as both fill."""

    def __init__(self, first: HeldoutSequences, second: HeldoutSequences) -> None:
        self.halves, self.half = (first, second), first.sequence_length // 2

    def batch(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [count, S + 1] and mask float32 [count, S], 0 in a text that is not full."""
        (first, one), (second, two) = (texts.batch(start, count) for texts in self.halves)
        tokens = np.concatenate([first[:, : self.half + 1], second[:, self.half + 1 :]], axis=1)
        full = (one.all(axis=1) & two.all(axis=1)).astype(np.float32)
        return tokens, np.repeat(full[:, None], one.shape[1], axis=1)


def short_texts(texts: Sequence[np.ndarray], own: int, after: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Token count n -> {"inferred": share of the texts that each group [G] is likeliest for, "best": what the likeliest
    domain costs, "mixed": what all of them mixed cost}, in nats per token more than the given domain, over n tokens.

    texts: log likelihoods [G, n] of one domain's texts, which is number `own`; a uniform prior.
    """
    result = {}
    for length in after:
        long = [text[:, :length] for text in texts if text.shape[1] >= length]
        if not long:
            continue
        groups = long[0].shape[0]
        uniform = np.full(groups, 1.0 / groups)
        believed = [posteriors(text, uniform) for text in long]
        inferred = np.bincount([int(p[:, -1].argmax()) for p in believed], minlength=groups) / len(long)
        costs = {
            name: float(np.mean([text[own].sum() - auto_log_probabilities(text, p, top).sum()
                                 for text, p in zip(long, believed, strict=True)]) / length)
            for name, top in (("best", 1), ("mixed", groups))
        }  # fmt: skip
        result[length] = {"inferred": inferred.tolist(), **costs}
    return result


def mixed_documents(texts: Sequence[np.ndarray], first: int, second: int, half: int) -> dict[str, float] | None:
    """What texts [G, S] cost whose first `half` tokens are of group `first`, in nats per token more than each half
    under its own group: read by the likeliest group ("best"), by all mixed ("mixed"), by the better of the two ("one").
    """
    if not texts:
        return None
    costs: dict[str, list[float]] = {"best": [], "mixed": [], "one": []}
    for text in texts:
        uniform = np.full(len(text), 1.0 / len(text))
        given = text[first, :half].sum() + text[second, half:].sum()
        believed = posteriors(text, uniform)
        costs["best"].append(given - auto_log_probabilities(text, believed, 1).sum())
        costs["mixed"].append(given - auto_log_probabilities(text, believed, len(text)).sum())
        costs["one"].append(given - max(text[first].sum(), text[second].sum()))
    return {name: float(np.mean(values)) / texts[0].shape[1] for name, values in costs.items()}


def measure(path: Path, batches: int) -> dict[str, Any]:
    """Everything of one model, of at most so many batches of each domain's held-out text."""
    trained = load_trained(path)
    model = trained.model
    names, size = model.groups.names, model.config.evaluate.batch_size
    if not model.config.model.separates_domains or len(names) < 2:
        raise UserError(f"{path} has no two domains with expert groups of their own: name a model that has")
    likelihood, record = DomainLikelihood(model, size), {"domains": list(names), "short": {}, "mixed": {}}
    with TemporaryDirectory(prefix="pangu-sigma-") as scratch:
        heldout = trained.corpus(Path(scratch)).heldout_to_measure()
        length = model.config.data.sequence_length
        for own, name in enumerate(names):
            count = min(batches, -(-len(heldout[name]) // size))
            texts = list(likelihood.sequences(heldout[name], count, lambda _: None))
            record["short"][name] = short_texts(texts, own, accuracy_after(length))
        for first, second in permutations(range(len(names)), 2):
            pair = [heldout[names[first]], heldout[names[second]]]
            count = min(batches, *(-(-len(texts) // size) for texts in pair))
            texts = list(likelihood.sequences(MixedDocuments(*pair), count, lambda _: None))
            record["mixed"][f"{names[first]} → {names[second]}"] = mixed_documents(texts, first, second, length // 2)
    model.store.close()
    return record


def page(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    names = record["domains"]
    taken = " | ".join(f"taken for {name}" for name in names)
    lines = ["# Inferring the domain of a text", "", "Nats per token more than with the domain given, under a uniform "
             f"prior over {len(names)} domains, which costs ln {len(names)} / n by itself where all are mixed.", "",
             f"| text of | tokens | {taken} | likeliest | mixed | ln G / n |",
             f"| {' | '.join(['---'] * (len(names) + 5))} |"]  # fmt: skip
    for name, by_length in record["short"].items():
        for length, figures in by_length.items():
            shares = " | ".join(f"{100 * share:.1f} %" for share in figures["inferred"])
            price = math.log(len(names)) / int(length)
            lines.append(
                f"| {name} | {length} | {shares} | {figures['best']:+.3f} | {figures['mixed']:+.3f} | {price:.3f} |"
            )
    lines += ["", "Texts whose second half is of another domain, against each half under its own:", ""]
    lines += ["| halves | likeliest so far | mixed | the better of the two for all |", "| --- | --- | --- | --- |"]
    for halves, costs in record["mixed"].items():
        if costs is not None:
            lines.append(f"| {halves} | {costs['best']:+.3f} | {costs['mixed']:+.3f} | {costs['one']:+.3f} |")
    return "\n".join([*lines, "", sentence(record["machine"]), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="How hard it is to infer the domain of a text.")
    parser.add_argument("model", type=Path, help="run, checkpoint or model folder")
    parser.add_argument("--batches", type=int, default=8, help="batches of each domain's held-out text, at most")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    given = parser.parse_args()
    if given.batches < 1:
        parser.error("--batches must be at least 1.")
    try:
        record = measure(given.model, given.batches) | {"machine": machine("mindspore")}
    except UserError as error:
        sys.exit(f"Error: {error}")
    written = page(record)
    write_results(given.out, "domain_inference", record, written)
    print(written)


if __name__ == "__main__":
    main()
