import json

import pytest

from pangu_sigma.data.corpus_files import TEXT_DOCUMENT_CHARS, expand_paths, fingerprint_files, iterate_documents
from pangu_sigma.errors import UserError


def read(*files, text_field="text"):
    return list(iterate_documents("law", files, text_field))


def test_globs_are_expanded_in_sorted_order_and_no_file_comes_twice(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.txt").write_text("")
    files = expand_paths("law", [tmp_path / "c.txt", str(tmp_path / "*.jsonl"), str(tmp_path / "**" / "*.txt")])
    assert [file.name for file in files] == ["c.txt", "a.jsonl", "b.jsonl", "d.txt"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    (tmp_path / "x[1].txt").write_text("")
    assert [file.name for file in expand_paths("law", [tmp_path / "x[1].txt"])] == ["x[1].txt"]


def test_brackets_in_a_folder_that_exists_are_letters(tmp_path):
    for folder in ("set [1]", "set 1"):
        (tmp_path / folder / "deep").mkdir(parents=True)
        (tmp_path / folder / "deep" / "a.jsonl").write_text("")
    (tmp_path / "set [1]" / "b[2].jsonl").write_text("")

    def found(pattern):
        return [str(file.relative_to(tmp_path)) for file in expand_paths("law", [tmp_path / pattern])]

    assert found("set [1]/*/*.jsonl") == ["set [1]/deep/a.jsonl"]
    assert found("set [1]/**/*.jsonl") == ["set [1]/b[2].jsonl", "set [1]/deep/a.jsonl"]
    assert found("set [0-9]/deep/*.jsonl") == ["set 1/deep/a.jsonl"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["absent.jsonl"], "absent.jsonl does not exist"),
        (["*.absent"], "no file matches .*absent"),
        (["."], "is a folder"),
        (["notes.md"], "neither .jsonl nor .txt"),
        ([], "names no corpus file"),
    ],
)
def test_unusable_entries_are_refused_by_name(tmp_path, monkeypatch, entries, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(UserError, match=message) as caught:
        expand_paths("law", entries)
    assert "'law'" in str(caught.value)


def test_a_json_line_is_a_document_and_blank_lines_are_passed_over(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('\ufeff{"body": "eins\\r\\nzwei"}\n\n  \n{"body": ""}\r\n{"body": "漢字\\ud83d\\ude42"}', "utf-8")
    documents = read(file, text_field="body")
    assert [document.text for document in documents] == ["eins\nzwei", "", "漢字🙂"]
    assert [document.line for document in documents] == [1, 4, 5]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', ":2: the line is not valid JSON"),
        (b"[1]", ":2: the line is no JSON object"),
        (b'{"body": "x"}', r":2: the field 'text' is missing \(fields: body\); set text_field of domain 'law'"),
        (b'{"text": 3}', ":2: the field 'text' is no text but 3"),
        (b'{"text": null}', ":2: the field 'text' is no text but null;"),
        (b'{"text": [true]}', r":2: the field 'text' is no text but \[true\];"),
        (b'{"t10": 1, "t9": 1, "t1": 1}', r"\(fields: t1, t9, t10\)"),
        (b'{"text": "\\ud800"}', ":2: the text holds half a surrogate pair"),
        (b"[" * 100_000, ":2: the line is nested more than 64 levels deep"),
        (b'{"text": "\xff"}', "is not UTF-8"),
    ],
)
def test_a_bad_json_line_is_refused_with_file_and_line(tmp_path, line, message):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match="a.jsonl.*" + message.lstrip(":")):
        read(file)


def test_a_short_text_file_is_one_document(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\n")
    assert [document.text for document in read(file)] == ["one\n\ntwo\n"]


def test_a_long_text_file_is_cut_at_blank_lines_without_losing_a_character(tmp_path):
    text = "\n\n".join(f"Paragraph {index}. " + "word " * 60 for index in range(100)) + "\n"
    file = tmp_path / "book.txt"
    file.write_text(text)
    documents = read(file)
    assert "".join(document.text for document in documents) == text
    assert len(documents) > 5
    assert all(TEXT_DOCUMENT_CHARS <= len(document.text) < 2 * TEXT_DOCUMENT_CHARS for document in documents[:-1])
    assert all(document.text.startswith("Paragraph") for document in documents)


@pytest.mark.parametrize("text", ["line without blanks\n" * 5000, "no line end at all " * 5000])
def test_a_long_text_file_without_blank_lines_is_cut_too(tmp_path, text):
    file = tmp_path / "a.txt"
    file.write_text(text)
    documents = read(file)
    assert len(documents) > 1
    assert "".join(document.text for document in documents) == text


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    (tmp_path / "moved").mkdir()
    first, second = tmp_path / "a.jsonl", tmp_path / "moved" / "b.jsonl"
    first.write_text(json.dumps({"text": "x"}))
    second.write_text(json.dumps({"text": "x"}))
    before = fingerprint_files([first])
    assert fingerprint_files([second]) == before
    second.write_text(json.dumps({"text": "y"}))
    assert fingerprint_files([second]) != before
    with pytest.raises(UserError, match="gone.jsonl cannot be read"):
        fingerprint_files([tmp_path / "gone.jsonl"])
