"""Configuration files that come with the product: `configs/` of a clone, or what its wheel installed."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

FOLDER = "configs"
_CLONE = Path(__file__).parents[2] / FOLDER


def shipped_files() -> dict[str, Path]:
    """Name (`configs/quickstart.yaml`) -> file, sorted."""
    if (_CLONE / "quickstart.yaml").is_file():
        files = [*_CLONE.rglob("*")]
        return {f"{FOLDER}/{file.relative_to(_CLONE).as_posix()}": file for file in sorted(files) if file.is_file()}
    from importlib.metadata import PackageNotFoundError, files

    try:
        installed = files("pangu-sigma") or []
    except PackageNotFoundError:
        return {}
    marker = f"share/pangu-sigma/{FOLDER}/"
    named = {str(file).partition(marker)[2]: Path(str(file.locate())) for file in installed if marker in str(file)}
    return {f"{FOLDER}/{name}": path for name, path in sorted(named.items())}


def find_file(path: Path) -> Path:
    """The file at `path`; where there is none and `path` is one of `shipped_files`' names, that one."""
    if path.exists() or path.is_absolute() or path.parts[:1] != (FOLDER,):
        return path
    return shipped_files().get(path.as_posix(), path)


def listing() -> str:
    """A line for each configuration: its name and the first sentence of its first comment."""
    named = {name: file for name, file in shipped_files().items() if name.endswith(".yaml")}
    width = max(map(len, named), default=0)
    return "\n".join(f"{name:<{width}}  {_about(file)}" for name, file in named.items())


def _about(file: Path) -> str:
    comment = takewhile(lambda line: line.startswith("# "), file.read_text(encoding="utf-8").splitlines())
    return " ".join(line[2:] for line in comment).partition(". ")[0].rstrip(".:")
