"""Training FLOPs of one token, from which the metrics give model FLOP/s."""

from __future__ import annotations

from pangu_sigma.config import Config, parameter_counts


def flops_per_token(config: Config, vocab: int) -> float:
    """Training FLOPs of one token: 6 N + 12 L D S (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).

    N counts the parameters that a token is multiplied with: activated ones without the looked-up position tables (the
    word embedding counts once, as the output matrix, or an untied head in its place; for every expert of a competitive
    mixture, each of which has an output of its own). The mean over domains.
    """
    model = config.model
    counts = parameter_counts(config, vocab)
    activated = sum(counts.activated_per_token.values()) / len(counts.activated_per_token)
    tables = int(model.position_spec.has_table) + int(model.has_query_layer)
    looked_up = model.positions * model.hidden * tables
    if not model.head_spec.is_tied:
        looked_up += vocab * model.hidden
    activated += (config.predictions - 1) * vocab * model.hidden
    attention = 12 * model.layers * model.hidden * config.data.sequence_length
    return 6.0 * (activated - looked_up) + attention
