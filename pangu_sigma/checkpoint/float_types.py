"""Conversion between the float types that a model may be stored in: float32, float16, bfloat16."""

import numpy as np

from pangu_sigma.checkpoint.tensor_file import BFLOAT16, spec_of
from pangu_sigma.errors import CheckpointError

FLOAT_TYPES = ("float32", "float16", "bfloat16")


def as_float32(name: str, array: np.ndarray) -> np.ndarray:
    """float16 and bfloat16 tensors as float32, exactly; others (float32 too) as they are."""
    dtype = spec_of(name, array).dtype
    if dtype == "bfloat16":
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32) if dtype == "float16" else array


def convert_float(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """A float tensor in another of `FLOAT_TYPES`, rounded to the nearest (ties to even); integers stay as they are.

    Raises CheckpointError, naming the tensor, for a value that the type cannot hold.
    """
    if spec_of(name, array).dtype not in (*FLOAT_TYPES,) or spec_of(name, array).dtype == dtype:
        return array
    exact = as_float32(name, array)
    if dtype == "float32":
        return exact
    with np.errstate(over="ignore"):
        result = exact.astype(np.float16) if dtype == "float16" else _to_bfloat16(exact)
    lost = np.isfinite(exact) & ~np.isfinite(as_float32(name, result))
    if lost.any():
        largest = float(np.abs(exact[lost]).max())
        raise CheckpointError(f"tensor {name!r} has the value {largest:g}, which {dtype} cannot hold: keep float32")
    return result


def _to_bfloat16(exact: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(exact).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # Rounding could carry a NaN's bits over into an infinity: it becomes the quiet NaN of its sign.
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(exact), quiet, rounded).astype(np.uint16).view(BFLOAT16)
