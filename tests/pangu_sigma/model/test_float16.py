"""float16 products inside a float32 model."""

import dataclasses

import mindspore as ms
import numpy as np
import pytest

from tests.pangu_sigma.model.conftest import GROUPS, VOCAB
from tests.pangu_sigma.model.model_driver import DrivenModel


def test_a_float16_model_and_its_gradients_stay_near_float32(driven):
    exact, batch = driven("rre_without_query_layer")
    low = DrivenModel(exact.config, GROUPS, exact.tensors, VOCAB, *batch.tokens.shape, compute=ms.float16)
    scaled = dataclasses.replace(batch, weights=batch.weights * np.float32(1024))
    objective, _, _, _, gradients = low.train(scaled)
    assert objective == pytest.approx(low.oracle_objective(scaled, low.tensors), rel=3e-3)
    wished = exact.train(scaled)[4]
    for name, gradient in gradients.items():
        if not name.endswith("key.bias"):  # zero in truth
            assert np.linalg.norm(gradient - wished[name]) < 0.02 * np.linalg.norm(wished[name]), name
