"""A small corpus of real text, a tokenizer trained on it, and stores of known content."""

import ast
import inspect
import json
import textwrap
import typing
from pathlib import Path

import numpy as np
import pytest

from pangu_sigma.config.data_section import DomainConfig
from pangu_sigma.data.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from pangu_sigma.data.tokenizers.tokenizer_training import train_tokenizer
from tests.text_domain import text_domain


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def code_texts() -> list[str]:
    """Functions of the standard library, as different documents."""
    texts = []
    for module in (inspect, json, textwrap, typing):
        source = inspect.getsource(module)
        nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
        lines = source.split("\n")
        texts += ["\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in nodes if len(node.body) > 1]
    return sorted(set(texts))


@pytest.fixture(scope="session")
def code_source(code_texts, tmp_path_factory) -> DomainConfig:
    return text_domain("code", [write_jsonl(tmp_path_factory.mktemp("corpus") / "code.jsonl", code_texts)])


@pytest.fixture(scope="session")
def tokenizer(code_source):
    return train_tokenizer([code_source], 512)


@pytest.fixture
def make_store(tmp_path):
    """make_store(name, documents of ids without end, vocab_size=100, eod_id=99) → IndexedDataset"""

    def make(name: str, documents: list, vocab_size: int = 100, eod_id: int = 99) -> IndexedDataset:
        with IndexedDatasetBuilder(tmp_path / name, vocab_size, eod_id) as writer:
            for ids in documents:
                writer.add(np.asarray(ids, dtype=np.int64))
        return IndexedDataset(tmp_path / name)

    return make
