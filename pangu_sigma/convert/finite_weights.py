"""Weights that are no numbers: an import names them, instead of a model that computes nothing."""

from __future__ import annotations

import numpy as np

from pangu_sigma.checkpoint.tensor_file import spec_of
from pangu_sigma.errors import UserError

_PIECE = 1 << 20  # values looked at together


def check_finite(source: str, name: str, tensor: np.ndarray) -> np.ndarray:
    """The tensor itself, float32, float16, bfloat16 or of whole numbers.

    Raises UserError that names `source`, the tensor, how many of its values are NaN or infinite, and one of them.
    """
    count, first = 0, 0
    turned = tensor.flags.f_contiguous and not tensor.flags.c_contiguous  # looked at as it lies, without a copy
    lying = tensor.T if turned else tensor
    flat = lying.reshape(-1)
    for begin in range(0, flat.size, _PIECE):
        bad = _is_not_finite(name, flat[begin : begin + _PIECE])
        if found := int(bad.sum()):
            first = first if count else begin + int(bad.argmax())
            count += found
    if count:
        index = [int(i) for i in np.unravel_index(first, lying.shape)][:: -1 if turned else 1]
        raise UserError(
            f"{source} holds {name} with {count:,} of {flat.size:,} values NaN or infinite, one at {index}: such a "
            "model computes nothing; give a checkpoint from before they came up"
        )
    return tensor


def _is_not_finite(name: str, values: np.ndarray) -> np.ndarray:
    if spec_of(name, values).dtype == "bfloat16":
        return (values.view(np.uint16) & np.uint16(0x7F80)) == np.uint16(0x7F80)  # all bits of the exponent
    return ~np.isfinite(values)
