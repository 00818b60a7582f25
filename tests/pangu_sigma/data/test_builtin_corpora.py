import json
import re
from itertools import islice

import pytest

from pangu_sigma.data import builtin_corpora
from pangu_sigma.data.builtin_arithmetic import worksheets
from pangu_sigma.data.builtin_corpora import build
from pangu_sigma.data.deduplication import Deduplicator
from pangu_sigma.errors import UserError


def test_four_domains_are_built_from_this_python_and_stay_as_they_are(tmp_path):
    paths = build(tmp_path)
    assert list(paths) == ["code", "docs", "c_headers", "arithmetic"]
    texts = {
        name: [json.loads(line)["text"] for line in path.read_text("utf-8").split("\n")[:-1]]
        for name, path in paths.items()
    }
    for name, path in paths.items():
        assert 200_000 < path.stat().st_size < 3_000_000, name
        assert len(texts[name]) > 50, name
        assert all(text.strip() for text in texts[name])
    assert sum("def " in text for text in texts["code"]) > 0.8 * len(texts["code"])
    assert sum("#define" in text or "PyAPI" in text for text in texts["c_headers"]) > 0.3 * len(texts["c_headers"])
    assert not set(texts["code"]) & set(texts["docs"])
    # the same bytes again, and an unchanged file is not written anew
    before = {name: (path.read_bytes(), path.stat().st_mtime_ns) for name, path in paths.items()}
    build(tmp_path)
    assert {name: (path.read_bytes(), path.stat().st_mtime_ns) for name, path in paths.items()} == before


def test_the_generated_sums_are_right_and_no_two_sheets_alike():
    sheets = list(islice(worksheets(seed=1), 500))
    checked = 0
    for left, sign, right, result in re.findall(
        r"(?<![-+*] )(?<![\d-])(\d+) ([-+*]) (-?\d+) = (-?\d+)$", "\n".join(sheets), re.MULTILINE
    ):
        expected = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign]
        checked += 1
        assert expected == int(result)
    assert checked > 1000
    assert not any(Deduplicator("near").duplicates(sheets))
    assert list(islice(worksheets(seed=1), 500)) == sheets
    assert list(islice(worksheets(seed=2), 3)) != sheets[:3]


def test_an_installation_without_enough_text_is_refused_by_domain(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin_corpora, "LEAST_BYTES", 10**9)
    with pytest.raises(UserError, match="bytes of text for the built-in domain 'code'"):
        build(tmp_path)


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="taken cannot be made .*: choose another one"):
        build(tmp_path / "taken")
