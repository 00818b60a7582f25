"""Corpus files: which files a domain's entry names, and the documents inside them, one at a time.

A ``.jsonl`` line is a document. A ``.txt`` file is a document too, unless it is long: then a document ends at the first
blank line after ``TEXT_DOCUMENT_CHARS``, so that a book can be split into training and held-out parts.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pangu_sigma.errors import UserError
from pangu_sigma.json_reader import LARGE, UnreadableText, parse_object
from pangu_sigma.regular_file import regular
from pangu_sigma.wording import listed, shown

TEXT_DOCUMENT_CHARS = 4096  # a .txt file is cut at the first blank line after this many characters
_LINE_LIMIT = 16 * TEXT_DOCUMENT_CHARS  # no line is read in longer pieces: a file without newlines must still stream


@dataclass(frozen=True)
class Document:
    """One document: its ``text``, the ``file`` and 1-based ``line`` where it begins, and its repository's ``stars``,
    None where no field tells them."""

    text: str
    file: Path
    line: int
    stars: float | None = None


def expand_paths(name: str, data: Sequence[str | Path]) -> list[Path]:
    """The files of domain ``name``: entries in the given order, each glob's matches sorted, no file twice.

    Raises UserError when an entry is missing, is no regular file, matches nothing, or is neither ``.jsonl`` nor
    ``.txt``.
    """
    files: dict[Path, None] = {}
    for entry in data:
        path = Path(os.path.expanduser(str(entry)))
        if path.is_dir():
            raise UserError(f"domain '{name}': {entry} is a folder; name its files, for example {path / '*.jsonl'}")
        if path.exists():
            matches = [path]
        elif glob.has_magic(str(path)):
            matches = [Path(m) for m in sorted(glob.glob(_pattern(path), recursive=True)) if os.path.isfile(m)]
            if not matches:
                raise UserError(f"domain '{name}': no file matches {entry}; check the pattern and the current folder")
        else:
            raise UserError(f"domain '{name}': the file {entry} does not exist; check its path and the current folder")
        for match in matches:
            if not match.is_file():
                raise UserError(
                    f"domain '{name}': {match} is a pipe or a device and no regular file; name a file, or pipe "
                    "documents in and learn from them as data.stream"
                )
            if match.suffix.lower() not in (".jsonl", ".txt"):
                raise UserError(
                    f"domain '{name}': {match} is neither .jsonl nor .txt; convert it or narrow the pattern"
                )
            files[match.resolve()] = None
    if not files:
        raise UserError(f"domain '{name}' names no corpus file: name at least one")
    return list(files)


def _pattern(path: Path) -> str:
    """The glob of an entry. Its leading folders that exist as they are written are meant so, [ and ] in them too."""
    literal = next(folder for folder in path.parents if folder.is_dir())
    return os.path.join(glob.escape(str(literal)), path.relative_to(literal))


def fingerprint_files(files: Sequence[Path]) -> str:
    """sha256 (hex) of the files' contents and kinds in order; where the files lie does not matter."""
    total = hashlib.sha256()
    for file in files:
        try:
            with open(regular(file), "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); check that it exists and its rights") from error
        total.update(f"{file.suffix.lower()}:{digest}\n".encode())
    return total.hexdigest()


def stat_files(files: Sequence[Path]) -> tuple[tuple[int, int], ...]:
    """(bytes, modification time in ns) of every file: a cheap test of "nobody wrote here in the meantime"."""
    return tuple((stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for file in files))


def iterate_documents(
    name: str, files: Sequence[Path], text_field: str = "text", stars_field: str | None = None
) -> Iterator[Document]:
    """Stream the documents of domain ``name`` in the order of ``files``, one in memory at a time.

    Line ends become ``\\n`` and a byte order mark is dropped. Blank lines of a ``.jsonl`` file are passed over. Empty
    documents are handed on: the caller counts them.
    Raises UserError with file and line for bytes that are not UTF-8, a line that is not a JSON object, a missing
    field, a field that is no string, and text with half a surrogate pair (which no tokenizer can encode).
    """
    for file in files:
        if file.suffix.lower() == ".jsonl":
            yield from _jsonl_documents(name, file, text_field, stars_field)
        else:
            yield from _text_documents(file)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """(1-based number, line with its ``\\n``) of a UTF-8 file; a ``.txt`` line beyond the limit comes in several
    pieces.
    """
    limit = _LINE_LIMIT if file.suffix.lower() == ".txt" else -1
    line_number = 1
    try:
        with open(regular(file), encoding="utf-8-sig") as stream:
            while line := stream.readline(limit):
                yield line_number, line
                line_number += line.endswith("\n")
    except UnicodeDecodeError as error:
        where = f"near line {line_number}"  # the decoder reads ahead in blocks, so the line is approximate
        raise UserError(f"{file}: {where} is not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); check that it exists and its rights") from error


def _jsonl_documents(name: str, file: Path, text_field: str, stars_field: str | None) -> Iterator[Document]:
    for line_number, line in _lines(file):
        if line.strip():
            record = json_object(line, f"{file}:{line_number}", document_form(text_field))
            text = text_of(record, f"{file}:{line_number}", text_field, f"set text_field of domain '{name}'")
            stars = None if stars_field is None else _stars(record, f"{file}:{line_number}", stars_field, name)
            yield Document(text, file, line_number, stars)


def _stars(record: dict, where: str, field: str, name: str) -> float:
    """A repository's stars. None are 0, as in the data that the rule comes from: StarCoder's makers count a null of The
    Stack so, where most files have one."""
    stars = record.get(field)
    if stars is None and field in record:
        return 0.0
    if isinstance(stars, bool) or not isinstance(stars, int | float):
        what = "is missing" if field not in record else "is no number"
        raise UserError(f"{where}: the field '{field}' {what}; write the stars there, or set stars_field of '{name}'")
    return float(stars)


def document_form(text_field: str) -> str:
    """What a line with a document looks like, for a sentence."""
    return f'{{"{text_field}": "…"}}'


def json_object(line: str, where: str, form: str) -> dict:
    """The JSON object of a line of a .jsonl file.

    Raises UserError for anything else, which begins with ``where`` and says to write ``form``.
    """
    try:
        return parse_object(line, LARGE, lenient=True)
    except UnreadableText as error:
        raise UserError(f"{where}: the line is {error.problem}; write {form}") from error


def text_of(record: dict, where: str, text_field: str, advice: str) -> str:
    """The text of a document, line ends as ``\\n``. Raises UserError with ``advice`` where the field is missing."""
    if text_field not in record:
        known = listed(record, 8) or "none"
        raise UserError(f"{where}: the field '{text_field}' is missing (fields: {known}); {advice}")
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(f"{where}: the field '{text_field}' is no text but {shown(text)}; it must hold text")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if has_lone_surrogate(text):
        raise UserError(f"{where}: the text holds half a surrogate pair (\\ud800–\\udfff alone); repair the line")
    return text


def _text_documents(file: Path) -> Iterator[Document]:
    """Cut at the first blank line after the limit, after four times as much at any line end; an endless line is cut at
    `_LINE_LIMIT`."""
    pieces: list[str] = []
    size = 0
    first = 1
    for line_number, line in _lines(file):
        if not pieces:
            first = line_number
        pieces.append(line)
        size += len(line)
        blank = not line.strip()
        if (size >= TEXT_DOCUMENT_CHARS and blank) or size >= 4 * TEXT_DOCUMENT_CHARS:
            yield Document("".join(pieces), file, first)
            pieces, size = [], 0
    if pieces:
        yield Document("".join(pieces), file, first)


def has_lone_surrogate(text: str) -> bool:
    """Python strings may hold surrogate code points (JSON's ``\\ud800``); UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def json_lines(file: Path, called: str, advice: str) -> list[tuple[int, str]]:
    """(1-based number, line) of a small .jsonl file, without its blank lines. Raises as `read_text_lines` does."""
    return [(n, line) for n, line in enumerate(read_text_lines(file, called, advice), 1) if line.strip()]


def read_text_lines(file: Path, called: str, advice: str) -> list[str]:
    """The lines of a small UTF-8 file, without a last empty one; none of an empty file.

    Raises UserError where it cannot be read: `called` names it in the sentence, `advice` says what to do.
    """
    try:
        lines = regular(file).read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{called} cannot be read ({error.strerror}); {advice}") from error
    if lines[-1] == "":
        lines.pop()
    return lines
