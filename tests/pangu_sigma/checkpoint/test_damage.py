"""Every kind of damage is refused, and the message names the file."""

import os
import re
import shutil
from pathlib import Path

import pytest

from pangu_sigma.checkpoint import CheckpointError, find_latest, open_checkpoint, resolve

FILES = (
    "shared.safetensors",
    "domains/code.safetensors",
    "domains/law.safetensors",
    "optimizer/shared.safetensors",
    "optimizer/domains/code.safetensors",
    "optimizer/domains/law.safetensors",
    "probe.safetensors",
    "config.yaml",
    "state.json",
    "tokenizer/tokenizer.model",
    "manifest.json",
)


def read_all(folder: Path) -> None:
    """What a resume reads: everything, by the ways that other code uses."""
    checkpoint = open_checkpoint(folder)
    checkpoint.load()
    checkpoint.probe()
    checkpoint.tokenizer_files()
    assert checkpoint.config_text and checkpoint.state


def assert_refused(folder: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(str(folder / name))) as caught:
        read_all(folder)
    assert "another checkpoint" in str(caught.value)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_the_list_of_files_is_complete(folder):
    assert sorted(FILES) == sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    read_all(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_anywhere_is_refused(folder, name):
    size = (folder / name).stat().st_size
    for position in {0, 9, size // 3, size // 2, size - 1} & set(range(size)):
        flip(folder / name, position)
        assert_refused(folder, name)
        if name != "manifest.json":
            with pytest.raises(CheckpointError, match=re.escape(str(folder / name))):
                open_checkpoint(folder).verify()
        flip(folder / name, position)
    read_all(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["truncated", "longer", "missing", "link", "folder"])
def test_a_file_that_is_not_itself_is_refused(folder, name, harm):
    path = folder / name
    if harm == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    elif harm == "longer":
        path.write_bytes(path.read_bytes() + b"\0")
    else:
        path.rename(folder / "aside")
    if harm == "link":
        path.symlink_to(folder / "aside")
    elif harm == "folder":
        path.mkdir()
    # without its manifest a folder is an unfinished checkpoint, and is named as a whole
    assert_refused(folder, "" if (name, harm) == ("manifest.json", "missing") else name)


def test_files_swapped_between_domains_are_refused(tmp_path, make, save):
    groups = {"code": 4, "math": 4}
    folder = save(tmp_path, 1, make(groups=groups), groups=groups).path
    code, math = folder / "domains/code.safetensors", folder / "domains/math.safetensors"
    assert code.stat().st_size == math.stat().st_size
    code.rename(folder / "aside")
    math.rename(code)
    (folder / "aside").rename(math)
    assert_refused(folder, "domains/code.safetensors")


def test_a_file_of_another_step_is_refused(tmp_path, make, save):
    one, other = save(tmp_path, 1, make(1)).path, save(tmp_path, 2, make(2)).path
    shutil.copyfile(one / "domains/law.safetensors", other / "domains/law.safetensors")
    assert_refused(other, "domains/law.safetensors")


def test_a_file_that_shrinks_after_opening_is_refused(folder):
    checkpoint = open_checkpoint(folder)
    os.truncate(folder / "shared.safetensors", (folder / "shared.safetensors").stat().st_size - 4)
    with pytest.raises(CheckpointError, match=r"shared.safetensors is damaged: it ends inside tensor"):
        checkpoint.load()


def test_a_linked_folder_on_the_way_is_refused(folder):
    (folder / "domains").rename(folder.parent / "elsewhere")
    (folder / "domains").symlink_to(folder.parent / "elsewhere")
    assert_refused(folder, "domains/code.safetensors")


def test_a_damaged_last_checkpoint_is_named_and_not_passed_over(tmp_path, make, save):
    save(tmp_path, 1, make(1))
    newest = save(tmp_path, 2, make(2)).path
    os.truncate(newest / "shared.safetensors", 100)
    for find in (find_latest, resolve):
        with pytest.raises(CheckpointError, match=re.escape(str(newest / "shared.safetensors"))):
            find(tmp_path)


def test_a_changed_tokenizer_or_corpus_is_refused_by_name(folder):
    checkpoint = open_checkpoint(folder)
    checkpoint.check_fingerprints(tokenizer="t1", corpora={"law": "law-1", "new": "x"})
    with pytest.raises(CheckpointError, match="tokenizer"):
        checkpoint.check_fingerprints(tokenizer="t2", corpora={})
    with pytest.raises(CheckpointError, match="corpus of domain law"):
        checkpoint.check_fingerprints(tokenizer="t1", corpora={"code": "code-1", "law": "law-2"})
