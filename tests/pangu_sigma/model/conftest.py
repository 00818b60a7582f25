"""Small models of every kind, each built and compiled once for all tests of this folder."""

import os

os.environ.setdefault("GLOG_v", "3")

from collections.abc import Callable

import mindspore as ms
import numpy as np
import pytest

from pangu_sigma.config.model_section import ModelConfig
from parallel.ops.compiled_kernels import library
from rre.routers import ExpertGroups
from tests.pangu_sigma.model.model_driver import Batch, DrivenModel, make_batch, make_tensors

VOCAB = 50
GROUPS = ExpertGroups(("code", "law", "poems"), (3, 2, 1))
SPARSE_QUERY = {"layers": 2, "include_query_layer": True}
SIZES = {"layers": 3, "hidden": 16, "heads": 2, "ffn": 24, "positions": 256}

# OLMoE's parts
OLMOE = {
    "norm": "rmsnorm", "position": "rope", "feed_forward": "swiglu", "activation": "silu", "biases": False,
    "head": "untied", "query_layer": "none",
}  # fmt: skip

# name -> (what differs in the configuration, sequence length). Capacity only matters while training.
CASES = {
    "dense": ({"layers": 2}, 32),
    "dense_2_chunks": ({"layers": 2}, 128),
    "dense_4_chunks": ({"layers": 2}, 256),
    "rre": ({"sparse": SPARSE_QUERY | {"dispatch": "capacity", "capacity_factor": 1.0}}, 32),
    "rre_without_query_layer": (
        {
            "query_layer": "none", "activation": "gelu", "domain_parameters": {"embedding": "own"},
            "sparse": {"layers": 2},
        },
        32,
    ),
    "switch": ({"sparse": SPARSE_QUERY | {"router": "switch", "aux_loss_weight": 0.5}}, 32),
    "switch_capacity": (
        {"sparse": {"layers": 1, "router": "switch", "dispatch": "capacity", "capacity_factor": 1.0, "jitter": 0.1}},
        32,
    ),
    "olmoe": (
        {"sparse": {"pattern": "every", "router": "olmoe", "top_k": 3, "shared_expert": True, "aux_loss_weight": 0.5,
                    "z_loss_weight": 0.1}},
        32,
    ),
    "olmoe_parts": (
        OLMOE | {"attention": {"qk_norm": True},
                 "sparse": {"pattern": "every", "router": "olmoe", "top_k": 3, "shared_expert": True,
                            "aux_loss_weight": 0.5, "z_loss_weight": 0.1}},
        32,
    ),
    "olmoe_pooled": (
        OLMOE | {"layers": 2,
                 "sparse": {"pattern": "every", "router": "olmoe", "top_k": 2, "balance": "pooled",
                            "aux_loss_weight": 0.5, "z_loss_weight": 0.1}},
        32,
    ),
    # GLaM (arXiv 2112.06905): gated dense layers, every other layer of experts that have two matrices
    "glam": (
        {"query_layer": "none", "position": "rope", "feed_forward": "geglu", "activation": "gelu", "biases": False,
         "sparse": {"pattern": "every_other", "router": "glam", "feed_forward": "mlp", "aux_loss_weight": 0.5}},
        32,
    ),
    "mixture": (
        {"layers": 2, "top_layer": "mixture", "sparse": {"shared_expert": True}},
        32,
    ),
    "mixture_under_a_norm": (
        {"layers": 2, "query_layer": "none", "domain_parameters": {"embedding": "own"}, "top_layer": "mixture"},
        32,
    ),
    "mixture_cooperative": (
        {"layers": 2, "head": "untied", "top_layer": "mixture", "mixture_loss": "cooperative"},
        32,
    ),
    "rope_2_chunks": (OLMOE | {"layers": 2, "norm": "layernorm", "rope_theta": 100.0, "sparse": {"layers": 1}}, 128),
    "rre_of_mixed_parts": (
        {"norm": "rmsnorm", "attention": {"qk_norm": True}, "biases": False, "activation": "silu", "head": "untied",
         "sparse": SPARSE_QUERY},
        32,
    ),
}  # fmt: skip
# These run on the compiled kernels too, as `<case>_compiled`; the others are composed of MindSpore's operators.
COMPILED = ("dense_4_chunks", "rre", "rre_without_query_layer", "switch", "switch_capacity", "olmoe")
COMPILED += ("olmoe_parts", "rre_of_mixed_parts", "glam", "mixture")
CASES |= {f"{case}_compiled": CASES[case] for case in COMPILED}


@pytest.fixture(scope="session", autouse=True)
def graph_mode() -> None:
    ms.set_device("CPU")
    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.fixture(scope="session")
def driven() -> Callable[[str], tuple[DrivenModel, Batch]]:
    """Case name -> the model and a batch whose samples' domains differ."""
    built: dict[str, tuple[DrivenModel, Batch]] = {}

    def get(case: str) -> tuple[DrivenModel, Batch]:
        if case not in built:
            changes, length = CASES[case]
            config = ModelConfig(**SIZES | changes)
            tensors = make_tensors(config, VOCAB, GROUPS)
            kernels = library() if case.endswith("_compiled") else None
            if case.endswith("_compiled") and kernels is None:
                pytest.skip("no compiled kernels in this installation")
            model = DrivenModel(
                config, GROUPS, tensors, VOCAB, 4, length, jitter=config.sparse.jitter > 0, kernels=kernels
            )
            built[case] = model, make_batch(1, VOCAB, 4, length, len(GROUPS.names))
        return built[case]

    return get


@pytest.fixture(scope="session")
def noise() -> dict[str, np.ndarray]:
    """The Switch gate's input noise of case `switch_capacity`, by sparse layer."""
    draw = np.random.default_rng(5)
    return {"blocks.1": draw.uniform(0.9, 1.1, (4 * 32, SIZES["hidden"])).astype(np.float32)}
