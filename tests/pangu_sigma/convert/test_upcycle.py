"""Upcycling: before any training the sparse model is the dense one, and a converter that does not fit says why."""

import tracemalloc

import numpy as np
import pytest

from pangu_sigma.checkpoint import open_checkpoint
from pangu_sigma.convert.upcycle import upcycle
from pangu_sigma.errors import UserError
from pangu_sigma.model.initialization import initial_value
from pangu_sigma.trained_model import stored_config
from rre.routing_tables import draw_table
from tests.oracles.routers_numpy import softmax
from tests.pangu_sigma.convert.conftest import VOCAB, configuration, random_model

GROUPS = {"code": 3, "law": 2}
LAYER_NAMES = ("blocks.1", "query_layer")
PARTS = ("up.weight", "up.bias", "down.weight", "down.bias")


@pytest.fixture
def upcycled(dense, sparse_yaml, tmp_path):
    return upcycle(dense, sparse_yaml(), tmp_path / "out").checkpoint


def test_every_tensor_starts_where_it_should(upcycled, dense):
    upcycled.verify()
    old, new = open_checkpoint(dense).load(), upcycled.load()
    expected = {
        name: array for name, array in old.items() if not name.startswith(tuple(f"{p}.feed" for p in LAYER_NAMES))
    }
    for domain, size in GROUPS.items():
        for layer_name in LAYER_NAMES:
            for part in PARTS:
                source = old[f"{layer_name}.feed_forward.{part}"]
                expected[f"domains.{domain}.{layer_name}.experts.{part}"] = np.stack([source] * size)
            table = draw_table("uniform", 1234, layer_name, domain, VOCAB, size, None)
            expected[f"domains.{domain}.{layer_name}.routing"] = table
    assert new.keys() == expected.keys()
    for name, array in expected.items():
        assert new[name].dtype == array.dtype and new[name].tobytes() == array.tobytes(), name


def test_logits_are_the_dense_models_in_every_domain(upcycled, dense, logits):
    tokens = np.random.default_rng(0).integers(3, VOCAB, 16)
    expected = logits(dense, "code", tokens)
    for domain in GROUPS:
        np.testing.assert_allclose(logits(upcycled.path, domain, tokens), expected, atol=1e-6, rtol=0)


def test_the_folder_says_what_it_is(upcycled, dense):
    config = stored_config(upcycled)
    assert config.model.sparse.layers == 2 and config.model.vocab_size == VOCAB
    assert upcycled.coverage == {layer_name: GROUPS for layer_name in LAYER_NAMES}
    origin = upcycled.state["origin"]
    assert (origin["job"], origin["sha256"], origin["step"]) == ("upcycle", open_checkpoint(dense).sha256, 7)
    # the dense model's held-out sequences of a domain are in the same tokens
    assert upcycled.probe().keys() == {"code"}
    assert upcycled.tokenizer_files() == open_checkpoint(dense).tokenizer_files()


def test_every_domain_may_have_its_own_embedding(dense, sparse_yaml, tmp_path, logits):
    done = upcycle(dense, sparse_yaml({"domain_parameters": {"embedding": "own"}}), tmp_path / "out").checkpoint
    word = open_checkpoint(dense).load(["embedding.word"])["embedding.word"]
    slots = done.load([f"domains.{domain}.embedding.word" for domain in GROUPS])
    assert all(slot.tobytes() == word.tobytes() for slot in slots.values())
    assert "embedding.word" not in done.manifest.tensors
    tokens = np.random.default_rng(1).integers(3, VOCAB, 16)
    np.testing.assert_allclose(logits(done.path, "law", tokens), logits(dense, "code", tokens), atol=1e-6, rtol=0)


ROUTERS = {
    "hash": {"router": "hash"},
    "gshard": {"router": "gshard"},
    "noisy_top_k": {"router": "noisy_top_k", "top_k": 2},
    "olmoe renormalised": {"router": "olmoe", "top_k": 3, "renormalise": True, "shared_expert": True},
}
MODELS = {case: {"sparse": {"layers": 2, **sparse}} for case, sparse in ROUTERS.items()}
MODELS["mixture"] = {"top_layer": "mixture", "sparse": {}}


@pytest.mark.parametrize("case", MODELS)
def test_a_router_whose_weights_add_up_to_one_keeps_the_function(dense, sparse_yaml, tmp_path, logits, case):
    done = upcycle(dense, sparse_yaml(MODELS[case]), tmp_path / "out")
    assert done.same_function
    tokens = np.random.default_rng(3).integers(3, VOCAB, 16)
    # A competitive mixture's logits are log probabilities already.
    log_probs, expected = (
        np.log(softmax(logits(*of, tokens))) for of in ((done.checkpoint.path, "law"), (dense, "code"))
    )
    np.testing.assert_allclose(log_probs, expected, atol=1e-5, rtol=0)


def test_a_new_gate_is_that_of_a_new_model(dense, sparse_yaml, tmp_path):
    done = upcycle(dense, sparse_yaml({"sparse": {"layers": 1, "router": "switch"}}), tmp_path / "out")
    assert not done.same_function
    gate = done.checkpoint.load(["blocks.1.router.weight"])["blocks.1.router.weight"]
    expected = initial_value("blocks.1.router.weight", (16, 5), done.config.run.seed, done.config.model)
    np.testing.assert_array_equal(gate, expected)


def test_a_dense_model_of_olmoes_parts_becomes_a_sparse_one(pieces, vocab_model, corpora, tmp_path, logits):
    parts = {
        "norm": "rmsnorm", "position": "rope", "feed_forward": "swiglu", "activation": "silu", "biases": False,
        "head": "untied", "query_layer": "none", "attention": {"qk_norm": True},
    }  # fmt: skip
    dense = random_model(tmp_path / "dense", configuration(tmp_path / "d", vocab_model, corpora, parts), pieces)
    sparse = {**parts, "sparse": {"pattern": "every", "router": "olmoe", "top_k": 2, "renormalise": True}}
    config = configuration(tmp_path / "s", vocab_model, corpora, sparse, GROUPS)
    (tmp_path / "sparse.yaml").write_text(config.to_yaml())
    done = upcycle(dense, tmp_path / "sparse.yaml", tmp_path / "out")
    tokens = np.random.default_rng(4).integers(3, VOCAB, 16)
    expected = logits(dense, "code", tokens)
    np.testing.assert_allclose(logits(done.checkpoint.path, "code", tokens), expected, atol=2e-5, rtol=0)


def test_noise_is_each_experts_own_and_of_the_size_that_was_asked_for(dense, sparse_yaml, tmp_path):
    file, name = sparse_yaml(), "domains.code.blocks.1.experts.up.weight"
    noisy = upcycle(dense, file, tmp_path / "noisy", noise=0.1).checkpoint.load()
    again = upcycle(dense, file, tmp_path / "again", noise=0.1).checkpoint.load()
    assert all(noisy[tensor].tobytes() == again[tensor].tobytes() for tensor in noisy)
    source = open_checkpoint(dense).load(["blocks.1.feed_forward.up.weight"])["blocks.1.feed_forward.up.weight"]
    added = noisy[name] - source
    np.testing.assert_allclose(added.std(axis=(1, 2)) / source.std(), 0.1, rtol=0.1)
    assert len({expert.tobytes() for expert in added}) == GROUPS["code"]
    bias = open_checkpoint(dense).load(["blocks.1.feed_forward.up.bias"])["blocks.1.feed_forward.up.bias"]
    assert (noisy["domains.code.blocks.1.experts.up.bias"] == bias).all()


def test_frequency_tables_count_the_domains_own_text(dense, sparse_yaml, tmp_path):
    done = upcycle(dense, sparse_yaml({"sparse": {"layers": 1, "table": "frequency"}}), tmp_path / "out").checkpoint
    tables = done.load([f"domains.{domain}.blocks.1.routing" for domain in GROUPS])
    from pangu_sigma.trained_model import load_trained

    corpus = load_trained(done.path).corpus()
    for store in corpus.stores:
        rows = np.bincount(tables[f"domains.{store.name}.blocks.1.routing"], store.token_counts)
        assert rows.max() - rows.min() <= store.token_counts.max()
    assert done.fingerprints.corpora.keys() == done.probe().keys() == set(GROUPS)


def test_an_imported_pangu_alpha_can_be_upcycled(vocab_model, corpora, tmp_path, logits):
    from pangu_sigma.convert.import_pangu_alpha import PanguAlphaImportSettings, import_pangu_alpha
    from tests.pangu_sigma.convert import pangu_alpha_files

    tensors = pangu_alpha_files.make_alpha(layers=3, hidden=16, ffn=32, vocab=VOCAB, positions=16)
    source = pangu_alpha_files.write_ckpt(tmp_path / "alpha.ckpt", tensors)
    import_settings = PanguAlphaImportSettings(tokenizer=vocab_model, tokenizer_kind="sentencepiece", heads=2)
    import_pangu_alpha(source, tmp_path / "dense", import_settings)
    model = {"activation": "gelu", "sparse": {"layers": 1}}
    config = configuration(tmp_path / "run", vocab_model, corpora, model, GROUPS)
    (tmp_path / "sparse.yaml").write_text(config.to_yaml())
    done = upcycle(tmp_path / "dense", tmp_path / "sparse.yaml", tmp_path / "out").checkpoint
    tokens = np.random.default_rng(2).integers(3, VOCAB, 16)
    np.testing.assert_allclose(
        logits(done.path, "law", tokens), pangu_alpha_files.alpha_logits(tensors, 2, tokens), atol=2e-5
    )


def test_memory_holds_one_tensor_of_the_dense_model(vocab_model, corpora, pieces, tmp_path):
    model = {"hidden": 256, "ffn": 2048, "heads": 4, "positions": 16}
    dense = random_model(tmp_path / "dense", configuration(tmp_path / "d", vocab_model, corpora, model), pieces)
    sparse = configuration(tmp_path / "s", vocab_model, corpora, {**model, "sparse": {"layers": 2}}, {"code": 24})
    (tmp_path / "sparse.yaml").write_text(sparse.to_yaml())
    largest = max(entry.shape for entry in open_checkpoint(dense).manifest.tensors.values())
    tensor = 4 * largest[0] * largest[1]
    for noise in (0.0, 0.1):
        out = tmp_path / f"out{noise}"
        tracemalloc.start()
        done = upcycle(dense, tmp_path / "sparse.yaml", out, noise=noise)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        written = sum(file.bytes for file in done.checkpoint.manifest.files.values())
        assert written > 60 * tensor and peak < 5 * tensor + (8 << 20), (peak, tensor, written)


# --- what does not fit


def refused(dense, file, tmp_path, *parts: str, **options) -> None:
    with pytest.raises(UserError) as error:
        upcycle(dense, file, tmp_path / "out", **options)
    for part in parts:
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 32}, "model.hidden is 32 and the dense model's 16"),
        ({"ffn": 64}, "model.ffn is 64 and the dense model's 32"),
        ({"heads": 4}, "model.heads is 4 and the dense model's 2"),
        ({"layers": 4}, "model.layers is 4 and the dense model's 3"),
        ({"positions": 32}, "model.positions is 32"),
        ({"activation": "gelu"}, "model.activation is gelu"),
        ({"vocab_size": 400}, "model.vocab_size is 400"),
        ({"norm_epsilon": 1e-6}, "model.norm_epsilon is 1e-06"),
        ({"sparse": {"layers": 0}}, "model.sparse.layers is 0"),
        ({"norm": "rmsnorm"}, "model.norm is rmsnorm"),
        ({"biases": False}, "model.biases is false and the dense model's true"),
        (
            {"sparse": {"layers": 1, "feed_forward": "swiglu"}, "biases": False, "activation": "silu"},
            "model.sparse.feed_forward is swiglu and the dense model's networks are mlp",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_sizes_that_differ_are_named(dense, sparse_yaml, tmp_path, change, message):
    refused(dense, sparse_yaml(change), tmp_path, message)


def test_all_sizes_that_differ_are_named_at_once(dense, sparse_yaml, tmp_path):
    refused(dense, sparse_yaml({"hidden": 32, "ffn": 64}), tmp_path, "model.hidden", "model.ffn")


def test_a_sparse_model_is_no_start(dense, sparse_yaml, tmp_path):
    upcycle(dense, sparse_yaml(), tmp_path / "sparse")
    refused(tmp_path / "sparse", sparse_yaml(), tmp_path, "is no dense model")


def test_another_tokenizer_is_refused(dense, sparse_yaml, tmp_path, published):
    other = f"data.tokenizer.path={published / 'vocab.model'}"
    refused(dense, sparse_yaml(), tmp_path, "is not the tokenizer of the dense model", overrides=(other,))


def test_a_tokenizer_to_be_trained_means_the_dense_models(dense, sparse_yaml, tmp_path):
    overrides = ("data.tokenizer.kind=train", "data.tokenizer.path=null", "data.tokenizer.vocab_size=384")
    done = upcycle(dense, sparse_yaml(), tmp_path / "out", overrides)
    assert done.config.data.tokenizer == stored_config(open_checkpoint(dense)).data.tokenizer


def test_an_altered_dense_model_is_refused_and_leaves_nothing(dense, sparse_yaml, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(dense, copy)
    file = copy / "shared.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    refused(copy, sparse_yaml(), tmp_path, "shared.safetensors", "damaged")
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("name", ["embedding.word", "blocks.1.feed_forward.up.weight"])
def test_a_weight_that_is_no_number_is_named(sparse_yaml, vocab_model, corpora, pieces, tmp_path, name):
    dense = random_model(tmp_path / "dense", configuration(tmp_path / "d", vocab_model, corpora), pieces, bad=name)
    refused(dense, sparse_yaml(), tmp_path, name, "NaN or infinite")


def test_the_configuration_file_is_checked_first(dense, tmp_path):
    refused(dense, tmp_path / "none.yaml", tmp_path, "does not exist")
