"""Small models to convert, and a tokenizer for them."""

import os

os.environ.setdefault("GLOG_v", "4")

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from pangu_sigma import runtime
from pangu_sigma.checkpoint import Fingerprints, StreamedCheckpoint, TensorSpec, write_model_folder
from pangu_sigma.config import config_from_dict, effective, tensor_shapes
from pangu_sigma.convert.converted_folder import new_specs
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.data.tokenizers.tokenizer_training import train_tokenizer
from pangu_sigma.tensor_names import is_routing, parse_name
from rre.counted_random import generator
from rre.router_specs import LAYER
from rre.routing_tables import draw_table
from tests.text_domain import text_domain

SIZES = {"layers": 3, "hidden": 16, "heads": 2, "ffn": 32, "positions": 16}
VOCAB = 384


@pytest.fixture(scope="session", autouse=True)
def graph_mode() -> None:
    # Before a test makes a tensor: the device cannot be set afterwards.
    runtime.prepare("CPU")


@pytest.fixture(scope="session")
def published() -> Path:
    """The folder of PanGu-α's published strategy files and tokenizer."""
    folder = Path(__file__).parents[4] / "shared/data/pangu_alpha"
    if not folder.is_dir():
        pytest.skip("PanGu-α's published files are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def pieces(corpora) -> Tokenizer:
    """A trained SentencePiece tokenizer of 384 pieces."""
    sources = [text_domain(n, (str(corpora / f"{n}.jsonl"),), "text") for n in ("code", "law")]
    return train_tokenizer(sources, VOCAB)


@pytest.fixture(scope="session")
def vocab_model(pieces, tmp_path_factory) -> Path:
    """Its `.model` file."""
    folder = tmp_path_factory.mktemp("pieces")
    pieces.save(folder)
    return folder / "tokenizer.model"


def configuration(folder: Path, tokenizer: Path, corpora: Path, model: dict | None = None, groups: dict | None = None):
    """An effective configuration of the small model, dense unless `model` says otherwise."""
    groups = groups or {"code": 1}
    return effective(
        config_from_dict(
            {
                "schema_version": 2,
                "run": {"dir": str(folder)},
                "model": {"vocab_size": VOCAB, **SIZES, **(model or {})},
                "domains": [
                    {"name": name, "data": [str(corpora / f"{name}.jsonl")], "experts": n} for name, n in groups.items()
                ],
                "data": {"sequence_length": 16, "tokenizer": {"kind": "sentencepiece", "path": str(tokenizer)}},
                "optimizer": {"learning_rate": 1e-3},
                "train": {"steps": 2, "batch_size": 2},
            }
        )
    )


def random_model(out: Path, config, tokenizer: Tokenizer, bad: str | None = None) -> Path:
    """A model folder with random weights and the tables of a new model; a value of the tensor `bad` is infinite."""
    targets = tensor_shapes(config, config.model.vocab_size)
    groups = config.expert_groups
    experts = groups | {LAYER: sum(groups.values())}

    def read(spec: TensorSpec) -> np.ndarray:
        if is_routing(spec.name):
            layer_name, owner = parse_name(spec.name).layer, parse_name(spec.name).owner
            counts = np.arange(spec.shape[0])[::-1] ** 2
            table = config.model.sparse.table
            return draw_table(table, 7, layer_name, owner, spec.shape[0], experts[owner], counts)
        values = generator(3, spec.name).standard_normal(spec.shape, np.float32) * np.float32(0.3)
        if spec.name == bad:
            values.flat[values.size // 2] = np.inf
        return values + np.float32(1.0) if spec.name.endswith("gamma") else values

    write_model_folder(
        out,
        StreamedCheckpoint(
            tensors=new_specs(targets),
            read=read,
            domains=config.domain_names,
            coverage=config.coverage,
            config_text=config.to_yaml(),
            tokenizer_files=tokenizer.files(),
            state={},
            fingerprints=Fingerprints(tokenizer=tokenizer.fingerprint, corpora={}),
            probe={name: np.arange(34, dtype=np.int32).reshape(2, 17) for name in groups},
            step=7,
        ),
    )
    return out


@pytest.fixture(scope="session")
def dense(pieces, vocab_model, corpora, tmp_path_factory) -> Path:
    """A dense model's folder; treat it as read-only."""
    out = tmp_path_factory.mktemp("dense") / "model"
    return random_model(out, configuration(out, vocab_model, corpora), pieces)


@pytest.fixture
def sparse_yaml(tmp_path, vocab_model, corpora) -> Callable[..., Path]:
    """(what differs in `model`, expert groups) -> the file of a sparse configuration that fits the dense model."""

    def write(model: dict | None = None, groups: dict | None = None) -> Path:
        changes = {"sparse": {"layers": 2, "include_query_layer": True}, **(model or {})}
        config = configuration(tmp_path / "sparse", vocab_model, corpora, changes, groups or {"code": 3, "law": 2})
        path = tmp_path / "sparse.yaml"
        path.write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def logits() -> Callable[[Path, str, np.ndarray], np.ndarray]:
    """(model folder, domain, tokens int32 [S]) -> logits [S, V] of the real model, its graph compiled once a folder."""
    from pangu_sigma.model.scoring import Scorer
    from pangu_sigma.trained_model import load_trained

    built = {}

    def run(folder: Path, domain: str, tokens: np.ndarray) -> np.ndarray:
        if folder not in built:
            built[folder] = Scorer(load_trained(folder).model, 1)
        scorer = built[folder]
        ids = np.append(tokens, 0)[None].astype(np.int32)
        return scorer.logits(ids, [scorer.model.groups.names.index(domain)]).asnumpy()[0]

    return run
