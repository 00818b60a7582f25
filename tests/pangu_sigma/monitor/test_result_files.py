"""Small result files are whole or not there, and a disk that takes none is one sentence."""

from __future__ import annotations

import json

import pytest

from pangu_sigma.errors import UserError
from pangu_sigma.monitor.result_files import write_json, write_text


def test_a_file_is_replaced_as_a_whole(tmp_path):
    for value in ({"old": 1}, {"new": "Σ"}):
        write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"new": "Σ"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_cannot_be_written_is_told_and_leaves_nothing(tmp_path):
    (tmp_path / "a.json" / "inside").mkdir(parents=True)
    with pytest.raises(UserError, match="a.json cannot be written .*: mend that, or name another folder"):
        write_text(tmp_path / "a.json", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(UserError, match="b.json cannot be written"):
        write_text(tmp_path / "gone" / "b.json", "text")


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")

    def full(path, text, **_):
        path.write_bytes(text[:1].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    (tmp_path / ".a.json.99999999").write_text("half")
    (tmp_path / ".a.json.1").write_text("half")
    write_json(tmp_path / "a.json", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.json.1", "a.json"]
