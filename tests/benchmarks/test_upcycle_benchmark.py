"""The upcycling benchmark on its smaller layout: what it measures, and that memory holds no expert group."""

import pytest

from benchmarks import upcycle


def test_the_38b_layout_is_measured_in_a_process_of_its_own(tmp_path, monkeypatch):
    if not upcycle.TOKENIZER.is_file():
        pytest.skip("PanGu-α's published tokenizer is not beside this checkout")
    monkeypatch.setattr(upcycle, "LAYOUTS", {"38B": 1})
    (row,) = upcycle.results(80, tmp_path)
    assert row["full_parameters"] == pytest.approx(37.97e9, rel=1e-3)
    assert row["written"] >= row["sparse_bytes"] > row["dense_bytes"]
    assert row["read"] < 2 * row["dense_bytes"]
    # one tensor and the buffers, not the model
    assert row["memory"] < row["largest_dense_tensor"] + (16 << 20) < row["sparse_bytes"]
    assert "**" in upcycle.table([row]) and "38B" in upcycle.table([row])
