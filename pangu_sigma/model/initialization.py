"""Initialisation of shared parameters, in NumPy.

Normal(init_std), matrices that end in the residual stream scaled by 1 / sqrt(2 L) (PanGu-alpha's own code). With
`init_cutoff` values beyond so many standard deviations are drawn again, and without `init_scale_residual` no matrix
begins smaller than others: both as OLMoE's (arXiv 2409.02060, appendix B).
"""

from __future__ import annotations

import numpy as np

from pangu_sigma.config.model_section import ModelConfig
from pangu_sigma.tensor_names import gate_weight, parse_name
from rre.counted_random import generator, normal

_INTO_RESIDUAL = ("projection.weight", "down.weight")


def initial_value(
    name: str, shape: tuple[int, ...], seed: int, model: ModelConfig, stream: str | None = None
) -> np.ndarray:
    """The initial value of the parameter `name`, float32 of its shape: a function of (seed, `stream`, or name)."""
    parsed, gate = parse_name(name), gate_weight(name, model.router_spec)
    if gate is not None and gate.initial is not None:
        return np.full(shape, gate.initial, np.float32)
    for tensor, value in {"bias": 0.0, **model.norm_spec.tensors}.items():
        if parsed.tensor.endswith(tensor):
            return np.full(shape, value, np.float32)
    std = model.residual_std if parsed.tensor in _INTO_RESIDUAL else model.init_std
    return normal(generator(seed, f"initial {stream or name}"), shape, std, model.init_cutoff)
