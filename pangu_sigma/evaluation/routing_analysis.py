"""Routing analysis, `pangu-sigma analyze RUN`: measures the routing of every checkpoint of a run and writes tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pangu_sigma.checkpoint.checkpoint_reader import Checkpoint, open_checkpoint
from pangu_sigma.checkpoint.retention import list_checkpoints
from pangu_sigma.errors import UserError
from pangu_sigma.evaluation import routing_measures
from pangu_sigma.evaluation.routing_analysis_files import write_tables
from pangu_sigma.evaluation.routing_observer import RoutingObservation, RoutingObserver
from pangu_sigma.model.state_dict import restore_model, stored_tables
from pangu_sigma.monitor.metrics_log import FILE_NAME, read_metrics
from pangu_sigma.monitor.progress import progress
from pangu_sigma.monitor.result_files import write_json
from pangu_sigma.trained_model import TrainedModel, load_trained, stored_config, stored_weights

RESULT = "analysis.json"
FAVOURITE_TOKENS = 8  # token ids named for each expert
MIN_OCCURRENCES = 4  # of an id that is named
ALL_PAIRS_UP_TO = 64  # experts up to which all pairs are kept
MAX_PAIRS = 64  # pairs kept of a larger layer


def analyze(run: Path, tokens: int) -> dict:
    """Measure the routing of `run`'s checkpoints on the first `tokens` held-out tokens of each domain.

    Writes analysis.json and the folder analysis/ of tables into the run's folder and returns what the file holds.
    Raises UserError where the model has no sparse layer and for anything wrong with the run.
    """
    if tokens < 1:
        raise UserError(f"tokens is {tokens}: give at least 1")
    trained = load_trained(run)
    if trained.run_dir is None or trained.run_dir.resolve() != run.resolve():
        raise UserError(f"{run} is no run: name the folder of a run, whose checkpoints are compared")
    model = trained.model
    if not model.routers:
        raise UserError(f"the model of {run} has no sparse layer: there is no routing to analyze")
    checkpoints, passed_over = comparable(run, trained)
    with TemporaryDirectory(prefix="pangu-sigma-") as scratch:
        corpus = trained.corpus(Path(scratch))
        heldout = corpus.heldout_to_measure()
        observer = RoutingObserver(model, model.config.evaluate.batch_size, tokens)
        total = len(checkpoints) * sum(observer.batches(text) for text in heldout.values())
        observed: list[tuple[int, dict[str, RoutingObservation]]] = []
        with progress("analyze", total, unit="batches") as job:
            for checkpoint in checkpoints:
                load_weights(trained, checkpoint)
                observed.append((checkpoint.step, observer.observe(heldout, job.advance)))
    result = {
        "step": trained.checkpoint.step,
        "router": model.config.model.router,
        "steps": [step for step, _ in observed],
        "passed_over": passed_over,
        "tokens": {name: len(routing.token_ids) for name, routing in observed[-1][1].items()},
        "layers": {
            layer_name: measure_layer(layer_name, observed, trained)
            for layer_name in model.config.model.sparse_prefixes
        },
    }
    write_json(run / RESULT, result)
    write_tables(run / "analysis", result)
    return result


def comparable(run: Path, trained: TrainedModel) -> tuple[list[Checkpoint], list[str]]:
    """(the run's checkpoints with the last one's layers and expert groups, oldest first; a sentence for each other)."""
    last = trained.checkpoint
    kept, passed_over = [], []
    expected = _shape(trained.model.config)
    for step, path in list_checkpoints(run)[0]:
        if path == last.path:
            continue
        checkpoint = open_checkpoint(path)
        if _shape(stored_config(checkpoint)) == expected:
            kept.append(checkpoint)
        else:
            passed_over.append(f"step {step} has other layers or expert groups than step {last.step}")
    return [*kept, last], passed_over


def _shape(config) -> tuple:
    return config.model, [(domain.name, domain.experts) for domain in config.domains]


def load_weights(trained: TrainedModel, checkpoint: Checkpoint) -> None:
    """Fill the model with a checkpoint's parameters and routing tables."""
    tensors = stored_weights(checkpoint)
    restore_model(trained.model, tensors)
    for layer_name, tables in stored_tables(tensors).items():
        trained.model.tables[layer_name].update(tables)
    for layer_name, router in zip(trained.model.config.model.sparse_prefixes, trained.model.routers, strict=True):
        if not router.learned:
            router.tables = trained.model.tables[layer_name]


def measure_layer(
    layer_name: str, observed: list[tuple[int, dict[str, RoutingObservation]]], trained: TrainedModel
) -> dict:
    """All measures of one sparse layer; `observed` (step, domain -> observation) with the last checkpoint last."""
    model = trained.model
    final = observed[-1][1]
    hits = {name: routing.hits[layer_name] for name, routing in final.items()}
    together = np.concatenate(list(hits.values()))
    ids = np.concatenate([routing.token_ids for routing in final.values()])
    use = routing_measures.vocabulary_use(together, ids)
    return {
        "experts": {name: model.groups.of(name).stop - model.groups.of(name).start for name in model.groups.names},
        "saturation": [
            {"step": step, **saturation_by_domain(layer_name, by_domain, final)} for step, by_domain in observed
        ],
        "load": routing_measures.load(together).tolist(),
        "entropy": {name: routing_measures.entropy(reachable_load(h, name, trained)) for name, h in hits.items()},
        "imbalance": {name: routing_measures.imbalance(reachable_load(h, name, trained)) for name, h in hits.items()},
        "domain_specialisation": {name: routing_measures.specialisation(h).tolist() for name, h in hits.items()},
        "vocabulary_specialisation": use.mean_largest,
        "favourites": [
            [
                {"token": trained.tokenizer.piece(token), "id": token, "share": share, "occurrences": times}
                for token, share, times in use.favourites(expert, FAVOURITE_TOKENS, MIN_OCCURRENCES)
            ]
            for expert in range(together.shape[1])
        ],
        "coactivation": list(coactivation(together)),
        "dropped_share": dropped(trained.run_dir, layer_name),
    }


def saturation_by_domain(
    layer_name: str, earlier: Mapping[str, RoutingObservation], final: Mapping[str, RoutingObservation]
) -> dict[str, dict[str, float] | float]:
    """Saturation of one checkpoint: of all tokens, and by domain."""
    by_domain = {
        name: routing_measures.saturation(earlier[name].hits[layer_name], final[name].hits[layer_name])
        for name in final
    }
    weights = [len(routing.token_ids) for routing in final.values()]
    return {"all": float(np.average(list(by_domain.values()), weights=weights)), "domains": by_domain}


def reachable_load(hits: np.ndarray, domain: str, trained: TrainedModel) -> np.ndarray:
    """Load of the experts that this domain's text can reach: its group, or all where a gate or one table decides."""
    shares = routing_measures.load(hits)
    model = trained.model
    separate = model.config.model.router_spec.separates_domains
    return shares[model.groups.of(domain)] if separate else shares


def coactivation(hits: np.ndarray) -> Iterator[dict[str, float | int]]:
    """Pairs of different experts that share tokens, strongest first: all of a small layer, `MAX_PAIRS` of a large
    one.
    """
    shares = routing_measures.coactivation(hits)
    np.fill_diagonal(shares, 0.0)
    order = np.argsort(-shares, axis=None, kind="stable")
    for flat in order[: None if len(shares) <= ALL_PAIRS_UP_TO else MAX_PAIRS]:
        i, j = (int(n) for n in np.unravel_index(flat, shares.shape))
        if shares[i, j] == 0.0:
            return
        yield {"expert": i, "other": j, "share": float(shares[i, j])}


def dropped(run: Path, layer_name: str) -> dict[str, float]:
    """Mean share of dropped rows by domain over the training records of a layer; evaluation drops nothing."""
    shares_of: dict[str, list[float]] = {}
    for record in read_metrics(run) if (run / FILE_NAME).exists() else []:
        if record["kind"] == "train":
            for domain, share in record.get("dropped_share", {}).get(layer_name, {}).items():
                shares_of.setdefault(domain, []).append(share)
    return {domain: float(np.mean(shares)) for domain, shares in shares_of.items()}
