"""A domain's logits in evaluation are the same to the bit in the full model and in one that holds that domain only."""

import dataclasses

import numpy as np
import pytest

from pangu_sigma.config.model_section import ModelConfig
from parallel.ops.compiled_kernels import library
from rre.dispatch.dispatch_plan import EXACT_ROWS
from rre.routers import ExpertGroups
from tests.pangu_sigma.model.model_driver import DrivenModel, make_batch, make_tensors

VOCAB, BATCH, LENGTH = 60, 4, 128
GROUPS = ExpertGroups(("code", "law", "poems"), (3, 2, 4))
LAW = np.array([1, 0, 1, 2])


def evaluated(
    config: ModelConfig, groups: ExpertGroups, tensors: dict[str, np.ndarray], kernels: str | None
) -> DrivenModel:
    slots = groups.total if kernels else BATCH * LENGTH // EXACT_ROWS + groups.total
    return DrivenModel(config, groups, tensors, VOCAB, BATCH, LENGTH, blocks=slots, kernels=kernels)


@pytest.mark.parametrize("slots, kind", [("shared", "compiled"), ("shared", "composed"), ("own", "compiled")])
def test_a_domains_logits_equal_those_of_a_model_with_its_experts_only(slots, kind):
    kernels = library() if kind == "compiled" else None
    if kind == "compiled" and kernels is None:
        pytest.skip("no compiled kernels in this installation")
    config = ModelConfig(
        layers=3, hidden=32, heads=2, ffn=48, positions=LENGTH, domain_parameters={"embedding": slots},
        sparse={"layers": 2, "include_query_layer": True},
    )  # fmt: skip
    tensors = make_tensors(config, VOCAB, GROUPS)
    only_law = {n: a for n, a in tensors.items() if not n.startswith("domains.") or n.startswith("domains.law.")}
    full, small = (
        evaluated(config, GROUPS, tensors, kernels),
        evaluated(config, ExpertGroups(("law",), (2,)), only_law, kernels),
    )
    mixed = dataclasses.replace(make_batch(1, VOCAB, BATCH, LENGTH, 3), domain=LAW)
    logits = full.logits(mixed)
    np.testing.assert_allclose(logits, full.oracle(mixed).logits, rtol=1e-5, atol=2e-5)
    for seed in (2, 3):
        # The same places in the batch; where other domains' samples stood, some other text of this domain.
        other = make_batch(seed, VOCAB, BATCH, LENGTH, 1)
        tokens = np.where((mixed.domain == 1)[:, None], mixed.tokens, other.tokens)
        again = small.logits(dataclasses.replace(other, tokens=tokens))
        assert np.array_equal(again[mixed.domain == 1], logits[mixed.domain == 1])
        assert not np.array_equal(again[mixed.domain != 1], logits[mixed.domain != 1])
