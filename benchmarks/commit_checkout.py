"""A commit of this repository, installed into a folder of its own and run there by its command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
SOURCE, SITE, LOGS = "source", "site", "logs"
CORPORA = "build/quickstart"  # where configs/quickstart.yaml looks for them


class CommandFailed(Exception):
    """A command ended with an error; the message names it and holds the end of what it printed."""


@dataclass(frozen=True)
class Checkout:
    """An installed commit. `folder` is where its commands run; in it lie its source, its packages and its logs.

    `title` is its hash and subject, `kernels` the names of its compiled libraries.
    """

    folder: Path
    title: str
    kernels: tuple[str, ...]

    def run(self, name: str, words: Sequence[str]) -> None:
        """Run `pangu-sigma` with `words`. Raises CommandFailed."""
        output, log = self.output(name), self.folder / LOGS / f"{name}.log"
        with open(output, "wb") as stdout, open(log, "wb") as stderr:
            process = subprocess.run(
                self.command(words), cwd=self.folder, env=self.environment(), stdout=stdout, stderr=stderr
            )
        if process.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise CommandFailed(f"{self.title}: pangu-sigma {' '.join(words)} failed:\n" + "\n".join(lines[-10:]))

    def output(self, name: str) -> Path:
        """The file with what the command that ran under this name printed."""
        return self.folder / LOGS / f"{name}.out"

    def command(self, words: Sequence[str]) -> list[str]:
        """The command line of `pangu-sigma` with `words`; it belongs into `folder` and `environment`."""
        return [sys.executable, "-m", "pangu_sigma", *words]

    def environment(self) -> dict[str, str]:
        """This process's environment with the commit's packages before all others."""
        return {**os.environ, "PYTHONPATH": str(self.folder / SITE)}

    @contextmanager
    def moved_to(self, folder: Path) -> Iterator[Checkout]:
        """The checkout in another folder for the length of a `with` block.

        Files hold paths, and files with the hashes of others are hashed in turn: two commits that run one after the
        other in a folder of the same name write the same bytes.
        """
        self.folder.rename(folder)
        try:
            yield replace(self, folder=folder)
        finally:
            folder.rename(self.folder)

    def prepare_corpora(self, folder: Path) -> None:
        """Make the quickstart's corpora in `folder` if they are not there, and let the configuration find them."""
        if not folder.exists():
            self.run("corpora", ["corpora", "--out", str(folder)])
        link = self.folder / CORPORA
        link.parent.mkdir(parents=True)
        link.symlink_to(folder)


def add_checkout(folder: Path, commit: str | None) -> Checkout:
    """Install a commit, or the work tree for None, into a new folder. Raises CommandFailed."""
    (folder / LOGS).mkdir(parents=True)
    source, site = folder / SOURCE, folder / SITE
    if commit is None:
        _copy_work_tree(source)
    else:
        resolved = _output(
            ["git", "-C", str(ROOT), "rev-parse", "--verify", "--end-of-options", f"{commit}^{{commit}}"]
        )
        _output(["git", "clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(source)])
        _output(["git", "-C", str(source), "checkout", "--quiet", "--detach", resolved])
    title = _output(["git", "-C", str(ROOT), "log", "-1", "--format=%h %s", commit or "HEAD", "--"])
    # --target and PYTHONPATH leave the environment of this interpreter alone; an editable installation would not.
    _output([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(source)])
    (folder / "configs").symlink_to(Path(SOURCE, "configs"))
    kernels = tuple(sorted(path.name for path in site.rglob("*.so")))
    checkout = Checkout(folder, title if commit else f"work tree on {title}", kernels)
    imported = _output(
        [sys.executable, "-c", "import pangu_sigma; print(pangu_sigma.__file__)"], folder, checkout.environment()
    )
    if not Path(imported).is_relative_to(site):
        raise CommandFailed(f"{title}: pangu_sigma is imported from {imported} instead of {site}")
    return checkout


def common_overrides(overrides: Mapping[str, str], checkouts: Sequence[Checkout]) -> list[str]:
    """`key=value` of those overrides whose keys stand in the quickstart's configuration of all checkouts."""
    configs = []
    for checkout in checkouts:
        text = (checkout.folder / "configs/quickstart.yaml").read_text(encoding="utf-8")
        configs.append(yaml.safe_load(text))
    common = [key for key in overrides if all(_has_key(config, key) for config in configs)]
    if unknown := overrides.keys() - set(common):
        print(f"left as it is, because one commit lacks it: {', '.join(sorted(unknown))}", file=sys.stderr)
    return [f"{key}={overrides[key]}" for key in common]


def _has_key(config: object, key: str) -> bool:
    for word in key.split("."):
        if not isinstance(config, dict) or word not in config:
            return False
        config = config[word]
    return True


def _copy_work_tree(target: Path) -> None:
    """Copy all files that git tracks or would track, as they are now."""
    names = _output(["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"])
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():  # else it is deleted, and the deletion not yet committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def _output(command: Sequence[str], folder: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise CommandFailed(f"{' '.join(command)} failed:\n{process.stderr.strip()}")
    return process.stdout.strip()
