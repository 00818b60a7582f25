"""The router comparison: every system has a configuration, the same active parameters, and a row in the table."""

from pathlib import Path

import pytest

from benchmarks.router_comparison import CONFIG, overrides, page
from benchmarks.router_systems import DOMAINS, SYSTEMS
from pangu_sigma.config import load_config, parameter_counts


def config(name: str):
    return load_config(CONFIG, overrides(name, 1, 8, Path("work") / name, dict.fromkeys(DOMAINS, Path("text.jsonl"))))


@pytest.mark.parametrize("name", list(SYSTEMS))
def test_a_token_meets_as_many_parameters_in_every_system(name):
    dense = parameter_counts(config("dense"), 4096).activated_per_token["code"]
    counts = parameter_counts(config(name), 4096)
    assert counts.activated_per_token["code"] == pytest.approx(dense, rel=0.02)  # a gate and more biases aside
    if name != "dense":
        assert counts.total == pytest.approx(parameter_counts(config("switch"), 4096).total, rel=0.01)


def test_unfinished_systems_are_left_out_and_spread_is_over_seeds():
    losses = dict.fromkeys(DOMAINS, 4.0)
    one = {"losses": losses, "imbalance": 1.5, "dropped": 0.1}
    other = {**one, "losses": {**losses, "code": 5.0}}
    record = {
        "machine": {"cores": 2, "cpu": "a processor", "python": "3.11", "mindspore": "2.9.0", "date": "today"},
        "steps": 600, "runs": 18, "finished": 3,
        "systems": {"dense": {"1": one}, "switch": {"1": one, "2": other}},
        "parameters": {"dense": (3_000_000, 3_000_000), "switch": (20_000_000, 3_000_000)},
        "router_ms": {"switch": 2.048},
        "tokens_per_second": {"switch": 2000.0},
    }  # fmt: skip
    text = page(record)
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "RRE (1 of 4 in the domain's group)" not in rows
    assert "| 4.000 |" in rows["dense"] and "±" not in rows["dense"]
    switch = rows[SYSTEMS["switch"].title]
    assert "4.500 ± 0.707" in switch and "**4.125 ± 0.177**" in switch and "| 0.100 | 1.00 |" in switch
    assert "| 2,000 |" in switch and "2,000" not in rows["dense"]
    assert "3 of 18 runs" in text
