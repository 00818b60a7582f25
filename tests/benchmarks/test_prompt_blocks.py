"""The benchmark of prompt blocks: what it times, on a model of NumPy, and its table."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from benchmarks.prompt_blocks import BLOCKS, PROMPTS, Times, page, table, time_alone, time_beside
from tests.pangu_sigma.generation.toy_engine import toy_engine


def test_a_turn_reads_the_prompt_and_leaves_the_engine_idle(monkeypatch):
    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    from tests.pangu_sigma.data.tokenizers.kinds_of_tokenizers import sentence_pieces

    tokenizer = sentence_pieces()
    engine = toy_engine(tokenizer, tokenizer.vocab_size)
    monkeypatch.setattr("benchmarks.prompt_blocks.WINDOW", engine.window)
    ids = np.arange(3, 3 + 20)
    assert time_alone(engine, ids) > 0.0 and engine.idle and engine.decoder.blocks == 3
    assert time_beside(engine, ids) > 0.0 and engine.idle


def test_the_table_has_the_medians_in_milliseconds():
    times = {
        str(block): {str(n): asdict(Times([0.3, 0.1, 0.2], [0.02, 0.04, 0.9])) for n in PROMPTS} for block in BLOCKS
    }
    lines = table(times).splitlines()
    assert len(lines) == 2 + len(BLOCKS) and lines[3] == "| in blocks of 256 |" + " 200 ms, 40 ms |" * len(PROMPTS)
    sizes = {"layers": 3, "sparse_layers": 1, "hidden": 64, "heads": 2, "ffn": 128}
    made = {"cores": 2, "cpu": "x", "python": "3", "mindspore": "2", "date": "today"}
    assert lines[2] in page({"times": times, "sizes": sizes, "rounds": 3, "machine": made})
