"""Initialisation of shared parameters, in NumPy.

Normal(init_std), matrices that end in the residual stream scaled by 1 / sqrt(2 L) (PanGu-alpha's own code). With
`init_cutoff` values beyond so many standard deviations are drawn again, and without `init_scale_residual` no matrix
begins smaller than others: both as OLMoE's (arXiv 2409.02060, appendix B).
"""

from __future__ import annotations

import numpy as np

from pangu_sigma.config.model_section import ModelConfig
from rre.counted_random import generator, normal

_INTO_RESIDUAL = ("attention.projection.weight", "feed_forward.down.weight", "shared_expert.down.weight")


def initial_value(name: str, shape: tuple[int, ...], seed: int, model: ModelConfig) -> np.ndarray:
    """The initial value of the shared parameter `name`, float32 of its shape: a function of (seed, name)."""
    # A noisy gate begins with the same noise for every expert (Shazeer et al. 2017, appendix A).
    if name.endswith((".bias", ".beta", ".noise_weight")):
        return np.zeros(shape, np.float32)
    if name.endswith(".gamma"):
        return np.ones(shape, np.float32)
    std = model.residual_std if name.endswith(_INTO_RESIDUAL) else model.init_std
    return normal(generator(seed, f"initial {name}"), shape, std, model.init_cutoff)
