"""Types that weights are stored in: rounding as PyTorch rounds, and nothing lost in silence."""

import numpy as np
import pytest

from pangu_sigma.checkpoint import BFLOAT16, CheckpointError
from pangu_sigma.checkpoint.float_types import as_float32, convert_float


def hard_values() -> np.ndarray:
    """Random bit patterns, ties, subnormals, zeros, infinities and NaNs."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    ties = (np.arange(0x3F80, 0x4080, dtype=np.uint32) << 16) | 0x8000
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-45, 3.3e38], np.float32).view(np.uint32)
    edges = np.array([0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF, 0x00008000, 0x00008001], np.uint32)
    return np.concatenate([bits, ties, special, edges]).view(np.float32)


def test_bfloat16_rounds_as_pytorch_does():
    torch = pytest.importorskip("torch")
    values = hard_values()
    values = values[~(np.isfinite(values) & (np.abs(values) > 3.38e38))]
    ours = convert_float("w", values, "bfloat16")
    assert ours.dtype.metadata == BFLOAT16.metadata
    theirs = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    real = ~np.isnan(values)
    np.testing.assert_array_equal(ours[real], theirs[real])
    assert np.isnan(as_float32("w", ours)[~real]).all()


def test_back_to_float32_is_exact():
    half = hard_values().view(np.float16)
    np.testing.assert_array_equal(as_float32("w", half), half.astype(np.float32))
    bits = np.arange(1 << 16, dtype=np.uint16).view(BFLOAT16)
    np.testing.assert_array_equal(as_float32("w", bits).view(np.uint32) >> 16, bits.view(np.uint16))
    assert convert_float("w", bits, "bfloat16") is bits


def test_whole_numbers_stay():
    table = np.arange(5, dtype=np.int32)
    assert convert_float("t", table, "float16") is table and as_float32("t", table) is table


@pytest.mark.parametrize("dtype, value", [("float16", 70000.0), ("bfloat16", 3.4e38)])
def test_a_value_that_does_not_fit_is_refused_by_name(dtype, value):
    with pytest.raises(CheckpointError, match=f"'blocks.0.w' has the value .* which {dtype} cannot hold"):
        convert_float("blocks.0.w", np.array([1.0, value], np.float32), dtype)
    assert np.isinf(as_float32("w", convert_float("w", np.array([np.inf], np.float32), dtype))).all()
