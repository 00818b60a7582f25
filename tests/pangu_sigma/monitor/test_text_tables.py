"""Results as text: aligned, the best marked, whatever the names are."""

import math

import pytest
from rich.cells import cell_len

from pangu_sigma.monitor import evaluation_line, matrix_table, quality_table, text_table
from pangu_sigma.monitor.text_tables import best_of_row


def test_quality_table():
    unigram, after, before = {"code": 6.5, "docs": 6.0}, {"code": 2.5, "docs": 7.0}, {"code": 8.9, "docs": 8.8}
    table = quality_table(unigram, after, before, tokens={"code": 4096})
    assert table.splitlines() == [
        "domain  unigram  before  after    gain  perplexity  tokens",
        "------  -------  ------  -----  ------  ----------  ------",
        "code      6.500   8.900  2.500  +4.000       12.18   4,096",
        "docs      6.000   8.800  7.000  -1.000    1,096.63       –",
    ]


def test_quality_table_without_before_and_with_missing_values():
    lines = quality_table({}, {"code": math.nan, "docs": 1e9}).splitlines()
    assert lines[0].split() == ["domain", "unigram", "loss", "gain", "perplexity"]
    assert lines[2].split() == ["code", "–", "–", "–", "–"]
    assert lines[3].split() == ["docs", "–", "1,000,000,000.000", "–", "inf"]


def test_matrix_marks_the_best_group_of_each_row():
    matrix = {"code": {"code": 2.0, "docs": 3.0}, "docs": {"code": 2.5, "docs": math.nan}}
    assert matrix_table(matrix).splitlines() == [
        "text \\ experts of   code    docs",
        "-----------------  ------  ------",
        "code               2.000*  3.000",
        "docs               2.500*      –",
        "* lowest loss of the row",
    ]


def test_a_wide_matrix_is_broken_into_tables_that_fit():
    names = [f"domain_{i}" for i in range(40)]
    text = matrix_table({a: {b: 1.0 + (a != b) for b in names} for a in names}, width=80)
    assert max(map(cell_len, text.splitlines())) <= 80
    assert text.count("*") == 41
    assert all(text.count(f"{name} ") >= 1 for name in names)


def test_best_of_row_with_ties_and_nothing_finite():
    assert best_of_row({"a": 1.0, "b": 1.0, "c": 2.0}) == {"a", "b"}
    assert best_of_row({"a": math.nan}) == set()


def test_columns_stay_in_line_with_wide_characters_and_hostile_names():
    lines = text_table(["域", "n"], [["法律文书", "1"], ["a\x1b[31m\nb", "22"]]).splitlines()
    assert len(lines) == 4 and len({cell_len(line) for line in lines}) == 1
    assert "\x1b" not in "".join(lines)
    with pytest.raises(ValueError):
        text_table(["a"], [["1", "2"]])


def test_evaluation_line_is_one_line_for_few_domains_and_wraps_for_many():
    assert evaluation_line(20, {"code": 2.0, "docs": 3.5}, {"code": 6.25}) == (
        "step 20 validation: code 2.000 (+4.25), docs 3.500"
    )
    lines = evaluation_line(20, {f"domain_{i}": 2.0 for i in range(40)}).splitlines()
    assert len(lines) > 5 and max(map(len, lines)) <= 100 + 1
