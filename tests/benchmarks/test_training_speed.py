"""The speed comparison: its figures, its servers, and that both sides are given the same work."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.benchmark_server import Server, ServerFailed
from benchmarks.training_speed import OURS, complaints, summary, table
from benchmarks.workload import BATCH, LENGTH, VARIANTS, VOCABULARY, configuration, global_tables

ROOT = Path(__file__).parents[2]


def test_the_baseline_is_the_faster_form_and_ratios_are_taken_inside_a_round():
    speeds = {OURS: [100.0, 50.0, 120.0], "PyTorch loop": [100.0, 25.0, 80.0], "PyTorch bmm": [50.0, 20.0, 60.0]}
    ratios_and_speeds = summary(speeds)
    assert ratios_and_speeds["baseline"] == "PyTorch loop"
    assert ratios_and_speeds["medians"] == {OURS: 100, "PyTorch loop": 80, "PyTorch bmm": 50}
    assert ratios_and_speeds["ratio"] == ratios_and_speeds["ratios"]["PyTorch loop"] == 1.5
    assert ratios_and_speeds["ratios"]["PyTorch bmm"] == 2.0
    row = table([{"title": "sparse", "tokens_per_second": speeds, **ratios_and_speeds}]).splitlines()[-1]
    assert row == "| sparse | 100 | loop 80, bmm 50 | **1.50** (1.00 to 2.00) |"


def test_losses_that_begin_elsewhere_or_do_not_fall_are_told():
    start = math.log(VOCABULARY)
    assert not complaints({"losses": {"a": [start, 8.0], "b": [start + 0.1, 7.0]}})
    assert len(complaints({"losses": {"a": [start, start + 1], "b": [2.0, 1.0]}})) == 2


@pytest.mark.parametrize("name", ["sparse4", "sparse16"])
def test_pytorch_is_given_the_routing_tables_that_the_product_draws(name, tmp_path):
    from pangu_sigma.model.build_model import build_model

    corpora = {n: tmp_path / f"{n}.jsonl" for n in ("code", "docs", "c_headers", "arithmetic")}
    values = configuration(VARIANTS[name], tmp_path, corpora).to_dict()
    values["model"] |= {"hidden": 8, "ffn": 8, "heads": 1}  # tables do not depend on the widths
    from pangu_sigma.config import config_from_dict

    config = config_from_dict(values)
    tables = global_tables(config)
    routers = build_model(config, VOCABULARY, 2, initialise=False).routers
    tokens = np.arange(BATCH * LENGTH, dtype=np.int32).reshape(BATCH, LENGTH)
    domain = np.arange(BATCH) % len(config.domains)
    assert tables.max() == VARIANTS[name].experts - 1
    for layer, router in enumerate(routers):
        ours = router.assign(tokens, domain, 0, np.arange(BATCH), True).reshape(BATCH, LENGTH)
        np.testing.assert_array_equal(tables[layer][domain[:, None], tokens], ours)


def test_a_server_answers_with_seconds_and_losses():
    pytest.importorskip("torch")
    command = [sys.executable, str(ROOT / "benchmarks" / "torch_pangu.py"), "--serve"]
    command += ["--layers", "2", "--hidden", "16", "--heads", "2", "--ffn", "16", "--vocab", "32", "--sequence", "8"]
    with Server("PyTorch", command) as server:
        answer = server.steps(2)
    assert server.parameters > 0
    assert len(answer["seconds"]) == len(answer["losses"]) == 2
    assert answer["losses"][0] == pytest.approx(math.log(32), abs=0.2)


def test_a_server_that_ends_is_told_with_what_it_said():
    with pytest.raises(ServerFailed, match="broken failed: .*no such thing"), Server(
        "broken", [sys.executable, "-c", "raise SystemExit('no such thing')"]
    ):
        pass
