"""Mixture sampler: which domain every sample of a step belongs to, and which of its sequences it is.

Each draw is counted: a function of (seed, step, weights at that step). What is kept is only how many sequences each
domain has given, so the state is a few integers, and any process can compute a whole step's plan and read its own
slice of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pangu_sigma.data.packed_sequences import PackedSequences
from pangu_sigma.errors import UserError
from pangu_sigma.wording import shown
from rre.counted_random import bits64, key64, permutation, uniform

STATE_VERSION = 1
Weights = Callable[[int], Mapping[str, float]]  # step (from 0) → weight per domain; a domain not named has weight 0


@dataclass(frozen=True)
class Batch:
    """Batch of one step: ``tokens`` int32 [B, S+1], ``domain`` int32 [B] (position in the sampler's list), ``sample``
    int64 [B] (number since the run's beginning, counted over all processes), and the 0-based ``step`` they are
    for. ``mask`` float32 [B, S]: 0 where a label does not count (None: all do); ``padding`` bool [B, S]: positions
    that only fill a row up (None: none).
    """

    tokens: np.ndarray
    domain: np.ndarray
    sample: np.ndarray
    step: int
    mask: np.ndarray | None = None
    padding: np.ndarray | None = None

    def rows(self, selection: slice | np.ndarray) -> Batch:
        """Some of its samples."""
        arrays = {name: value[selection] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, **arrays)


class MixtureSampler:
    """Sampler that draws by domain weight from ``streams`` (their order gives the domain numbers).

    ``weights`` maps a step to weights per domain name (they need not sum to 1), so phases are known ahead. In a batch
    of B, a domain of share p gets p·B samples rounded down or up, p·B on average (systematic sampling).
    ``max_domains_per_batch`` = k lets at most k domains into one step; the average shares stay.

    ``placement``: runs of domain numbers, each read by processes of its own (placement groups). Each of the ``parts``
    that a batch is computed in then begins with the samples of the first group, as many of each; weights hold inside a
    group, and k counts per group.
    """

    def __init__(
        self,
        streams: Sequence[PackedSequences],
        weights: Weights | Mapping[str, float],
        seed: int,
        max_domains_per_batch: int | None = None,
        placement: Sequence[range] = (),
        parts: int = 1,
    ):
        self.domains = [stream.domain for stream in streams]
        if not streams or len(set(self.domains)) != len(streams):
            raise ValueError(f"the sampler needs domains of different names, not {self.domains}")
        if len({stream.sequence_length for stream in streams}) != 1:
            raise ValueError("all domains must be packed to one sequence length")
        if max_domains_per_batch is not None and max_domains_per_batch < 1:
            raise UserError(
                f"data.max_domains_per_batch is {max_domains_per_batch}; it must be 1 or more, or null for no limit"
            )
        self._streams = list(streams)
        self._weights = weights if callable(weights) else lambda step: weights
        self._seed = seed
        self._limit = max_domains_per_batch
        self._placement, self._parts = tuple(placement), parts
        self._step = 0
        self._sample = 0
        self._cursors = np.zeros(len(streams), dtype=np.int64)

    def next_batch(self, batch_size: int, rows: slice | np.ndarray | None = None) -> Batch:
        """The next step's batch of B = ``batch_size`` samples, or the ``rows`` of it that this process reads.

        The state moves by the whole batch whatever the rows, so all processes stay in step.
        """
        domain = self._draw(batch_size)
        index = np.empty(batch_size, dtype=np.int64)
        for domain_id in range(len(self._streams)):
            where = np.flatnonzero(domain == domain_id)
            index[where] = self._cursors[domain_id] + np.arange(len(where))
        local_rows = np.arange(batch_size)[slice(None) if rows is None else rows]
        batch = self._read(domain[local_rows], index[local_rows], self._sample + local_rows)
        # only now, so that a failed read leaves the state as it was
        self._cursors += np.bincount(domain, minlength=len(self._streams))
        self._sample += batch_size
        self._step += 1
        return batch

    def _read(self, domain: np.ndarray, index: np.ndarray, sample: np.ndarray) -> Batch:
        """The sequences number ``index`` [B] of the domains ``domain`` [B]."""
        tokens = np.empty((len(domain), self._streams[0].sequence_length + 1), dtype=np.int32)
        for row, (domain_id, sequence_index) in enumerate(zip(domain, index, strict=True)):
            tokens[row] = self._streams[domain_id].sequence(int(sequence_index))
        return Batch(tokens, domain, sample, self._step)

    def state(self) -> dict:
        """A JSON-able snapshot: the next step and sample, per domain its cursor (sequences given) and identity."""
        return {
            "version": STATE_VERSION,
            "seed": self._seed,
            "step": self._step,
            "sample": self._sample,
            "domains": {
                stream.domain: {"cursor": int(cursor), "identity": dict(stream.identity)}
                for stream, cursor in zip(self._streams, self._cursors, strict=True)
            },
        }

    def restore(self, state: Mapping, allow_new_domains: bool = False) -> None:
        """Continue from ``state()``. With ``allow_new_domains`` a domain that the state lacks begins at its first
        sequence.

        Raises UserError, naming domain and cause, when seed, domains, corpus, tokenizer or data settings differ.
        """
        if state.get("version") != STATE_VERSION:
            raise UserError(
                f"the data state has version {shown(state.get('version'))}, not {STATE_VERSION}; use the matching "
                "release"
            )
        if state["seed"] != self._seed:
            raise UserError(
                f"run.seed is {self._seed} but the checkpoint was made with {state['seed']}; set it back to resume"
            )
        kept = state["domains"]
        if gone := [name for name in kept if name not in self.domains]:
            raise UserError(
                f"the checkpoint has the domain '{gone[0]}', which the configuration lacks; add it back to resume"
            )
        known = [stream for stream in self._streams if stream.domain in kept]
        if len(known) < len(self._streams) and not allow_new_domains:
            new = next(name for name in self.domains if name not in kept)
            raise UserError(f"the checkpoint lacks the domain '{new}'; remove it from domains to resume")
        # Corpora of all domains first: one changed corpus also changes a tokenizer that was trained on the mix.
        for what in dict.fromkeys(what for stream in known for what in stream.identity):
            for stream in known:
                if kept[stream.domain]["identity"].get(what) != stream.identity.get(what):
                    raise UserError(
                        f"domain '{stream.domain}': the {what} differs from the checkpoint's; restore it to resume, "
                        "or begin a new run"
                    )
        self._cursors = np.array([kept[name]["cursor"] if name in kept else 0 for name in self.domains], dtype=np.int64)
        self._step = int(state["step"])
        self._sample = int(state["sample"])

    def _draw(self, size: int) -> np.ndarray:
        """The domain number of every sample of this step: int32 [size]."""
        share = self._shares()
        if len(self._placement) < 2:
            return self._deal(share, size)
        of_group = size // len(self._placement)
        by_group = []
        for group, domains in enumerate(self._placement):
            inside = np.zeros_like(share)
            inside[domains.start : domains.stop] = share[domains.start : domains.stop]
            by_group.append(self._deal(inside, of_group, group).reshape(self._parts, -1))
        return np.stack(by_group, axis=1).reshape(-1)

    def _deal(self, share: np.ndarray, size: int, *group: int) -> np.ndarray:
        """The domain number of ``size`` samples by these shares, which need not sum to 1: int32 [size]."""
        shuffled = permutation(key64(self._seed, "domains", self._step, *group), len(share))
        edges = np.cumsum(share[shuffled])
        offset = uniform(key64(self._seed, "offset", self._step, *group), np.zeros(1))[0]
        # 1. slots: equally spaced points on the line of shares, shifted at random; the shuffle lets any two domains
        # meet
        slots = size if self._limit is None else min(self._limit, size)
        points = (np.arange(slots) + offset) / slots * edges[-1]
        interval = np.searchsorted(edges, points, side="right")
        # rounding may put the last point on the last edge: it belongs to the last domain that has a share
        chosen = shuffled[np.minimum(interval, np.flatnonzero(share[shuffled])[-1])]
        # 2. samples: dealt to the slots in turn, from a random slot on, in random order
        first_slot = int(bits64(key64(self._seed, "turn", self._step, *group), np.zeros(1))[0] % np.uint64(slots))
        dealt = chosen[(np.arange(size) + first_slot) % slots]
        return dealt[permutation(key64(self._seed, "rows", self._step, *group), size)].astype(np.int32)

    def _shares(self) -> np.ndarray:
        weights = self._weights(self._step)
        if unknown := [name for name in weights if name not in self.domains]:
            raise UserError(f"a weight names the domain '{unknown[0]}'; the domains are {', '.join(self.domains)}")
        values = np.array([float(weights.get(name, 0.0)) for name in self.domains])
        if not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
            raise UserError(
                f"the domain weights at step {self._step} are {dict(weights)}; give numbers ≥ 0, one above 0"
            )
        return values / values.sum()
