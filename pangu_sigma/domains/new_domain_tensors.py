"""How a new domain's experts, routing tables and embedding slot begin.

`from:DOMAIN`: as that domain's, its routing included, so that the new domain is the same function until it trains (in
a model of learned gates, which have no tables: as that domain's experts in turn).
`nearest` is from:DOMAIN with the domain that the text is likeliest to belong to (`nearest_domain`).
`mean`: every expert is the mean of all experts of its layer. `dense:MODEL`: every expert is the feed-forward network
of its layer in a dense model of the same shape (the one that was upcycled). `random`: drawn as for a new model. All but
the first draw tables of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from pangu_sigma.checkpoint import Checkpoint, resolve
from pangu_sigma.checkpoint.float_types import as_float32
from pangu_sigma.config import Config, tensor_shapes
from pangu_sigma.domains.checkpoint_editor import EditedTensors
from pangu_sigma.domains.split_tables import origins_of_copies, split_table
from pangu_sigma.errors import UserError
from pangu_sigma.model.initialization import initial_value
from pangu_sigma.tensor_names import dense_name, is_expert, is_routing, of_domain, parse_name, table_name
from pangu_sigma.trained_model import stored_config
from pangu_sigma.wording import bare
from rre.routing_tables import draw_table

# What a dense model must share with this one for its feed-forward networks to be experts here.
_SAME_SHAPE = ("layers", "hidden", "ffn", "vocab_size", "activation", "biases", "query_layer")


@dataclass(frozen=True)
class NewDomainTensors:
    """The beginning of domain `name` with a group of `experts` in the model `source` of `config`.

    text: how it was asked for (see above). Every method gives one tensor, in the type float32 or int32. Raises
    UserError for a beginning that the model does not allow.
    """

    source: Checkpoint
    config: Config
    name: str
    experts: int
    text: str

    def __post_init__(self) -> None:
        kind, _, of = self.text.partition(":")
        if kind == "from":
            if of not in self.source.domains:
                raise UserError(
                    f"init {self.text} names no domain of {self.source.path}: it has {', '.join(self.source.domains)}"
                )
            sizes = {groups[of] for groups in self.source.coverage.values()}
            if self.experts < max(sizes):
                raise UserError(
                    f"init {self.text} copies {max(sizes)} experts, and experts {self.experts} would lose some: "
                    f"set experts to at least {max(sizes)}, or another init"
                )
        elif kind == "dense":
            if not of:
                raise UserError("init dense needs the dense model to begin with: write dense:MODEL, its folder")
            self._check_dense(resolve(of))
        elif self.text not in ("mean", "random"):
            raise UserError(f"init {self.text} is not known: write from:DOMAIN, nearest, mean, dense:MODEL or random")

    def _check_dense(self, dense: Checkpoint) -> None:
        before, own = stored_config(dense).model, self.config.model
        if before.sparse_prefixes or before.domain_parameters.embedding != "shared":
            raise UserError(f"init {self.text} is no dense model with one word embedding: name another, or mean")
        if before.feed_forward_kind != own.expert_kind:
            raise UserError(
                f"init {self.text} is a model of {before.feed_forward} networks, and this model's experts are "
                f"{own.expert_kind.name}: name another, or mean"
            )
        for key in _SAME_SHAPE:
            if getattr(before, key) != getattr(own, key):
                raise UserError(
                    f"init {self.text} is a model of another shape: model.{key} is {bare(getattr(before, key))} there "
                    f"and {bare(getattr(own, key))} here; name another, or mean"
                )

    def add_to(self, new: EditedTensors, config: Config, rows: np.ndarray | None = None) -> None:
        """Add all tensors of the domain in the model of `config`, in the types in which the others' are stored; rows
        [V]: the ids' occurrences, for the frequency rule."""
        for name, shape in tensor_shapes(config, config.model.vocab_size).items():
            parsed = parse_name(name)
            if parsed.domain != self.name:
                continue
            if is_routing(name):
                new.add(name, "int32", shape, partial(self.table, parsed.layer, rows))
            else:
                dtype = self.source.manifest.tensors[of_domain(name, self.source.domains[0])].dtype
                new.add_converted(name, dtype, shape, partial(self.tensor, name, shape, rows))

    def table(self, layer_name: str, rows: np.ndarray | None) -> np.ndarray:
        """The routing table int32 [V] of one sparse layer; rows [V]: the ids' occurrences, for the frequency rule."""
        kind, _, of = self.text.partition(":")
        vocab, seed = self.config.model.vocab_size, self.config.run.seed
        if kind != "from":
            return draw_table(self.config.model.sparse.table, seed, layer_name, self.name, vocab, self.experts, rows)
        old = self.source.coverage[layer_name][of]
        table = self._load(table_name(layer_name, of))
        counted = np.ones(vocab) if rows is None else rows
        return split_table(seed, f"{layer_name} {self.name}", table, self._origins(table, old, counted), old, counted)

    def tensor(self, name: str, shape: tuple[int, ...], rows: np.ndarray | None) -> np.ndarray:
        """One weight of the domain: an expert group's or the word embedding."""
        kind, _, of = self.text.partition(":")
        if kind == "from":
            own = self._load(of_domain(name, of))
            if not is_expert(name):
                return own
            routing = table_name(parse_name(name).layer, of)
            if routing not in self.source.manifest.tensors:
                return own[np.arange(self.experts) % len(own)]
            table = self._load(routing)
            counted = np.ones(table.size) if rows is None else rows
            return np.concatenate([own, own[self._origins(table, len(own), counted)]])
        if kind == "mean":
            return self._mean(name, shape)
        if kind == "dense":
            dense = resolve(of)
            origin = dense_name(name)
            tensor = as_float32(origin, dense.load([origin])[origin])
            return np.ascontiguousarray(np.broadcast_to(tensor, shape))
        stream = f"{self.name} {of_domain(name, None)}"
        return initial_value(name, shape, self.config.run.seed, self.config.model, stream)

    def _origins(self, table: np.ndarray, old: int, rows: np.ndarray) -> list[int]:
        return origins_of_copies(table, old, self.experts, rows)

    def _load(self, name: str) -> np.ndarray:
        return as_float32(name, self.source.load([name])[name])

    def _mean(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        grouped = is_expert(name)
        total, count = np.zeros(shape[1:] if grouped else shape, np.float64), 0
        for domain in self.source.domains:
            tensor = self._load(of_domain(name, domain))
            total += tensor.sum(0, dtype=np.float64) if grouped else tensor
            count += len(tensor) if grouped else 1
        return np.ascontiguousarray(np.broadcast_to((total / count).astype(np.float32), shape))
