"""Routing tables of groups that grow out of others: a token's expert stays what it was, or is a copy of it."""

from __future__ import annotations

import heapq

import numpy as np

from rre.counted_random import generator


def origins_of_copies(table: np.ndarray, old: int, new: int, rows: np.ndarray) -> list[int]:
    """Which old expert each of the experts old … new-1 copies: in turn the one with most rows for each of its copies.

    table int32 [V] with entries below `old`; rows [V]: how often each id occurs (ones where that does not count).
    """
    load = np.bincount(table, weights=rows, minlength=old)
    heap = [(-float(load[expert]), 1, expert) for expert in range(old)]
    heapq.heapify(heap)
    origins = []
    for _ in range(old, new):
        _, copies, expert = heap[0]
        origins.append(expert)
        heapq.heapreplace(heap, (-float(load[expert]) / (copies + 1), copies + 1, expert))
    return origins


def split_table(
    seed: int, purpose: str, table: np.ndarray, origins: list[int], old: int, rows: np.ndarray
) -> np.ndarray:
    """Int32 [V]: the ids of an expert that has copies are dealt to it and them, evenly by `rows`; all others stay.

    origins: see `origins_of_copies`. Which id goes where is drawn for (seed, purpose, expert).
    """
    result = table.astype(np.int32, copy=True)
    holders: dict[int, list[int]] = {}
    for copy, expert in enumerate(origins):
        holders.setdefault(expert, [expert]).append(old + copy)
    for expert, members in holders.items():
        rng = generator(seed, f"split routing table {purpose}", expert)
        ids = rng.permutation(np.flatnonzero(table == expert))
        ids = ids[np.argsort(-rows[ids], kind="stable")]
        heap = [(0.0, 0, int(tie), members[index]) for index, tie in enumerate(rng.permutation(len(members)))]
        heapq.heapify(heap)
        for token in ids:
            load, count, tie, member = heap[0]
            result[token] = member
            heapq.heapreplace(heap, (load + float(rows[token]), count + 1, tie, member))
    return result
