"""What a run says at its start."""

from __future__ import annotations

import re
from pathlib import Path

from pangu_sigma.config import load_config
from pangu_sigma.plan.run_summary import run_summary, seconds_of_step

CONFIGS = Path(__file__).parents[3] / "configs"


def test_a_run_says_what_it_builds_and_what_is_left_to_do():
    builds, trains = run_summary(load_config(CONFIGS / "quickstart.yaml"), 4096, step=20)
    assert builds == (
        "builds 10.8M parameters, 3.1M active per token: 5 layers, 2 with experts; 4 domains: code, docs, c_headers, "
        "arithmetic"
    )
    assert trains.startswith("trains 200 steps of 2,048 tokens (409.6k in all); about ")
    assert re.search(r"about [\d.]+ GiB of memory and [\d.:]+( s)? at this machine's speed", trains)


def test_a_cluster_is_estimated_by_the_plan():
    assert 1 < seconds_of_step(load_config(CONFIGS / "pangu_alpha_13b.yaml"), 40000) < 1000
