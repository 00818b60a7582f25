"""The benchmark of cluster compiles sets domain placement beside the same experts under global placement."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.plan_compile import CONFIGS, table, variants

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "plan_compile"


def test_a_domain_placement_is_compared_with_the_global_one_of_the_same_experts():
    by_placement = variants("pangu_sigma_1085b")
    assert [c.parallel.mesh.exchange_size for c in by_placement.values()] == [8, 64]
    # One domain a step in each of 8 groups, or 8 domains a step anywhere.
    assert [c.data.max_domains_per_batch for c in by_placement.values()] == [1, 8]
    assert list(variants("pangu_alpha_13b")) == ["global"]


def test_every_shipped_cluster_configuration_is_measured():
    shipped = (Path(__file__).parents[2] / "configs").glob("*.yaml")
    assert set(CONFIGS) == {p.stem for p in shipped if p.stem.startswith(("pangu_", "eight_"))}


def test_the_table_is_the_one_of_the_stored_figures():
    stored = json.loads(RESULTS.with_suffix(".json").read_text(encoding="utf-8"))
    assert table(stored["rows"], stored["machine"]) == RESULTS.with_suffix(".md").read_text(encoding="utf-8")
    biggest = [row for row in stored["rows"] if row["configuration"] == "pangu_sigma_1085b"]
    assert {row["placement"]: row["exchange_ranks"] for row in biggest} == {"domain": 8, "global": 64}
