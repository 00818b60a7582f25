"""Rules inside the `model` section: sizes, parts that go together, which layers are sparse, what a router asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pangu_sigma.config.capacity_sizes import samples_at_a_time
from pangu_sigma.config.model_section import GATE_ACTIVATIONS

if TYPE_CHECKING:
    from pangu_sigma.config.schema import Config

Broken = Iterator[tuple[str, str]]


def broken_model_rules(config: Config) -> Broken:
    """(key, sentence) for every model that cannot be built, or that has an option without effect."""
    for check in (_sizes, _parts, _networks, _top_layer, _sparse):
        yield from check(config)


def _sizes(config: Config) -> Broken:
    model = config.model
    if model.hidden % model.heads:
        yield (
            "model.heads",
            f"model.heads = {model.heads} does not divide model.hidden = {model.hidden}: "
            "choose a hidden size that is a multiple of the number of heads",
        )
    if model.blocks < 1:
        yield (
            "model.layers",
            f"model.layers = {model.layers} leaves no block under the query layer: set it to at least 2, "
            "or model.query_layer to none",
        )


def _parts(config: Config) -> Broken:
    """Backbone parts that cannot be combined, and options of parts that are not there."""
    model = config.model
    if model.position == "rope" and model.query_layer != "none":
        yield (
            "model.query_layer",
            "model.query_layer = next_position asks by learned positions, which model.position = rope does not have: "
            "set model.query_layer to none, or model.position to learned",
        )
    if model.position == "rope" and model.hidden % model.heads == 0 and model.hidden // model.heads % 2:
        yield (
            "model.heads",
            f"model.position = rope turns pairs of values, and a head has {model.hidden // model.heads} "
            "(model.hidden / model.heads): choose sizes that make it even",
        )
    if model.position != "rope" and model.rope_theta != 10000.0:
        yield (
            "model.rope_theta",
            f"model.rope_theta = {model.rope_theta:g} has no effect with model.position = {model.position}: leave it "
            "out, or set model.position to rope",
        )
    if model.head == "untied" and model.domain_parameters.embedding == "own":
        yield (
            "model.head",
            "model.head = untied is one table for all domains, but model.domain_parameters.embedding = own gives each "
            "its own words: set model.head to tied, or model.domain_parameters.embedding to shared",
        )


def _networks(config: Config) -> Broken:
    """Feed-forward networks of dense layers and of experts, which share activation and biases."""
    model = config.model
    written = {"model.feed_forward": model.feed_forward, "model.sparse.feed_forward": model.sparse.feed_forward}
    gated = {key: kind for key, kind in written.items() if kind in GATE_ACTIVATIONS}
    if len(set(gated.values())) > 1:
        yield (
            "model.sparse.feed_forward",
            f"model.feed_forward = {model.feed_forward} and model.sparse.feed_forward = {model.sparse.feed_forward} "
            "are gated by different activations, and a model has one: set them alike, or one of them to mlp",
        )
        return
    for key, kind in gated.items():
        wanted = GATE_ACTIVATIONS[kind]
        if model.activation != wanted:
            yield (
                "model.activation",
                f"model.activation = {model.activation}, but {key} = {kind} is gated by {wanted} by definition: "
                f"set model.activation to {wanted}",
            )
        if model.biases:
            yield (
                "model.biases",
                f"model.biases is true, but {key} = {kind} has none: set model.biases to false",
            )


def _top_layer(config: Config) -> Broken:
    model, sparse = config.model, config.model.sparse
    if not model.is_mixture:
        if model.mixture_loss != "competitive":
            yield (
                "model.mixture_loss",
                f"model.mixture_loss = {model.mixture_loss} has no effect without a mixture: leave it out, or set "
                "model.top_layer to mixture",
            )
        return
    if sparse.layers or sparse.include_query_layer or sparse.pattern != "top":
        yield (
            "model.top_layer",
            "model.top_layer = mixture mixes what whole models would give, so the layer under the head "
            f"({model.last_layer}) must be the only one with experts: leave model.sparse.layers, pattern and "
            "include_query_layer out",
        )
    if sparse.router != "rre":
        yield (
            "model.sparse.router",
            f"model.sparse.router = {sparse.router} has no effect on model.top_layer = mixture, whose gate is its own: "
            "leave it out",
        )
    if sparse.dispatch == "capacity":
        yield (
            "model.sparse.dispatch",
            "model.sparse.dispatch = capacity, but under model.top_layer = mixture every expert takes every row: set "
            "it to dropless",
        )


def _sparse(config: Config) -> Broken:
    model, sparse = config.model, config.model.sparse
    if sparse.include_query_layer and model.query_layer == "none":
        yield (
            "model.sparse.include_query_layer",
            "model.sparse.include_query_layer is true, but model.query_layer is none: set it to false",
        )
        return
    if sparse.pattern != "top" and sparse.layers:
        yield (
            "model.sparse.layers",
            f"model.sparse.layers = {sparse.layers} counts top layers, but model.sparse.pattern = {sparse.pattern} "
            "says itself which layers are sparse: set model.sparse.layers to 0, or the pattern to top",
        )
    if sparse.pattern == "every_other" and model.blocks < 2:
        yield (
            "model.sparse.pattern",
            f"model.sparse.pattern = every_other begins with the second block, but there are {model.blocks}: "
            "set it to top or every, or raise model.layers",
        )
    if sparse.pattern == "top" and sparse.include_query_layer and sparse.layers == 0:
        yield (
            "model.sparse.include_query_layer",
            "model.sparse.include_query_layer is true, but model.sparse.layers is 0: "
            "the query layer counts as one of the sparse layers, so set model.sparse.layers to at least 1",
        )
    most = model.blocks + int(sparse.include_query_layer)
    if sparse.layers > most:
        counted = "the query layer included" if sparse.include_query_layer else "the query layer is dense"
        if model.query_layer == "none":
            counted = "there is no query layer"
        yield (
            "model.sparse.layers",
            f"model.sparse.layers = {sparse.layers} is more than the {most} layers that can be sparse "
            f"(model.layers = {model.layers}, {counted}): set it to at most {most}",
        )
    yield from _router(config)


def _router(config: Config) -> Broken:
    sparse, kind = config.model.sparse, config.model.router_spec
    router = "mixture (model.top_layer)" if config.model.is_mixture else f"router {sparse.router}"
    if sparse.resample and "resample" not in kind.options:
        yield (
            "model.sparse.resample",
            f"model.sparse.resample is true, but the {router} has no table of a domain to draw from: "
            "set it to false or the router to rre",
        )
    if sparse.jitter > 0 and "jitter" not in kind.options:
        yield (
            "model.sparse.jitter",
            f"model.sparse.jitter = {sparse.jitter} has no effect on the {router}: set it to 0, or the "
            "router to switch",
        )
    if sparse.renormalise and "renormalise" not in kind.options:
        yield (
            "model.sparse.renormalise",
            f"model.sparse.renormalise is true, but has no effect on the {router}: set it to false, or "
            "the router to olmoe",
        )
    if sparse.balance != "per_layer" and "balance" not in kind.options:
        yield (
            "model.sparse.balance",
            f"model.sparse.balance = {sparse.balance} has no effect on the {router}: set it to "
            "per_layer, or the router to olmoe",
        )
    if kind.fixed and sparse.top_k not in (None, kind.experts_per_token):
        yield (
            "model.sparse.top_k",
            f"model.sparse.top_k = {sparse.top_k}, but the {router} takes "
            f"{kind.experts_per_token or 'all experts'} by definition: leave it out",
        )
    if not kind.causal and sparse.dispatch == "capacity":
        yield (
            "model.sparse.dispatch",
            f"model.sparse.dispatch = capacity, but with the {router} every expert takes a fixed number "
            "of tokens anyway: set it to dropless",
        )
    if sparse.capacity_samples > 1:
        if not kind.learned or not kind.causal or config.model.is_mixture or sparse.dispatch != "capacity":
            yield (
                "model.sparse.capacity_samples",
                f"model.sparse.capacity_samples = {sparse.capacity_samples} acts on the learned gates that have a "
                "capacity: leave it out, or set such a router and model.sparse.dispatch to capacity",
            )
        elif samples_at_a_time(config) % sparse.capacity_samples:
            yield (
                "model.sparse.capacity_samples",
                f"model.sparse.capacity_samples = {sparse.capacity_samples} does not divide the "
                f"{samples_at_a_time(config)} sequences that a rank computes at a time (train.batch_size / "
                "train.gradient_accumulation_steps, among the ranks that read): choose a divisor",
            )
    experts = config.experts_in_layer
    most = experts - 1 if config.model.router == "noisy_top_k" else experts
    if config.model.sparse_prefixes and kind.learned and config.experts_per_token > most:
        spare = ", one of which must be left unchosen" if most < experts else ""
        yield (
            "model.sparse.top_k",
            f"model.sparse.top_k = {config.experts_per_token} (the {router}'s own where nothing is "
            f"written) is too many for the {experts} experts of a sparse layer{spare}: set it to at most {most}",
        )
