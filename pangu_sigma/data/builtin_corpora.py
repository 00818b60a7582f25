"""Built-in corpora, the quickstart's four domains: from what every machine with Python has, without a download.

``code``: Python's standard library without its comments' licences and docstrings. ``docs``: those docstrings and the
language reference that ``help()`` prints. ``c_headers``: the C headers of Python, of NumPy and, where there are any, of
``/usr/include``. ``arithmetic``: generated problems with worked answers (``builtin_arithmetic``). The same machine
gives the same bytes; other versions of Python give other text.
"""

import ast
import importlib.util
import inspect
import json
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pangu_sigma.data.builtin_arithmetic import worksheets
from pangu_sigma.errors import UserError
from pangu_sigma.monitor.result_files import write_text
from rre.counted_random import key64

DOMAIN_BYTES = 1_500_000  # about the size of each domain
LEAST_BYTES = 200_000  # under it a domain could not be learned
_DOCUMENT_CHARS = 3000
# Tests, generated tables and bundled programs are no examples of how people write code.
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "ensurepip",
    "lib2to3",
    "turtledemo",
    "__pycache__",
}


def build(out_dir: str | Path) -> dict[str, Path]:
    """Write ``code.jsonl``, ``docs.jsonl``, ``c_headers.jsonl`` and ``arithmetic.jsonl`` (field ``text``), about 1.5 MB
    each.

    Returns the path of every domain. A file that already has this content is not touched. Raises UserError when this
    installation lacks the text of a domain, and where the files cannot be written.
    """
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {out_dir} cannot be made ({error.strerror}): choose another one") from error
    makers: dict[str, Callable[[], Iterator[str]]] = {
        "code": _code,
        "docs": _docs,
        "c_headers": _c_headers,
        "arithmetic": lambda: worksheets(seed=20230320),
    }
    paths = {}
    for name, maker in makers.items():
        path = out_dir / f"{name}.jsonl"
        documents = list(_limited(maker()))
        size = sum(len(text.encode("utf-8")) for text in documents)
        if size < LEAST_BYTES:
            raise UserError(
                f"this Python has only {size} bytes of text for the built-in domain '{name}'; "
                "install a complete Python 3.11 (with its headers) or name your own corpora"
            )
        content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
        if not path.is_file() or path.read_bytes() != content.encode("utf-8"):
            write_text(path, content)
        paths[name] = path
    return paths


def _limited(documents: Iterable[str]) -> Iterator[str]:
    """Documents until the domain is full."""
    size = 0
    for text in documents:
        size += len(text.encode("utf-8"))
        yield text
        if size >= DOMAIN_BYTES:
            return


def _mixed(files: Iterable[Path], root: Path) -> list[Path]:
    """Files in an order that follows from their names but mixes the folders, so that a cut takes a bit of
    everything.
    """
    return sorted(files, key=lambda file: (key64("builtin", file.relative_to(root).as_posix()), str(file)))


def _library_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (file for file in root.rglob("*.py") if _SKIPPED_FOLDERS.isdisjoint(file.relative_to(root).parts[:-1]))
    return _mixed(files, root)


def _parsed_library() -> Iterator[tuple[str, ast.Module]]:
    """(source, syntax tree) of every readable file of the standard library."""
    for file in _library_files():
        try:
            source = file.read_text(encoding="utf-8")
            yield source, ast.parse(source)
        except (UnicodeDecodeError, SyntaxError, OSError):
            continue  # a few old files are Latin-1, and one is wrong on purpose


def _docstring_nodes(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.Expr]]:
    """(owner, docstring expression) of module, classes and functions, in the order of the source."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, owners) and ast.get_docstring(node, clean=False)]
    for node in sorted(nodes, key=lambda node: node.body[0].lineno):
        yield node, node.body[0]


def _code() -> Iterator[str]:
    for source, tree in _parsed_library():
        lines = source.split("\n")
        for owner, expression in _docstring_nodes(tree):
            first, last = expression.lineno - 1, expression.end_lineno
            alone = len(owner.body) == 1 and not isinstance(owner, ast.Module)
            lines[first:last] = [None] * (last - first)
            if alone:  # a body must not become empty
                lines[first] = " " * expression.col_offset + "pass"
        text = "\n".join(line for line in lines if line is not None)
        yield from _grouped(_top_level_parts(_without_leading_comments(text, ("#",))))


def _without_leading_comments(text: str, signs: tuple[str, ...]) -> str:
    """Cut the comment block a file begins with: licences are the same everywhere and would be learned by heart."""
    lines = text.split("\n")
    start = 0
    while start < len(lines) and (not lines[start].strip() or lines[start].startswith(signs)):
        start += 1
    return "\n".join(lines[start:])


def _top_level_parts(text: str) -> list[str]:
    """Pieces of a program that begin at the margin after a blank line."""
    return re.split(r"\n{2,}(?=[^\s#})\]])", re.sub(r"\n{4,}", "\n\n\n", text))


def _grouped(parts: Iterable[str]) -> Iterator[str]:
    """Neighbouring parts joined to documents of about ``_DOCUMENT_CHARS``; scraps are left out."""
    pile: list[str] = []
    size = 0
    for part in parts:
        pile.append(part.strip("\n"))
        size += len(part)
        if size >= _DOCUMENT_CHARS:
            yield "\n\n".join(pile) + "\n"
            pile, size = [], 0
    if size > 200:
        yield "\n\n".join(pile) + "\n"


def _docs() -> Iterator[str]:
    yield from _topics()
    for _, tree in _parsed_library():
        texts = (_prose(inspect.cleandoc(ast.get_docstring(node, clean=False))) for node, _ in _docstring_nodes(tree))
        yield from _grouped(text for text in texts if len(text) >= 80)


def _topics() -> Iterator[str]:
    """The language reference behind ``help("if")`` and the like; a few systems package Python without it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics, key=lambda name: (key64("builtin", name), name)):
        yield from _grouped(_prose(topics[name]).split("\n\n"))


def _prose(text: str) -> str:
    """Documentation without its console sessions, which are code."""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(part for part in paragraphs if ">>>" not in part)


def _size(file: Path) -> int:
    """Bytes of a file, 0 for a link that leads nowhere."""
    return file.stat().st_size if file.is_file() else 0


def _c_headers() -> Iterator[str]:
    roots = [Path(sysconfig.get_paths()["include"]), Path(sysconfig.get_config_var("INCLUDEPY") or "")]
    numpy = importlib.util.find_spec("numpy")
    if numpy is not None and numpy.origin:
        roots += [Path(numpy.origin).parent / "core" / "include", Path(numpy.origin).parent / "_core" / "include"]
    roots.append(Path("/usr/include"))
    seen: set[Path] = set()
    for root in roots:
        if not root.is_absolute() or not root.is_dir():
            continue
        for file in _mixed(root.rglob("*.h"), root):
            # Beyond 100 KB a header is a generated table; under c++ it is another language.
            if file.resolve() in seen or "c++" in file.parts or not 0 < _size(file) < 100_000:
                continue
            seen.add(file.resolve())
            try:
                text = file.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            text = re.sub(r"\A\s*(/\*.*?\*/\s*|//[^\n]*\n\s*)+", "", text, flags=re.DOTALL)
            yield from _grouped(re.split(r"\n{2,}", text))
