"""Sizes of the dispatch buffers that a rank reserves for a sparse layer under capacity dispatch, by arithmetic alone.

The plan counts with these numbers and the graph that is cut over a mesh is built of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise

from pangu_sigma.config.schema import Config


@dataclass(frozen=True)
class DispatchBuffer:
    """Dispatch buffer of a sparse layer, for one micro-batch on one rank that reads: expert slots of its exchange group
    and the rows reserved in each.

    `tokens` T of the rank make `choices` T k rows that look for room.
    """

    slots: int
    rows_per_slot: int
    tokens: int
    choices: int

    @property
    def rows(self) -> int:
        """Rows that travel from this rank to experts and back."""
        return self.slots * self.rows_per_slot

    @property
    def times_tokens(self) -> float:
        """Reserved rows as a multiple of the rank's tokens."""
        return self.rows / self.tokens


def samples_at_a_time(config: Config) -> int:
    """Sequences that a row rank computes at a time."""
    return config.train.batch_size // config.train.gradient_accumulation_steps // config.parallel.mesh.rows


def activated_slots(config: Config) -> int:
    """Expert slots of an exchange group in the graph of one micro-batch: all stored, or of so many domains.

    Every rank computes the experts that it owns, and all have equally many slots: as many as the worst choice of
    domains asks of one. A group's experts lie round its parts in turn. A graph of pipeline stages has all micro-batches
    of a step in it, which share the slots.
    """
    mesh = config.parallel.mesh
    sizes = [domain.experts for domain in config.domains]
    by_domain = config.model.router_spec.separates_domains
    if config.experts.store == "device" or not by_domain:
        return sum(sizes) // mesh.placement_groups
    together = config.train.gradient_accumulation_steps if mesh.pipeline > 1 else 1
    samples = samples_at_a_time(config) * together * mesh.rows // mesh.placement_groups
    limit = min(config.data.max_domains_per_batch or len(sizes), samples)
    parts, most = mesh.exchange_size, 0
    for group in mesh.domains_of_groups(sizes):
        bounds = [*pairwise(accumulate((sizes[domain] for domain in group), initial=0))]
        # From part to part a domain's share changes by the part that owns its first expert and after that of its last.
        for part in {bound % parts for pair in bounds for bound in pair}:
            # Experts of each domain of the group that the part owns.
            owned = [len(range(first + (part - first) % parts, end, parts)) for first, end in bounds]
            most = max(most, sum(sorted(owned, reverse=True)[:limit]))
    return most * parts


def rows_of_group(config: Config) -> int:
    """Rows that an expert takes of one dispatch group of n samples: ceil(factor * n S / E_d) of a domain's table, where
    any sample may be of any domain that the exchange group holds; ceil(factor * k n S / E) of all E experts of the
    layer else."""
    sparse, length = config.model.sparse, config.data.sequence_length * config.model.sparse.capacity_samples
    sizes = [domain.experts for domain in config.domains]
    among = min(sizes) if config.model.router_spec.separates_domains else sum(sizes)
    return math.ceil(sparse.capacity_factor * config.experts_per_token * length / among)


def dispatch_buffer(config: Config) -> DispatchBuffer | None:
    """The dispatch buffer of a rank; None for a dense model. Dropless dispatch has one row for each choice."""
    if not config.model.sparse_prefixes:
        return None
    length, samples = config.data.sequence_length, samples_at_a_time(config)
    choices = samples * length * config.experts_per_token
    if config.model.sparse.dispatch == "dropless":
        return DispatchBuffer(1, choices, samples * length, choices)
    rows = samples // config.model.sparse.capacity_samples * rows_of_group(config)
    return DispatchBuffer(activated_slots(config), rows, samples * length, choices)
