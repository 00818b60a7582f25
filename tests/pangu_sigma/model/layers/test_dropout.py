"""Counted dropout: the right share, the same mask for the same key, and attention's own dropout with its gradients."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from pangu_sigma.config.model_section import ModelConfig
from pangu_sigma.model.layers.dropout import CountedDropout, CountedUniform
from rre.counted_random import sample_keys
from tests.pangu_sigma.model.conftest import GROUPS, VOCAB
from tests.pangu_sigma.model.model_driver import DrivenModel, make_batch, make_tensors

COUNT = 4096
KEYS = sample_keys(1, "dropout", 0, np.arange(8))


class Uniform(nn.Cell):
    def __init__(self, layer: int, site: str) -> None:
        super().__init__()
        self.uniform = CountedUniform(layer, site)

    def construct(self, keys: Tensor):
        return self.uniform(keys, COUNT)


@pytest.fixture(scope="module")
def uniform() -> Callable[[np.ndarray], np.ndarray]:
    cell = Uniform(2, "attention")
    return lambda keys: cell(Tensor(np.asarray(keys, np.int32))).asnumpy()


def murmur(x: np.ndarray) -> np.ndarray:
    """MurmurHash3's finaliser on uint32."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def test_the_graph_computes_the_hash_it_names(uniform):
    salt = np.array(CountedUniform(2, "attention").salt, np.int64).astype(np.uint32)
    keys = murmur(KEYS.view(np.uint32) ^ salt)
    element = np.arange(COUNT, dtype=np.uint32) * np.uint32(0x9E3779B9)
    expected = (murmur(element[None] ^ keys[:, None]) >> np.uint32(8)) / 2.0**24
    np.testing.assert_array_equal(uniform(KEYS), expected.astype(np.float32))


def test_draws_are_uniform_and_streams_independent(uniform):
    drawn = np.concatenate([uniform(sample_keys(1, "dropout", step, np.arange(8))) for step in range(8)])
    assert drawn.min() >= 0 and drawn.max() < 1
    observed = np.histogram(drawn, bins=256, range=(0, 1))[0]
    expected = drawn.size / 256
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < 255 + 5 * np.sqrt(2 * 255)
    # Neither neighbours in a sample nor samples among each other are correlated.
    noise = 5 / np.sqrt(drawn.size)
    for lag in (1, 2, 16, 64):
        assert abs(np.corrcoef(drawn[:, :-lag].reshape(-1), drawn[:, lag:].reshape(-1))[0, 1]) < noise
    among = np.corrcoef(drawn) - np.eye(len(drawn))
    assert np.abs(among).max() < 5.5 / np.sqrt(COUNT)


def test_neighbouring_keys_layers_and_places_have_streams_of_their_own(uniform):
    drawn = uniform([5, 6, 7, 5 + (1 << 16), -5, 0, -1, 2**31 - 1])
    among = np.corrcoef(drawn) - np.eye(len(drawn))
    assert np.abs(among).max() < 5.5 / np.sqrt(COUNT)
    for other in (Uniform(3, "attention"), Uniform(2, "feed-forward")):
        assert abs(np.corrcoef(other(Tensor(KEYS)).asnumpy().reshape(-1), uniform(KEYS).reshape(-1))[0, 1]) < 0.03


def test_a_samples_draws_do_not_depend_on_its_place_in_the_batch(uniform):
    order = np.random.default_rng(0).permutation(8)
    np.testing.assert_array_equal(uniform(KEYS[order]), uniform(KEYS)[order])


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_the_right_share_and_the_mean_and_passes_gradients_of_what_it_keeps(rate):
    cell = CountedDropout(rate, 1, "embedding").set_train()
    x = np.ones((8 * 32, 64), np.float32)  # rows of 8 samples
    out, gradient = ops.value_and_grad(cell, 0)(Tensor(x), Tensor(KEYS))
    out = out.asnumpy()
    assert set(np.unique(out)) == {np.float32(0), np.float32(1) * np.float32(1 / (1 - rate))}
    assert abs((out > 0).mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / out.size)
    assert abs(out.mean() - 1) < 0.03
    np.testing.assert_array_equal(gradient.asnumpy(), out)
    np.testing.assert_array_equal(cell(Tensor(x), Tensor(KEYS)).asnumpy(), out)
    order = np.array([3, 1, 0, 2, 7, 6, 5, 4])
    again = cell(Tensor(x), Tensor(KEYS[order])).asnumpy()
    np.testing.assert_array_equal(again.reshape(8, -1), out.reshape(8, -1)[order])


def test_dropout_is_the_identity_outside_training_and_at_rate_0():
    x = Tensor(np.ones((8, 4), np.float32))
    for cell in (CountedDropout(0.5, 1, "x").set_train(False), CountedDropout(0.0, 1, "x").set_train()):
        np.testing.assert_array_equal(cell(x, Tensor(KEYS)).asnumpy(), np.ones((8, 4)))


LENGTH = 128  # two attention chunks


@pytest.fixture(scope="module")
def dropping() -> DrivenModel:
    config = ModelConfig(
        layers=2, hidden=16, heads=2, ffn=24, positions=LENGTH, dropout=0.1, attention={"dropout": 0.2}
    )
    return DrivenModel(config, GROUPS, make_tensors(config, VOCAB, GROUPS), VOCAB, 4, LENGTH)


@pytest.fixture(scope="module")
def batch():
    return make_batch(4, VOCAB, 4, LENGTH, 3)


def test_evaluation_of_a_model_with_dropout_is_the_reference_without(dropping, batch):
    np.testing.assert_allclose(dropping.logits(batch), dropping.oracle(batch).logits, rtol=1e-5, atol=1e-5)


def test_the_same_keys_give_the_same_step_to_the_bit_and_other_keys_another(dropping, batch):
    first = dropping.train(batch, keys=KEYS[:4])
    second = dropping.train(batch, keys=KEYS[:4])
    assert first[0] == second[0]
    for name, gradient in first[4].items():
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient, second[4][name], err_msg=name)
    assert abs(dropping.train(batch, keys=KEYS[4:])[0] - first[0]) > 1e-4


def test_a_samples_loss_under_dropout_does_not_depend_on_its_place_in_the_batch(dropping, batch):
    order = np.array([2, 0, 3, 1])
    shuffled = dataclasses.replace(
        batch, tokens=batch.tokens[order], labels=batch.labels[order], weights=batch.weights[order]
    )
    losses = dropping.train(batch, keys=KEYS[:4])[1]
    shuffled_losses = dropping.train(shuffled, keys=KEYS[:4][order])[1]
    np.testing.assert_allclose(shuffled_losses, losses[order], rtol=1e-6)


def test_gradients_under_dropout_are_those_of_the_dropped_model(dropping, batch):
    """Central differences of the model itself, whose mask stays the same for the same keys."""
    parameters = {p.name: p for p in dropping.net.get_parameters()}
    gradients = dropping.train(batch, keys=KEYS[:4])[4]
    draw = np.random.default_rng(6)
    for name in (
        "blocks.0.attention.query.weight", "blocks.0.attention.key.weight", "query_layer.attention.value.weight",
        "blocks.0.feed_forward.up.weight", "embedding.position",
    ):  # fmt: skip
        value = parameters[name].asnumpy().copy()
        direction = draw.standard_normal(value.shape) + 3 * np.sign(gradients[name])
        direction = (direction / np.linalg.norm(direction)).astype(np.float32)
        slope = float((gradients[name] * direction).sum())
        ends = []
        for sign in (1, -1):
            parameters[name].set_data(Tensor(value + np.float32(sign * 0.02) * direction))
            ends.append(dropping.train(batch, keys=KEYS[:4])[0])
        parameters[name].set_data(Tensor(value))
        assert slope == pytest.approx((ends[0] - ends[1]) / 0.04, rel=5e-3), name
