"""What the pages name is there: files, commands, their options, keys of the configuration."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel
from typer.main import get_command

from pangu_sigma.cli import app
from pangu_sigma.config import Config
from pangu_sigma.config.schema_versions import changed_name

ROOT = Path(__file__).parents[1]
PAGES = [page for folder in ("", "docs/", "benchmarks/results/") for page in sorted(ROOT.glob(f"{folder}*.md"))]
# Keys of MindFormers' own files that begin like ours.
THEIRS = {"model.model_config", "model.arch"}


def pages(test):
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))(test)


def links(page: Path) -> set[Path]:
    """The files that a page points to."""
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    return {(page.parent / target).resolve() for target in targets}


@cache
def commands() -> dict[tuple[str, ...], set[str]]:
    """Every command's words -> its options."""
    found = {}

    def visit(command, words: tuple[str, ...]) -> None:
        options = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        found[words] = options | {"--help"}
        for name, inner in getattr(command, "commands", {}).items():
            visit(inner, (*words, name))

    visit(get_command(app), ())
    return found


@cache
def keys() -> set[str]:
    """Every key of the configuration; items of a list are `[]`."""
    found = set()

    def models(annotation) -> list[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return [annotation]
        return [model for part in get_args(annotation) for model in models(part)]

    def visit(model: type[BaseModel], before: str) -> None:
        for name, field in model.model_fields.items():
            found.add(before + name)
            for inner in models(field.annotation):
                visit(inner, f"{before}{name}.")
                visit(inner, f"{before}{name}[].")

    visit(Config, "")
    return found


@pages
def test_files_that_a_page_points_to_exist(page):
    assert [str(path) for path in links(page) if not path.exists()] == []


def test_every_page_is_reached_from_the_readme():
    reached, ahead = set(), {ROOT / "README.md"}
    while ahead:
        page = ahead.pop()
        reached.add(page)
        ahead |= {path for path in links(page) if path.suffix == ".md"} - reached
    assert [str(page.relative_to(ROOT)) for page in PAGES if page not in reached] == []


def test_every_page_of_the_docs_has_its_place_in_the_sites_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    named = set(re.findall(r"- ([\w/]+\.md)$", menu, re.M))
    missing = {str(page.relative_to(ROOT)).removeprefix("docs/") for page in PAGES} - named
    assert not missing, f"add them to nav in mkdocs.yml: {sorted(missing)}"


@pages
def test_commands_and_options_that_a_page_names_exist(page):
    wrong = []
    for text in re.findall(r"(?:^|`)(?:python -m )?pangu[-_]sigma ([^`\n]*)", page.read_text(encoding="utf-8"), re.M):
        words = text.replace("[", " ").replace("\\|", "|").split()
        # `add/remove`, `evaluate|generate`: any of them; … and names in capitals stand for something.
        for first in re.split(r"[/|]", words[0]):
            if not re.fullmatch(r"[a-z][a-z-]*", first):
                continue
            inner = [(first, word) for word in words[1].split("|")] if len(words) > 1 else []
            named = [command for command in inner if command in commands()] or [(first,)]
            if named[0] not in commands():
                wrong.append(f"pangu-sigma {text}")
                continue
            known = set().union(*(commands()[command] for command in named))
            given = re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)
            wrong += [f"pangu-sigma {text}: {option}" for option in given if option not in known]
    assert wrong == []


@pages
def test_keys_that_a_page_names_exist(page):
    sections = {key.partition(".")[0] for key in keys() if "." in key}
    wrong = []
    for key in re.findall(r"`([a-z_]+\.[a-z_.*\[\]]*[a-z_*])(?:[:=][^`]*)?`", page.read_text(encoding="utf-8")):
        key = key.replace(".*.", "[].").removesuffix(".*")
        ours = key.split(".")[0].removesuffix("[]") in sections and key not in THEIRS
        # The changelog tells what keys were called before.
        old = page.name == "CHANGELOG.md" and changed_name(key) is not None
        if ours and not old and key not in keys() and not (ROOT / key).exists():
            wrong.append(key)
    assert wrong == []
