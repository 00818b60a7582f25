"""Smoothing, thinning, loads and charts say what their docstrings promise."""

import math
import re

import pytest

from pangu_sigma.report.expert_load_map import over_mean
from pangu_sigma.report.line_chart import Chart, ChartLine, line_chart, tick
from pangu_sigma.report.series import dropped_by_layer, every, expert_loads, smooth


def test_smoothing_keeps_a_constant_and_the_first_value():
    assert [v for _, v in smooth([(i, 2.0) for i in range(100)])] == pytest.approx([2.0] * 100)
    noisy = [(i, 5.0 + (-1) ** i) for i in range(400)]
    assert smooth(noisy)[0] == (0, 6.0)
    assert all(abs(v - 5) < 0.2 for _, v in smooth(noisy)[20:])


def test_a_short_curve_is_not_smoothed_and_gaps_are_left_out():
    assert smooth([(1, 4.0), (2, math.nan), (3, 2.0)]) == [(1, 4.0), (3, 2.0)]


def test_thinning_keeps_both_ends():
    points = [(i, math.sin(i / 50)) for i in range(10_000)]
    kept = every(points, 100)
    assert kept[0] == points[0] and kept[-1] == points[-1] and len(kept) <= 102
    assert every([]) == []


def test_loads_sum_the_last_quarter_and_follow_a_changed_group():
    records = [
        {"step": s, "expert_load": {"blocks.10": {"code": [s, 1]}, "blocks.9": {"code": [1]}}} for s in range(1, 9)
    ]
    assert expert_loads(records) == {"blocks.9": {"code": [2]}, "blocks.10": {"code": [15, 2]}}
    assert list(expert_loads(records)) == ["blocks.9", "blocks.10"]
    records.append({"step": 9, "expert_load": {"blocks.10": {"code": [1, 2, 3]}}})
    assert expert_loads(records)["blocks.10"] == {"code": [1, 2, 3]}
    assert expert_loads([{"step": 1}]) == {}
    assert over_mean([30, 10]) == [1.5, 0.5] and over_mean([0, 0]) == []


def test_dropped_share_is_the_mean_of_the_domains():
    assert dropped_by_layer([{"step": 5, "dropped_share": {"blocks.1": {"a": 0.1, "b": 0.3}}}, {"step": 6}]) == {
        "blocks.1": [(5, pytest.approx(0.2))]
    }


def test_axis_numbers():
    assert [tick(v) for v in (0, 0.25, 3, 1500, 20e6, 3e-4, -2)] == ["0", "0.25", "3", "1.5k", "20M", "3e-4", "-2"]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values", [[1.0], [0.0], [2.0, 2.0], [1e-9, 1e9], [-3.0, 5.0], [math.nan], [math.inf, 1.0, -math.inf], [1e300, 1.0]]
)
def test_any_values_make_a_chart_within_its_frame(values, log):
    chart = line_chart([ChartLine("x", list(enumerate(values)), marks=True)], Chart("x", log=log, end_labels=True))
    assert chart.svg.startswith("<svg") and chart.svg.endswith("</svg>")
    assert len(chart.rows) == len(values)
    paths = re.findall(r' d="(M [^"]*)" clip-path', chart.svg)
    numbers = [float(n) for path in paths for n in re.findall(r"-?[\d.]+", path)]
    assert numbers and all(-1 <= n <= 380 for n in numbers)


def test_many_names_at_the_ends_do_not_overlap():
    lines = [ChartLine(f"d{i}", [(0, 5.0), (10, 3.0 + i / 1000)]) for i in range(8)]
    svg = line_chart(lines, Chart("x", end_labels=True)).svg
    heights = sorted(float(y) for y in re.findall(r' y="([\d.]+)"[^>]*>d\d<', svg))
    assert len(heights) == 8 and heights[-1] <= 216
    assert all(b - a >= 12 for a, b in zip(heights, heights[1:], strict=False))


def test_a_value_that_is_not_finite_stands_in_the_table():
    points = [(step, math.nan if step == 333 else 1.0) for step in range(1000)]
    rows = line_chart([ChartLine("x", points)], Chart("x")).rows
    assert ["333", "nan"] in rows and len(rows) < 16
