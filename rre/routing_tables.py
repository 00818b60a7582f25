"""Routing tables: for one sparse layer and one domain, vocabulary id -> expert of the domain's group.

A table is drawn once, when its domain is created, is a tensor of the checkpoint and is never drawn again.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import numpy as np

from rre.counted_random import generator
from rre.router_specs import LAYER


def draw_uniform_table(vocab: int, experts: int, rng: np.random.Generator) -> np.ndarray:
    """Return int32 [vocab]: every expert gets the same number of vocabulary ids, give or take one.

    This is PanGu-Sigma's map (arXiv 2303.10845; random hash layers, arXiv 2106.04426 section 3).
    """
    table = (np.arange(vocab, dtype=np.int64) % experts).astype(np.int32)
    # Which experts get the odd ids is drawn too, so that small vocabularies do not always favour expert 0.
    table = rng.permutation(experts).astype(np.int32)[table]
    return rng.permutation(table)


def draw_frequency_table(counts: np.ndarray, experts: int, rng: np.random.Generator) -> np.ndarray:
    """Return int32 [vocab]: expected rows per expert are even in spite of Zipf.

    Greedy balance (arXiv 2106.04426 section 3): ids by falling `counts` [vocab] (occurrences in the domain's training
    text), each to the expert with the fewest rows so far; ids that never occur are dealt out evenly. Ties are broken
    by `rng`, so tables of different layers differ.
    """
    return _deal(np.zeros(0, np.int32), np.asarray(counts, np.int64), experts, rng)


def draw_table(
    kind: str, seed: int, layer_name: str, domain: str, vocab: int, experts: int, counts: np.ndarray | None
) -> np.ndarray:
    """Draw the table of one (sparse layer `layer_name`, `domain`): independent of every other layer's and domain's."""
    rng = generator(seed, f"routing table {layer_name} {domain}")
    if kind == "frequency":
        if counts is None:
            raise ValueError("a frequency table needs the domain's token counts")
        return draw_frequency_table(counts, experts, rng)
    return draw_uniform_table(vocab, experts, rng)


def draw_owned_table(
    kind: str, seed: int, layer_name: str, owner: str, vocab: int, groups: Mapping[str, int],
    counts: Mapping[str, np.ndarray],
) -> np.ndarray:  # fmt: skip
    """`draw_table` for a domain over its group or, with LAYER as its owner, for a layer over all `groups` together."""
    if owner == LAYER:
        together = sum(counts.values()) if counts else None
        return draw_table(kind, seed, layer_name, LAYER, vocab, sum(groups.values()), together)
    return draw_table(kind, seed, layer_name, owner, vocab, groups[owner], counts.get(owner))


def extend_table(
    kind: str,
    seed: int,
    layer_name: str,
    domain: str,
    table: np.ndarray,
    vocab: int,
    experts: int,
    counts: np.ndarray | None,
) -> np.ndarray:
    """Extend a table [old vocab] to int32 [vocab] by the rule `kind` that it was made with; its entries stay.

    `uniform`: every new id goes to the experts with the fewest ids, so that a balanced table stays balanced, give or
    take one. `frequency`: new ids by falling `counts` [vocab] (occurrences of every id, the old ones too), each to the
    expert with the fewest rows so far. Ties, and which new id comes first, are drawn for this layer, domain and size.
    """
    rng = generator(seed, f"extended routing table {layer_name} {domain}", table.size)
    if kind == "frequency" and counts is None:
        raise ValueError("a frequency table needs the domain's token counts")
    rows = np.zeros(vocab, np.int64) if kind == "uniform" else np.asarray(counts, np.int64)
    return _deal(table, rows, experts, rng)


def _deal(table: np.ndarray, rows: np.ndarray, experts: int, rng: np.random.Generator) -> np.ndarray:
    """`table` [old vocab] and behind it the other ids of `rows` [vocab], dealt out by falling rows: each to the expert
    with the fewest of them so far, of equals the one with the fewest ids."""
    old = table.size
    ids_of, rows_of = np.bincount(table, minlength=experts), np.zeros(experts, np.int64)
    np.add.at(rows_of, table, rows[:old])
    order = old + rng.permutation(rows.size - old)
    order = order[np.argsort(-rows[order], kind="stable")]
    heap = [(int(rows_of[e]), int(ids_of[e]), int(tie), e) for e, tie in enumerate(rng.permutation(experts))]
    heapq.heapify(heap)
    extended = np.concatenate([table, np.empty(rows.size - old, np.int32)])
    for token in order:
        load, ids, _, expert = heap[0]
        extended[token] = expert
        heapq.heapreplace(heap, (load + int(rows[token]), ids + 1, int(rng.integers(1 << 30)), expert))
    return extended
