"""Upcycling: a dense model becomes the start of a sparse one with the same function.

Shared parameters are copied, every expert starts as the feed-forward network of its layer, every domain's embedding
slot as the word embedding (PanGu-Σ's inheritance from PanGu-α; sparse upcycling, arXiv 2212.05055). Routing tables and
gates are drawn as for a new model; a shared expert begins as a new one whose result is zero. Where a token's combine
weights add up to 1 (tables, and gates that renormalise), the sparse model's logits are the dense model's as long as the
experts of a layer are equal; other gates scale what experts give, and the sparse model begins as another function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pangu_sigma.checkpoint import Checkpoint, Fingerprints, TensorSpec, resolve
from pangu_sigma.checkpoint.float_types import as_float32
from pangu_sigma.checkpoint.model_folder import check_output
from pangu_sigma.checkpoint.tensor_file import raw_bytes
from pangu_sigma.config import Config, config_from_dict, effective, load_config
from pangu_sigma.config.load_config import with_run_folder
from pangu_sigma.config.overrides import Overrides
from pangu_sigma.config.parameter_counts import parameter_counts, tensor_shapes
from pangu_sigma.convert.conversion_coverage import check_coverage
from pangu_sigma.convert.converted_folder import ConvertedModel, write_converted
from pangu_sigma.convert.finite_weights import check_finite
from pangu_sigma.data.packed_sequences import first_sequences
from pangu_sigma.errors import UserError, argument
from pangu_sigma.model.initialization import initial_value
from pangu_sigma.tensor_names import dense_name, is_expert, is_routing, parse_name, tensor_name
from pangu_sigma.trained_model import stored_config, stored_tokenizer
from pangu_sigma.wording import bare
from rre.counted_random import generator
from rre.routing_tables import draw_owned_table

# What must be the same on both sides for a tensor to fit and the function to stay.
_AGREE = (
    "layers", "hidden", "heads", "ffn", "positions", "activation", "norm", "norm_epsilon", "position", "rope_theta",
    "feed_forward", "biases", "head", "query_layer",
)  # fmt: skip
_PIECE = 1 << 22  # elements of an expert that are made at a time when noise is added


@dataclass(frozen=True, repr=False)
class UpcycledModel(ConvertedModel):
    """The written folder, and the parameters of the dense model."""

    dense_parameters: int

    @property
    def same_function(self) -> bool:
        """Whether the sparse model begins as the dense one's function (without noise)."""
        model = self.config.model
        spec, options = model.router_spec, model.router_options
        return spec.keeps_scale or any(options[option.name] for option in spec.options if option.unit_scale)


def upcycle(
    dense: Path, config: Path | Mapping[str, Any] | Config, out: Path, overrides: Overrides = (), noise: float = 0.0
) -> UpcycledModel:
    """Write `out`, a model folder with the sparse model of `config` (see `load_config`), from the dense model `dense`.

    noise: the standard deviation of what is added to every expert's weights (not its biases), as a share of the
    standard deviation of the tensor itself; drawn for (seed, sparse layer, domain, expert). Memory holds one tensor of
    the dense model. Raises UserError naming the keys of the configuration that do not fit, or the tensors.
    """
    if not 0 <= noise < math.inf:
        raise UserError(f"{argument('noise', noise)} is no share of a standard deviation: give a number from 0 up")
    out = check_output(out)
    source = resolve(dense)
    old = stored_config(source)
    file = str(config) if isinstance(config, Path) else "the configuration"
    config = _fitted(load_config(config, overrides), old, file, source)
    counts, fingerprints, probe = _text(config, source) if config.model.sparse.table == "frequency" else ({}, {}, {})
    config = config_from_dict(with_run_folder(config, out), source=file)
    targets = tensor_shapes(config, config.model.vocab_size)
    names = source.names(optimizer=False)
    shapes = {name: source.manifest.tensors[name].shape for name in names}
    origins = {name: dense_name(name) for name in targets if not is_routing(name) and not _is_new(name)}
    assigned = []
    for name, origin in origins.items():
        if origin in shapes:
            groups = targets[name][:1] if is_expert(name) else ()
            assigned.append((name, origin, (*groups, *shapes[origin])))
    trained = {name: targets[name] for name in origins}
    check_coverage(f"the dense model {source.path}", trained, assigned, names)

    def read(spec: TensorSpec) -> np.ndarray | Iterator[memoryview]:
        if is_routing(spec.name):
            return _table(config, spec, counts)
        if _is_new(spec.name):
            return _new(config, spec)
        origin = origins[spec.name]
        stored = check_finite(str(source.path), origin, source.load([origin])[origin])
        tensor = as_float32(origin, stored)
        if not is_expert(spec.name):
            return tensor
        spread = noise * float(tensor.std()) if tensor.ndim == 2 else 0.0
        return _experts(tensor, spec, config.run.seed, spread)

    written = write_converted(
        out,
        config,
        "upcycle",
        origin={
            "job": "upcycle",
            "source": source.path.name,
            "sha256": source.sha256,
            "step": source.step,
            "noise": noise,
        },
        card=_card(source, config, noise),
        read=read,
        tokenizer_files=source.tokenizer_files(),
        fingerprints=Fingerprints(tokenizer=source.fingerprints.tokenizer, corpora=fingerprints),
        probe=probe or {name: p for name, p in source.probe().items() if name in config.domain_names},
    )
    return UpcycledModel(written, config, parameter_counts(old, old.model.vocab_size).total)


def _fitted(config: Config, old: Config, file: str, source: Checkpoint) -> Config:
    """The sparse configuration with the dense model's vocabulary and tokenizer; UserError naming what differs."""
    if old.model.sparse_prefixes or old.model.domain_parameters.embedding != "shared":
        raise UserError(
            f"{source.path} is no dense model with one word embedding (it has "
            f"{len(old.model.sparse_prefixes)} sparse layers, model.domain_parameters.embedding is "
            f"{old.model.domain_parameters.embedding}): upcycle a dense model"
        )
    if not config.model.sparse_prefixes:
        raise UserError(f"{file}: model.sparse.layers is 0, so there is nothing to upcycle: set it to at least 1")
    differ = [
        f"model.{key} is {bare(getattr(config.model, key))} and the dense model's {bare(getattr(old.model, key))}"
        for key in _AGREE
        if getattr(config.model, key) != getattr(old.model, key)
    ]
    experts, networks = config.model.sparse.feed_forward, old.model.feed_forward
    if experts not in (None, networks):
        differ.append(f"model.sparse.feed_forward is {experts} and the dense model's networks are {networks}")
    if config.model.vocab_size not in (None, old.model.vocab_size):
        differ.append(f"model.vocab_size is {config.model.vocab_size} and the dense model's {old.model.vocab_size}")
    if differ:
        raise UserError(f"{file} does not fit the dense model: {'; '.join(differ)}; write the dense model's numbers")
    _check_tokenizer(config, file, source)
    values = config.to_dict()
    values["model"]["vocab_size"] = old.model.vocab_size
    values["data"]["tokenizer"] = old.to_dict()["data"]["tokenizer"]
    return effective(config_from_dict(values, source=file))


def _check_tokenizer(config: Config, file: str, source: Checkpoint) -> None:
    """A tokenizer that the configuration names must be the dense model's; `train` means that one too."""
    section = config.data.tokenizer
    if section.kind == "train":
        return
    from pangu_sigma.data.tokenizers.tokenizer_registry import read_model, tokenizer_class

    own = stored_tokenizer(source)
    model = read_model(section.path, section.kind)
    given = tokenizer_class(section.kind)(model, own.eod_id, own.pad_id, origin=str(section.path))
    if given.fingerprint != own.fingerprint:
        raise UserError(
            f"{file}: data.tokenizer.path = {section.path} is not the tokenizer of the dense model {source.path}, to "
            "which its embeddings belong: name that one, or set data.tokenizer.kind to train and the path to null"
        )


def _text(config: Config, source: Checkpoint) -> tuple[dict[str, np.ndarray], dict[str, str], dict[str, np.ndarray]]:
    """Token counts [V], corpus fingerprint and probe of every domain, from its text in the dense model's tokens."""
    from pangu_sigma.data.corpus import prepare_corpus

    corpus = prepare_corpus(config, stored_tokenizer(source))
    counts = corpus.token_counts(config.model.vocab_size)
    return counts, corpus.fingerprints, first_sequences(corpus.heldout(), config.checkpoint.probe_sequences)


def _is_new(name: str) -> bool:
    """Whether a tensor is of a part that a dense model does not have: a gate, or a shared expert."""
    return parse_name(name).module in ("router", "shared_expert")


def _new(config: Config, spec: TensorSpec) -> np.ndarray:
    """A new part's tensor; a shared expert gives zero until it trains, so that it changes no logit."""
    if parse_name(spec.name).part == tensor_name("shared_expert", "down.weight"):
        return np.zeros(spec.shape, np.float32)
    return initial_value(spec.name, spec.shape, config.run.seed, config.model)


def _table(config: Config, spec: TensorSpec, counts: dict[str, np.ndarray]) -> np.ndarray:
    """A new routing table: of a domain over its group, or of a hash layer over all experts."""
    kind, seed, parsed = config.model.sparse.table, config.run.seed, parse_name(spec.name)
    return draw_owned_table(kind, seed, parsed.layer, parsed.owner, spec.shape[0], config.expert_groups, counts)


def _experts(tensor: np.ndarray, spec: TensorSpec, seed: int, spread: float) -> Iterator[memoryview]:
    """The bytes of an expert group that starts as one dense tensor: the same `spec.shape[0]` times, plus noise."""
    flat = tensor.reshape(-1)
    for expert in range(spec.shape[0]):
        if not spread:
            yield raw_bytes(flat)
            continue
        rng = generator(seed, f"upcycling noise {spec.name}", expert)
        for begin in range(0, flat.size, _PIECE):
            part = flat[begin : begin + _PIECE]
            noisy = part + rng.standard_normal(part.size, np.float32) * np.float32(spread)
            yield raw_bytes(noisy)


def _card(source: Checkpoint, config: Config, noise: float) -> str:
    model = config.model
    layer_names = ", ".join(model.sparse_prefixes)
    per_domain = "".join(f"- {d.name}: {d.experts} experts in each\n" for d in config.domains)
    experts = sum(d.experts for d in config.domains) * len(model.sparse_prefixes)
    change = f"with noise of {noise} of their standard deviation" if noise else "unchanged"
    return (
        f"# {source.path.name}, upcycled\n\n"
        f"A sparse model before any training: {experts} experts in {layer_names}, each the dense model's feed-forward "
        f"network of its layer, {change}.\n\n{per_domain}\n"
        f"{model.layers} layers, {model.hidden} wide, vocabulary {model.vocab_size:,}. "
        f"Start: `{source.path.name}`, step {source.step}.\n"
    )
