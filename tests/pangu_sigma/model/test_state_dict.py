"""A built model has exactly the tensors that the configuration's arithmetic says."""

import math

import numpy as np
import pytest

from pangu_sigma.config import parameter_counts, tensor_shapes
from pangu_sigma.errors import UserError
from pangu_sigma.model.state_dict import domain_tensors, model_tensors, restore_model, stored_tables
from pangu_sigma.tensor_names import is_routing
from pangu_sigma.training.optimizer import Optimizer
from tests.pangu_sigma.training.small_trainer import VOCAB, small_config, small_model

CASES = {
    "dense": {"sparse": {"layers": 0}},
    "no query layer": {"query_layer": "none", "sparse": {"layers": 2}},
    "unequal groups": {"layers": 4, "sparse": {"layers": 2}},
    "sparse query layer": {"layers": 3, "sparse": {"layers": 2, "include_query_layer": True}},
    "hash": {"sparse": {"layers": 1, "router": "hash"}},
    "noisy gate with a shared expert": {
        "layers": 3,
        "sparse": {"layers": 0, "pattern": "every_other", "router": "noisy_top_k", "top_k": 2, "shared_expert": True},
    },
    "switch": {"layers": 3, "sparse": {"layers": 2, "include_query_layer": True, "router": "switch"}},
    "embedding slots": {"domain_parameters": {"embedding": "own"}},
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def model(request):
    return small_model(small_config(request.param))


def test_built_tensors_are_those_of_the_manifest(model):
    built = {p.name: tuple(p.shape) for p in model.net.get_parameters()}
    built |= {name: tensor.shape for name, tensor in domain_tensors(model, optimizer_state=False).items()}
    assert built == tensor_shapes(model.config, VOCAB)


def test_built_parameters_are_as_many_as_counted(model):
    counts = parameter_counts(model.config, VOCAB)
    shared = sum(math.prod(p.shape) for p in model.net.get_parameters())
    domains = domain_tensors(model, optimizer_state=False)
    per_domain = {
        domain: sum(t.size for n, t in domains.items() if n.startswith(f"domains.{domain}.") and not is_routing(n))
        for domain in model.groups.names
    }
    assert (shared, per_domain) == (counts.shared, counts.per_domain)
    assert counts.total == shared + sum(per_domain.values())


def test_every_trained_tensor_has_moments_and_every_expert_a_count(model):
    tensors = model_tensors(model, Optimizer(model).moments())
    trained = [name for name in tensor_shapes(model.config, VOCAB) if not is_routing(name)]
    for name in trained:
        for moment in "mv":
            prefix = f"optimizer.{moment}."
            if name.startswith("domains."):
                _, domain, rest = name.split(".", 2)
                prefix, name_in_domain = f"domains.{domain}.{prefix}", rest
            else:
                name_in_domain = name
            assert tensors[prefix + name_in_domain].shape == tensors[name].shape
    steps = {name: t for name, t in tensors.items() if ".optimizer.steps." in name}
    assert all(t.dtype == np.int64 for t in steps.values())
    layer_names = [*model.config.model.sparse_prefixes, *(["embedding"] if "embedding" in model.store.steps else [])]
    assert set(steps) == {f"domains.{d}.optimizer.steps.{p}" for d in model.groups.names for p in layer_names}
    tables = sum(is_routing(name) for name in tensors)
    assert len(tensors) == 3 * len(trained) + len(steps) + tables


def test_a_model_restored_from_its_tensors_is_the_same(model):
    tensors = {name: t.copy() for name, t in model_tensors(model, Optimizer(model).moments()).items()}
    for name in tensors:
        if name.startswith("domains.") and ".optimizer." in name:
            tensors[name] = tensors[name] + 1
    other = small_model(model.config.model_copy(update={"run": model.config.run.model_copy(update={"seed": 9})}))
    other.tables.update(stored_tables(tensors))
    optimizer = Optimizer(other)
    restore_model(other, tensors, optimizer_state=True)
    optimizer.restore(tensors, 0)
    again = model_tensors(other, optimizer.moments())
    assert again.keys() == tensors.keys()
    assert all(again[name].tobytes() == tensors[name].tobytes() for name in tensors)


def test_a_tensor_that_is_missing_or_of_another_shape_is_named():
    model = small_model(small_config())
    tensors = dict(model_tensors(model, None))
    with pytest.raises(UserError, match=r"no tensor norm\.gamma"):
        restore_model(model, {name: t for name, t in tensors.items() if name != "norm.gamma"})
    name = "domains.law.blocks.0.experts.up.bias"
    with pytest.raises(UserError, match=r"domains\.law\.blocks\.0\.experts\.up\.bias is \(5, 32\) .* needs \(1, 32\)"):
        restore_model(model, {**tensors, name: np.zeros((5, 32), np.float32)})
