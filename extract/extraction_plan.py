"""Cutting domains out of a checkpoint: which files and tensors make the sub-model, and its configuration.

Only the shared files and the kept domains' files are read. A file that goes in unchanged is copied as it is; where
tensors change (another type, another file size, folded), they are streamed one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pangu_sigma.checkpoint import Checkpoint, Fingerprints, StreamedCheckpoint, TensorSpec, folder_layout
from pangu_sigma.checkpoint.file_plan import PlannedFile, plan_tensor_files
from pangu_sigma.checkpoint.float_types import FLOAT_TYPES, convert_float
from pangu_sigma.checkpoint.streamed_checkpoint import plan_taken
from pangu_sigma.checkpoint.tensor_file import make_header, numpy_type, raw_bytes
from pangu_sigma.config import Config, config_from_dict
from pangu_sigma.config.config_paths import stored_text
from pangu_sigma.config.finetuning_file import without_adaptation
from pangu_sigma.errors import UserError
from pangu_sigma.tensor_names import dense_name, is_expert, is_gate, is_routing, parse_name
from pangu_sigma.trained_model import stored_config
from pangu_sigma.wording import did_you_mean
from rre.router_specs import routers_that

_LARGEST_SHARD = 4 << 30


@dataclass(frozen=True)
class ExtractionPlan:
    """A sub-model of `parent` that holds `domains`, in the parent's order.

    dtype: the type that weights are stored in, None for the parent's. max_shard_bytes: None keeps the parent's files.
    fold: whether the one expert of every sparse layer becomes the layer's dense feed-forward network.
    Raises UserError for what cannot be cut.
    """

    parent: Checkpoint
    domains: tuple[str, ...]
    dtype: str | None = None
    max_shard_bytes: int | None = None
    fold: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in FLOAT_TYPES:
            types = ", ".join(FLOAT_TYPES)
            raise UserError(f"the type {self.dtype} is not one that weights can be stored in: use {types}")
        shared = self.parent.names(domains=[], optimizer=False)
        separate = f"router {routers_that(lambda spec: spec.separates_domains)}"
        if gates := [name for name in shared if is_gate(name)]:
            raise UserError(
                f"{self.parent.path} routes by a learned gate over the experts of all domains ({gates[0]}), which "
                f"sends any token to any of them: no part of it is the same function alone; cut a model of {separate}"
            )
        if tables := [name for name in shared if is_routing(name)]:
            raise UserError(
                f"{self.parent.path} routes by one table over the experts of all domains ({tables[0]}), so no part of "
                f"it is the same function alone; cut a model of {separate}"
            )
        if self.fold:
            self._check_foldable()

    def _check_foldable(self) -> None:
        if len(self.domains) != 1:
            raise UserError(
                f"{len(self.domains)} domains cannot fold into one dense layer each: choose one domain, or leave out "
                "fold"
            )
        sizes = {layer_name: groups[self.domains[0]] for layer_name, groups in self.parent.coverage.items()}
        if not sizes:
            raise UserError(f"{self.parent.path} has no sparse layers to fold: leave out fold")
        shared = self.parent.names(domains=[], optimizer=False)
        if beside := [name for name in shared if parse_name(name).module == "shared_expert"]:
            raise UserError(
                f"{self.parent.path} has a shared expert beside the routed ones ({beside[0]}), and the two are no "
                "single dense layer: leave out fold"
            )
        model = stored_config(self.parent).model
        if model.expert_network != model.network:
            raise UserError(
                f"{self.parent.path} has experts of kind {model.expert_kind.name} beside dense layers of kind "
                f"{model.feed_forward}, and a dense model has one kind: leave out fold"
            )
        larger = [f"{layer_name} has {size}" for layer_name, size in sizes.items() if size != 1]
        if larger:
            raise UserError(
                f"domain {self.domains[0]} does not have one expert in every sparse layer ({', '.join(larger)}), and "
                "only a group of one expert is a dense layer: leave out fold"
            )

    @property
    def converts(self) -> bool:
        """Whether any weight is stored in another type than the parent's."""
        tensors = self.parent.manifest.tensors
        return any(self.stored_type(source) != tensors[source].dtype for source in self.sources.values())

    @cached_property
    def sources(self) -> dict[str, str]:
        """Tensor of the sub-model -> the parent's tensor that it is."""
        names = self.parent.names(domains=self.domains, optimizer=False)
        if not self.fold:
            return {name: name for name in names}
        # No routing tables, since every token goes one way.
        return {dense_name(name): name for name in names if not is_routing(name)}

    @cached_property
    def config(self) -> Config:
        """The parent's effective configuration with the kept domains only, ready for a run that continues them."""
        parent = stored_config(self.parent)
        values = parent.to_dict()
        values["domains"] = [domain for domain in values["domains"] if domain["name"] in self.domains]
        if not sum(domain["weight"] for domain in values["domains"]):
            for domain in values["domains"]:
                domain["weight"] = 1.0
        # What is left of the parent's phases would not be what its author meant.
        values["train"]["phases"] = []
        values["train"]["stop_at"] = None
        without_adaptation(values)
        values["data"]["stream"] = None
        # The parent's mesh was made for its experts; fewer may not divide over it.
        values["parallel"] = {}
        limit = values["data"]["max_domains_per_batch"]
        values["data"]["max_domains_per_batch"] = limit and min(limit, len(self.domains))
        if self.fold:
            values["model"]["domain_parameters"]["embedding"] = "shared"
            values["model"]["sparse"] = {}
        return config_from_dict(values, source=f"the configuration of {self.parent.path} without the other domains")

    def folder(self, out: str | Path) -> StreamedCheckpoint:
        """Everything that the sub-model's folder `out` holds, but the documents that a verification adds."""
        parent = self.parent
        fingerprints = parent.fingerprints
        taken, specs = self._files()
        coverage = {} if self.fold else {
            layer_name: {domain: groups[domain] for domain in self.domains}
            for layer_name, groups in parent.coverage.items()
        }  # fmt: skip
        return StreamedCheckpoint(
            tensors=specs,
            read=self._read,
            domains=self.domains,
            coverage=coverage,
            config_text=stored_text(self.config, out, is_model=True),
            tokenizer_files=parent.tokenizer_files(),
            fingerprints=Fingerprints(
                tokenizer=fingerprints.tokenizer,
                corpora={name: value for name, value in fingerprints.corpora.items() if name in self.domains},
            ),
            step=parent.step,
            probe=parent.probe(self.domains),
            state={
                "origin": {
                    "job": "extract",
                    # Not the other domains' names: whoever gets a sub-model need not learn who else there is.
                    "parent": {"sha256": parent.sha256, "step": parent.step, "domains": len(parent.domains)},
                    "dtype": self.dtype,
                    "folded": self.fold,
                }
            },
            taken=taken,
            max_shard_bytes=self.max_shard_bytes or _LARGEST_SHARD,
        )

    def _files(self) -> tuple[list[PlannedFile], list[TensorSpec]]:
        """(the parent's files that go in as they are, the tensors that are streamed)."""
        groups: dict[str, dict[str, str]] = {}
        for name, source in self.sources.items():
            groups.setdefault(folder_layout.group_of(name), {})[name] = source
        unchanged: list[str] = []
        streamed: list[TensorSpec] = []
        for group, members in groups.items():
            specs = [self._spec(name, source) for name, source in members.items()]
            if self._unchanged(members, specs):
                unchanged.append(group)
            else:
                streamed += specs
        return plan_taken(self.parent, unchanged), streamed

    def _unchanged(self, members: dict[str, str], specs: Sequence[TensorSpec]) -> bool:
        manifest, tensors_by_file = self.parent.manifest, self.parent.tensors_by_file
        files = self.parent.files(members.values())
        inside = {name for file in files for name in tensors_by_file[file]}
        if inside != set(members) or any(name != source for name, source in members.items()):
            return False
        if any(spec.dtype != manifest.tensors[spec.name].dtype for spec in specs):
            return False
        if self.max_shard_bytes is None:
            return True
        planned = plan_tensor_files(specs, self.max_shard_bytes)
        return [file.path for file in planned] == files and all(
            len(make_header(file.specs)) == manifest.files[file.path].header_bytes
            and {spec.name for spec in file.specs} == tensors_by_file[file.path].keys()
            for file in planned
        )

    def _spec(self, name: str, source: str) -> TensorSpec:
        shape = self.parent.manifest.tensors[source].shape
        return TensorSpec(name, self.stored_type(source), shape[1:] if self.fold and is_expert(source) else shape)

    def stored_type(self, source: str) -> str:
        """The element type in which the parent's tensor `source` is stored in the sub-model."""
        own = self.parent.manifest.tensors[source].dtype
        return self.dtype if self.dtype is not None and own in FLOAT_TYPES else own

    def _read(self, spec: TensorSpec) -> Iterator[memoryview]:
        source = self.sources[spec.name]
        own = self.parent.manifest.tensors[source].dtype
        for piece in self.parent.byte_chunks(source):
            if own == spec.dtype:
                yield piece
            else:
                yield raw_bytes(convert_float(source, np.frombuffer(piece, numpy_type(own)), spec.dtype))


def choose_domains(parent: Checkpoint, requested: Sequence[str]) -> tuple[str, ...]:
    """The wanted domains in the parent's order. Raises UserError, which names the nearest, for one it does not have."""
    for name in requested:
        if name not in parent.domains:
            raise UserError(f"{parent.path} has no domain '{name}'; {did_you_mean(name, parent.domains)}")
    return tuple(name for name in parent.domains if name in requested)
