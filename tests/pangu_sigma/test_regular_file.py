"""A named pipe or a device in a file's place is refused at once: nobody may ever write into it, or it never ends."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from pangu_sigma.checkpoint.tensor_file import open_plain
from pangu_sigma.config import load_config
from pangu_sigma.convert.ckpt_file import CkptFile
from pangu_sigma.convert.pangu_alpha_source import NumpyFile
from pangu_sigma.convert.safetensors_folder import open_folder
from pangu_sigma.convert.strategy_file import read_strategy
from pangu_sigma.data.corpus_files import expand_paths, fingerprint_files, iterate_documents, read_text_lines
from pangu_sigma.data.growing_file import GrowingFileReader, check_source
from pangu_sigma.data.tokenizers.tokenizer_registry import read_model
from pangu_sigma.errors import UserError
from pangu_sigma.generation.prompts import PromptSource
from pangu_sigma.new_configuration import write_configuration
from pangu_sigma.regular_file import regular


def opened(path: Path) -> None:
    with open_plain(path):
        pass


READERS = {
    "config.yaml": load_config,
    "corpus.jsonl": lambda path: expand_paths("code", [path]),
    "changed meanwhile.jsonl": lambda path: fingerprint_files([path]),
    "read.txt": lambda path: list(iterate_documents("code", [path])),
    "init.txt": lambda path: write_configuration(path.parent / "new", [path]),
    "task.jsonl": lambda path: read_text_lines(path, f"the task {path}", "name a file"),
    "prompts.txt": lambda path: PromptSource(file=path).read(),
    "tokenizer.model": lambda path: read_model(path, "sentencepiece"),
    "model.safetensors": opened,
    "weights.ckpt": CkptFile,
    "strategy.ckpt": read_strategy,
    "embedding.npy": lambda path: NumpyFile(path, "x"),
    "stream.jsonl": lambda path: check_source(str(path), "-", print),
    "resumed stream.jsonl": GrowingFileReader,
}


@pytest.fixture(autouse=True)
def at_once():
    """A read that waits for ever ends as a failure."""

    def give_up(*_: object) -> None:
        raise TimeoutError("it waits for the pipe")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", READERS)
def test_a_named_pipe_is_refused_at_once(name, tmp_path):
    path = tmp_path / name
    os.mkfifo(path)
    with pytest.raises(UserError) as refusal:
        READERS[name](path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_shards_of_an_import_are_regular_files(tmp_path):
    os.mkfifo(tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(UserError, match="named pipe"):
        open_folder(tmp_path)


def test_devices_and_sockets_are_named_as_what_they_are(tmp_path):
    with pytest.raises(OSError, match="it is a device"):
        regular(Path("/dev/zero"))
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        with pytest.raises(OSError, match="it is a socket"):
            regular(path)
    assert regular(tmp_path) == tmp_path and regular(tmp_path / "missing") == tmp_path / "missing"
