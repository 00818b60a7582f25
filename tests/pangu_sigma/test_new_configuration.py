"""`pangu-sigma init`: a file that loads and whose text is prepared, from whatever folders and files a user has."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pangu_sigma.cli import app
from pangu_sigma.config import load_config
from pangu_sigma.data.corpus import prepare_corpus
from pangu_sigma.errors import UserError
from pangu_sigma.new_configuration import write_configuration

WORDS = ("the", "quick", "brown", "fox", "jumps", "lazy", "dog", "court", "rose", "night", "wind", "judge", "sea")


def text(seed: int, paragraphs: int = 60) -> str:
    draw = random.Random(seed)
    return "\n\n".join(" ".join(draw.choice(WORDS) for _ in range(80)) for _ in range(paragraphs))


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A folder with a text file, a .jsonl file whose key is not text, and a folder of texts; the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Law of Sea.txt").write_text(text(1), encoding="utf-8")
    lines = [json.dumps({"id": str(i), "body": text(i, 2)}) for i in range(40)]
    (tmp_path / "news.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "poems/old").mkdir(parents=True)
    for index in range(20):
        (tmp_path / f"poems/old/{index}.txt").write_text(text(index, 3), encoding="utf-8")
    return tmp_path


def test_files_and_folders_become_domains_of_a_configuration_that_trains_as_it_stands(files, monkeypatch):
    made = write_configuration(Path("mine"), [Path("Law of Sea.txt"), Path("news.jsonl"), Path("poems")])
    monkeypatch.chdir(files.parent)  # paths hold from any folder
    config = load_config(made.path.absolute() if made.path.is_absolute() else files / made.path)
    assert config.domain_names == ("law_of_sea", "news", "poems") and config == made.config
    assert [domain.text_field for domain in config.domains] == ["text", "body", "text"]
    assert config.run.dir == str(files / "mine") and config.model.sparse_prefixes and config.train.steps == 100
    # The vocabulary is one that so little text can fill, and the text is tokenised already.
    assert config.data.tokenizer.vocab_size < 4096
    before = sorted((files / "mine/data").iterdir())
    corpus = prepare_corpus(config)
    assert sorted((files / "mine/data").iterdir()) == before
    assert {store.name: sum(store.tokens.values()) for store in corpus.stores} == made.tokens
    assert made.documents["poems"] == 20 and made.documents["news"] == 40


def test_equal_names_take_their_folders_in_front_and_reserved_ones_are_changed(files):
    for name in ("a", "b"):
        (files / name).mkdir()
        (files / name / "train.txt").write_text(text(len(name)) + name, encoding="utf-8")
    (files / "shared.txt").write_text(text(9), encoding="utf-8")
    made = write_configuration(Path("mine"), [Path("a/train.txt"), Path("b/train.txt"), Path("shared.txt")])
    assert made.config.domain_names == ("a_train", "b_train", "shared_text")


def test_short_text_has_short_sequences(files):
    lines = [json.dumps({"text": text(i, 1)[:150]}) for i in range(3)]
    Path("short.jsonl").write_text("\n".join(lines), encoding="utf-8")
    made = write_configuration(Path("mine"), [Path("news.jsonl"), Path("short.jsonl")])
    assert made.config.data.sequence_length < 256
    prepare_corpus(made.config)


def test_what_is_there_is_not_overwritten(files):
    Path("mine").mkdir()
    Path("mine/train.yaml").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="exists already"):
        write_configuration(Path("mine"), [Path("news.jsonl")])
    assert Path("mine/train.yaml").read_text(encoding="utf-8") == "mine"


def test_bad_input_is_one_sentence_and_code_2_and_leaves_nothing(files):
    Path("empty.txt").touch()
    Path("program.txt").write_bytes(b"\x7fELF\0\0")
    Path("latin.txt").write_bytes("é".encode("latin-1") * 9)
    Path("page.html").write_text("<p>")
    Path("news.txt").write_text(text(3))
    Path("nothing").mkdir()
    cases = {
        "missing.txt": "does not exist", "empty.txt": "is empty", "program.txt": "binary", "page.html": "neither",
        "nothing": "holds no .txt", "news.jsonl news.jsonl": "twice", "news.jsonl news.txt": "would both be the domain",
    }  # fmt: skip
    for data, sentence in cases.items():
        done = CliRunner().invoke(app, ["init", "mine", *data.split()])
        assert done.exit_code == 2 and sentence in done.output and done.output.count("\n") == 1, data
        assert not Path("mine").exists()
    for folder in ("poems", "poems/old/mine"):
        with pytest.raises(UserError, match=f"^{folder} lies in poems, .* own files .*: name a folder elsewhere$"):
            write_configuration(Path(folder), [Path("news.jsonl"), Path("poems")])
    assert not Path("poems/old/mine").exists()
    done = CliRunner().invoke(app, ["init", "mine", "latin.txt"])
    assert done.exit_code == 2 and "not UTF-8" in done.output


def test_the_command_says_what_it_assumes_and_what_it_dropped(files):
    lines = Path("news.jsonl").read_text(encoding="utf-8")
    Path("news.jsonl").write_text(lines + "\n" + lines.split("\n")[0] + '\n{"id": "", "body": " "}', encoding="utf-8")
    done = CliRunner().invoke(app, ["init", "mine", "news.jsonl"])
    assert done.exit_code == 0
    config = load_config(files / "mine/train.yaml")
    (store,) = prepare_corpus(config).stores
    passes = 100 * config.train.batch_size * config.data.sequence_length / store.tokens["train"]
    dropped = "news: 40 documents kept; dropped: 1 empty, 1 exact duplicates"
    parts = ("news", "body", f"  {passes:.1f}  ", dropped, "assumes a tiny model", "builds ", "trains 100 steps")
    for part in (*parts, "machine's speed"):
        assert part in done.output
