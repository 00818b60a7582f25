"""Shipped configurations are found by their name from any folder, the user's own first."""

from __future__ import annotations

from pathlib import Path

from pangu_sigma.config import load_config
from pangu_sigma.config.shipped_files import find_file, listing, shipped_files


def test_a_shipped_configuration_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/quickstart.yaml").run.dir == str(tmp_path / "runs/quickstart")
    assert "configs/lifelong/quickstart.yaml" in shipped_files()
    assert find_file(Path("configs/none.yaml")) == Path("configs/none.yaml")


def test_the_users_own_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/quickstart.yaml").touch()
    assert find_file(Path("configs/quickstart.yaml")) == Path("configs/quickstart.yaml")


def test_the_list_says_what_each_is_for():
    lines = listing().splitlines()
    assert all(len(line.split("  ", 1)[1].strip()) > 20 for line in lines)
    assert any(line.startswith("configs/quickstart.yaml ") for line in lines)
