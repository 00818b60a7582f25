"""Positions and segments that restart after every end-of-document token (PanGu-α's EOD reset)."""

import numpy as np


def positions_and_segments(tokens: np.ndarray, eod_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions int32 [B,S] (0 again after every end-of-document token) and segments int32 [B,S] (0, 1, 2 … per row).

    ``tokens`` is [B,S], the model's input side. The end-of-document token still belongs to the document it ends. A
    token may attend to an earlier one exactly when both have the same segment.
    """
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be [B,S], not {tokens.shape}")
    rows, length = tokens.shape
    starts = np.zeros((rows, length), dtype=bool)
    starts[:, 1:] = tokens[:, :-1] == eod_id
    segments = np.cumsum(starts, axis=1, dtype=np.int32)
    columns = np.arange(length, dtype=np.int32)
    begin = np.maximum.accumulate(np.where(starts, columns, np.int32(0)), axis=1)
    return (columns - begin).astype(np.int32), segments
