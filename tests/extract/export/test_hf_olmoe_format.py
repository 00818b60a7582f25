"""An OLMoE of transformers, taken over and handed out again: the same function, the same gradients, the same bytes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, OlmoeConfig, OlmoeForCausalLM
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from extract.export.export_formats import Options
from extract.export.export_job import export
from pangu_sigma import runtime, trained_model
from pangu_sigma.checkpoint import open_checkpoint
from pangu_sigma.config import config_from_dict, load_config
from pangu_sigma.convert.import_olmoe import OlmoeImportSettings, import_olmoe
from pangu_sigma.convert.olmoe_names import parts_of
from pangu_sigma.data.packed_rows import TokenSequence, packed_row
from pangu_sigma.errors import UserError
from pangu_sigma.generation.kv_cache_decoder import KvCacheDecoder
from pangu_sigma.model.batch_planner import BatchPlanner
from pangu_sigma.serving.openai_adapter import OpenAIAdapter
from pangu_sigma.serving.openai_requests import ChatRequest
from pangu_sigma.serving.server_settings import ServerLimits
from pangu_sigma.trained_model import load_trained, stored_config
from pangu_sigma.training.objective import TrainingObjective
from pangu_sigma.training.startup.starting_point import start_fresh
from pangu_sigma.training.step import GradientStep
from tests.oracles.recomputing_decoder import RecomputingDecoder

WINDOW, BATCH = 32, 3
SIZES = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2,
    "intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2, "max_position_embeddings": WINDOW,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def on_cpu() -> None:
    runtime.prepare("CPU")


@pytest.fixture(scope="module")
def theirs(tokenizer) -> OlmoeForCausalLM:
    """A random one whose weights are large enough that every part of the function shows."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=tokenizer.vocab_size + 5, eos_token_id=tokenizer.eod_id, pad_token_id=tokenizer.pad_id,
        initializer_range=0.2, router_aux_loss_coef=0.5, **SIZES,
    )  # fmt: skip
    model = OlmoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def import_settings(tokenizer, tmp_path_factory) -> OlmoeImportSettings:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return OlmoeImportSettings(tokenizer=folder / "tokenizer.model", tokenizer_kind="sentencepiece")


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "olmoe"
    theirs.save_pretrained(path, max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture(scope="module")
def imported(folder, import_settings, tmp_path_factory):
    return import_olmoe(folder, tmp_path_factory.mktemp("imported") / "model", import_settings)


def test_a_run_begins_with_it_in_another_folder_and_with_text(imported, tmp_path):
    model = imported.checkpoint.path
    file = model / "config.yaml"
    assert ": /" not in file.read_text() and "- /" not in file.read_text()
    own = {"run.init_from": model, "run.dir": tmp_path / "run"}
    with pytest.raises(UserError, match="or set domains.general.data to the text to learn from"):
        start_fresh(load_config(file, own))
    (tmp_path / "text.txt").write_text("Some text.")
    config = load_config(file, {**own, "domains.general.data": tmp_path / "text.txt"})
    assert start_fresh(config).initial_model.path == model and config.data.cache == str(tmp_path / "run/data")


@pytest.fixture(scope="module")
def ours(imported):
    return load_trained(imported.checkpoint.path).model


@pytest.fixture(scope="module")
def tokens(theirs, tokenizer) -> np.ndarray:
    """[B, S + 1] without ends of documents, at which attention restarts here and not there."""
    ids = np.random.default_rng(1).integers(3, theirs.config.vocab_size, (BATCH, WINDOW + 1)).astype(np.int32)
    ids[ids == tokenizer.eod_id] += 1
    return ids


def test_every_parameter_is_counted(theirs, imported):
    assert imported.num_parameters == sum(p.numel() for p in theirs.parameters())
    assert imported.tensors == len(list(theirs.parameters()))


def test_logits_agree(theirs, ours, tokens):
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens[:1, :-1], dtype=torch.long)).logits.numpy()[0]
    assert np.abs(expected).max() > 1.5
    results = RecomputingDecoder(ours).score(tokens[0, :-1].tolist(), 0)
    np.testing.assert_allclose(results, expected, rtol=0, atol=1e-4)


def test_greedy_text_is_equal(theirs, ours, tokens):
    prompt = tokens[0, :9].tolist()
    expected = theirs.generate(
        torch.tensor([prompt], dtype=torch.long), max_new_tokens=WINDOW - 9, do_sample=False,
        attention_mask=torch.ones(1, 9, dtype=torch.long), eos_token_id=None,
    )[0, 9:].tolist()  # fmt: skip
    decoder = KvCacheDecoder(ours, slots=1)
    results = [int(decoder.begin(0, prompt, 0).argmax())]
    while len(results) < len(expected):
        results.append(int(decoder.step({0: results[-1]})[0].argmax()))
    assert ours.eod_id not in expected
    assert results == expected


def test_loss_auxiliary_loss_and_gradients_agree(theirs, ours, tokens):
    given = torch.tensor(tokens[:, :-1], dtype=torch.long)
    labels = torch.tensor(tokens[:, 1:], dtype=torch.long)
    theirs.zero_grad()
    out = theirs(given, output_router_logits=True)
    loss = torch.nn.functional.cross_entropy(out.logits.reshape(-1, out.logits.shape[-1]), labels.reshape(-1))
    config = theirs.config
    pooled = load_balancing_loss_func(out.router_logits, config.num_experts, config.num_experts_per_tok)
    (loss + config.router_aux_loss_coef * pooled).backward()

    inputs = ours.training_inputs(BATCH)
    planned = BatchPlanner(ours, inputs, training=True)(tokens, np.zeros(BATCH, np.int32), np.arange(BATCH), 0)
    step = GradientStep(ours.net, inputs, ours.layout, True, TrainingObjective())
    by_sample, auxiliary, _, by_expert, shared, _ = step(
        *inputs.pack(planned, ours.store, planned.mask / np.float32(planned.mask.sum()), 1.0)
    )
    assert by_sample.asnumpy().sum() / labels.numel() == pytest.approx(loss.item(), abs=1e-5)
    assert float(auxiliary.asnumpy()) == pytest.approx(config.router_aux_loss_coef * pooled.item(), abs=1e-5)

    results = {p.name: g.asnumpy() for p, g in zip(ours.net.trainable_params(), shared, strict=True)}
    trains = np.ones((len(inputs.layers), ours.groups.total), bool)
    for (layer_name, expert), tensors in inputs.expert_gradients(by_expert, planned.plans, trains).items():
        for name, tensor in zip(inputs.layers[0].network.tensors, tensors, strict=True):
            results[f"domains.general.{layer_name}.experts.{name}", expert] = tensor.asnumpy()
    named = dict(theirs.named_parameters())
    checked = set()
    for key, gradient in results.items():
        tensor, expert = key if isinstance(key, tuple) else (key, None)
        part = next(p for p in parts_of(ours.config, tensor) if p.expert == expert)
        expected = named[part.name].grad.numpy()
        expected = expected.T if part.turned else expected
        largest = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * largest, err_msg=str(key))
        checked.add(part.name)
    assert checked == named.keys()


def test_padding_of_a_short_example_is_masked_as_theirs_is(theirs, imported, tokenizer, monkeypatch, tmp_path):
    """One answer in a row that is mostly padding: losses and the norm of the gradient are those of `attention_mask`."""
    values = stored_config(imported.checkpoint).to_dict()
    values["adapt"] = {"objective": "sft", "examples": [{"name": "general", "data": ["x.jsonl"]}]}
    values["run"] |= {"init_from": str(imported.path), "dir": str(tmp_path / "run")}
    values["model"]["sparse"]["z_loss_weight"] = 0.1
    monkeypatch.setattr(trained_model, "stored_config", lambda checkpoint: config_from_dict(values))
    adapted = load_trained(imported.path).model
    ids = np.random.default_rng(2).integers(3, tokenizer.vocab_size, 9).astype(np.int32)
    rows = [packed_row([TokenSequence(ids, 4)], WINDOW, tokenizer.pad_id) for _ in range(BATCH)]
    row, mask, padding = (np.stack(parts) for parts in zip(*rows, strict=True))
    inputs = adapted.training_inputs(BATCH)
    planner = BatchPlanner(adapted, inputs, training=True)
    planned = planner(row, np.zeros(BATCH, np.int32), np.arange(BATCH), 0, mask, padding)
    step = GradientStep(adapted.net, inputs, adapted.layout, True, TrainingObjective())
    by_sample, auxiliary, counts, by_expert, shared, _ = step(
        *inputs.pack(planned, adapted.store, mask / np.float32(mask.sum()), 1.0)
    )

    given = torch.tensor(row[:, :-1], dtype=torch.long)
    attended = torch.tensor(~padding).long()
    theirs.zero_grad()
    out = theirs(given, attention_mask=attended, output_router_logits=True)
    labels = torch.tensor(np.where(mask > 0, row[:, 1:], -100), dtype=torch.long)
    loss = torch.nn.functional.cross_entropy(out.logits.reshape(-1, out.logits.shape[-1]), labels.reshape(-1))
    config = theirs.config
    pooled = load_balancing_loss_func(out.router_logits, config.num_experts, config.num_experts_per_tok, attended)
    squares = [torch.logsumexp(logits[attended.reshape(-1) > 0], -1).square().mean() for logits in out.router_logits]
    total = config.router_aux_loss_coef * pooled + 0.1 * sum(squares)
    (loss + total).backward()
    assert by_sample.asnumpy().sum() / mask.sum() == pytest.approx(loss.item(), abs=1e-5)
    assert float(auxiliary.asnumpy()) == pytest.approx(total.item(), rel=1e-5)
    # Rows of experts are those of text alone.
    for of_layer in counts:
        assert of_layer.asnumpy().sum() == 2 * attended.sum().item()
    trains = np.stack([of_layer.asnumpy()[:, :-1].sum(0) > 0 for of_layer in counts])
    of_experts = inputs.expert_gradients(by_expert, planned.plans, trains).values()
    ours = [gradient.asnumpy() for gradients in (shared, *of_experts) for gradient in gradients]
    norm = np.sqrt(sum((gradient.astype(np.float64) ** 2).sum() for gradient in ours))
    expected = np.sqrt(sum((p.grad.double() ** 2).sum().item() for p in theirs.parameters() if p.grad is not None))
    assert norm == pytest.approx(expected, rel=1e-4)


def tensor_bytes(folder) -> dict[str, tuple]:
    results = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            results[name] = tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return results


def test_weights_survive_the_round_trip_byte_for_byte(theirs, folder, imported, tmp_path):
    options = Options(max_shard_bytes=50_000)
    assert export(imported.checkpoint.path, tmp_path / "out", "hf-olmoe", options=options).messages == ()
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(folder)
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out"))
    assert {key: after.get(key, before[key]) for key in before} | {"transformers_version": ""} == before | {
        "transformers_version": "", "output_router_logits": False,
    }  # fmt: skip
    again, info = OlmoeForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), theirs.parameters(), strict=True))


def test_half_precision_keeps_its_bits(theirs, import_settings, tmp_path):
    OlmoeForCausalLM(theirs.config).to(torch.bfloat16).save_pretrained(tmp_path / "in")
    done = import_olmoe(tmp_path / "in", tmp_path / "model", import_settings).checkpoint
    assert {entry.dtype for entry in done.manifest.tensors.values()} == {"bfloat16"}
    export(done.path, tmp_path / "out", "hf-olmoe", options=Options("bfloat16"))
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(tmp_path / "in")


@pytest.fixture(scope="module")
def changed_folder(folder, tmp_path_factory):
    """A copy of the folder with other tensors, or others in config.json."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)

    def change(change=lambda tensors: None, **values):
        path = tmp_path_factory.mktemp("changed")
        (path / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | values))
        copy = {name: tensor.clone() for name, tensor in tensors.items()}
        change(copy)
        save_file(copy, path / "model.safetensors")
        return path

    return change


def test_each_tensor_keeps_its_own_type(changed_folder, import_settings, tmp_path):
    """Gates in float32, the rest in bfloat16, and of a stack of experts one in another type."""

    def mixed(tensors):
        for name in tensors:
            if "mlp.gate." not in name and ".experts.2." not in name:
                tensors[name] = tensors[name].to(torch.bfloat16)

    source = changed_folder(mixed)
    done = import_olmoe(source, tmp_path / "model", import_settings)
    export(done.path, tmp_path / "out", "hf-olmoe")
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(source)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] in ("bfloat16", "float32")


@pytest.mark.parametrize("ids", [{"pad_token_id": 1, "bos_token_id": 4}, {"pad_token_id": None}, {}])
def test_special_ids_come_back(changed_folder, import_settings, tmp_path, ids):
    source = changed_folder(lambda tensors: None, **{"pad_token_id": 0, **ids})
    given = json.loads((source / "config.json").read_text())
    if not ids:
        del given["pad_token_id"]
        (source / "config.json").write_text(json.dumps(given))
    generation = {"do_sample": True, "top_p": 0.9, "eos_token_id": [given["eos_token_id"], 5], "pad_token_id": 1}
    (source / "generation_config.json").write_text(json.dumps(generation))
    done = import_olmoe(source, tmp_path / "model", import_settings)
    export(done.path, tmp_path / "out", "hf-olmoe")
    before, after = (AutoConfig.from_pretrained(path) for path in (source, tmp_path / "out"))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(before, name) == getattr(after, name)
    again = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    silent = again.pop("suppress_tokens")  # rows without a piece, which are never written
    assert again == generation and len(silent) == 5


def test_what_does_not_fit_is_an_error_with_the_list_and_nothing_is_written(folder, import_settings, tmp_path):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    missing, strange = "model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.0.mlp.experts.6.up_proj.weight"
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folder / "config.json").read_text())
    changed = {name: tensor for name, tensor in tensors.items() if name != missing}
    changed |= {strange: tensors[missing].clone(), "lm_head.weight": tensors["lm_head.weight"][:-1].clone()}
    save_file(changed, broken / "model.safetensors")
    with pytest.raises(UserError) as error:
        import_olmoe(broken, tmp_path / "out", import_settings)
    for message in (f"lacks what these tensors need: {missing}", strange, "lm_head.weight ["):
        assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_tied_model_may_hold_its_head_twice(changed_folder, import_settings, tmp_path):
    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    twice = changed_folder(tie, tie_word_embeddings=True)
    once = changed_folder(lambda tensors: tensors.pop("lm_head.weight"), tie_word_embeddings=True)
    results = [import_olmoe(path, tmp_path / str(n), import_settings) for n, path in enumerate((twice, once))]
    of_twice, of_once = ((done.path / "shared.safetensors").read_bytes() for done in results)
    assert of_twice == of_once
    with pytest.raises(UserError, match=r"ties its head to model.embed_tokens.weight .* holds another lm_head.weight"):
        import_olmoe(changed_folder(tie_word_embeddings=True), tmp_path / "different", import_settings)
    assert not (tmp_path / "different").exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.experts.3.up_proj.weight"])
def test_a_weight_that_is_no_number_is_named(changed_folder, import_settings, tmp_path, name):
    source = changed_folder(lambda tensors: tensors[name].view(-1)[5:7].fill_(float("nan")))
    with pytest.raises(UserError, match=f"holds {name} with 2 of"):
        import_olmoe(source, tmp_path / "out", import_settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 8}, "has sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters"),
        ({"model_type": "llama"}, 'a model of type "llama"'),
        ({"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        ({"num_key_value_heads": 2}, "num_key_value_heads = 2"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"eos_token_id": None}, "give eod_id"),
        ({"eos_token_id": 9999}, "has no id 9999: give the piece or the id"),
    ],
)
def test_an_architecture_that_this_is_not_is_refused(folder, import_settings, tmp_path, change, message):
    values = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    for file in folder.glob("model*"):
        (tmp_path / file.name).symlink_to(file)
    with pytest.raises(UserError, match=message):
        import_olmoe(tmp_path, tmp_path / "out", import_settings)


def test_a_damaged_folder_is_refused_by_the_files_name(folder, import_settings, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match="has neither model.safetensors nor"):
        import_olmoe(tmp_path, tmp_path / "out", import_settings)
    shards = sorted(folder.glob("*.safetensors"))
    for file in (*shards[1:], folder / "model.safetensors.index.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=shards[0].name):
        import_olmoe(tmp_path, tmp_path / "out", import_settings)
    (tmp_path / shards[0].name).write_bytes(shards[0].read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{shards[0].name} is no whole safetensors file"):
        import_olmoe(tmp_path, tmp_path / "out", import_settings)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../model.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"\.\./model.safetensors"):
        import_olmoe(tmp_path, tmp_path / "out", import_settings)


def test_a_model_that_is_no_olmoe_is_not_handed_out_as_one(stored, imported, tmp_path):
    with pytest.raises(UserError, match="model.norm is layernorm"):
        export(stored("dense").path, tmp_path / "out", "hf-olmoe")
    with pytest.raises(UserError, match="format hf-olmoe"):
        export(imported.checkpoint.path, tmp_path / "out", "hf")


def test_the_folders_own_tokenizer_comes_along(folder, tmp_path, tokenizer):
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer

    library = Library(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|padding|>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 20, trainer)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(values))
    library.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|padding|>",
        "model_max_length": 77,
    }  # fmt: skip
    companions = {
        "tokenizer_config.json": json.dumps(settings),
        "special_tokens_map.json": json.dumps({"eos_token": "<|endoftext|>", "pad_token": "<|padding|>"}),
        "chat_template.jinja": "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% endfor %}",
    }
    for name, content in companions.items():
        (tmp_path / name).write_text(content)
    done = import_olmoe(tmp_path, tmp_path / "model", OlmoeImportSettings())
    loaded = load_trained_tokenizer(done)
    assert (loaded.kind, loaded.eod_id, loaded.pad_id) == ("huggingface", 0, 1)
    text = "the fox, <|endoftext|> <|padding|> dog\n\tnaïve 🙂"
    ids = loaded.encode(text)
    assert 0 not in ids and 1 not in ids and loaded.decode([*ids, 0]) == text
    assert [list(row) for row in loaded.encode_batch([text, ""])] == [ids, []]
    export(done.checkpoint.path, tmp_path / "out", "hf-olmoe")
    for name, content in companions.items():
        assert (tmp_path / "out" / name).read_text() == content
    theirs, before = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "out", tmp_path))
    talk = [{"role": "user", "content": "the fox"}]
    for each in (theirs, before):
        assert each.apply_chat_template(talk, tokenize=False) == "u:the fox"
    assert theirs.special_tokens_map == before.special_tokens_map and theirs.pad_token_id == 1
    # They go wherever the tokenizer goes, and the server reads a conversation as transformers does.
    loaded = load_trained_tokenizer(done)
    adapter = OpenAIAdapter(["general"], loaded, 100, ServerLimits())
    body = ChatRequest.model_validate({"model": "general", "messages": talk, "max_tokens": 1})
    (request,) = adapter.chat(body).requests
    asked = before.apply_chat_template(talk, add_generation_prompt=True)
    assert request.prompt_ids == (0, *asked) and request.sampling.stop == ()
    assert load_trained_tokenizer(done).companions.keys() >= companions.keys()
    assert theirs("the fox").input_ids == loaded.encode("the fox") and theirs.eos_token_id == 0


def load_trained_tokenizer(done):
    from pangu_sigma.trained_model import stored_tokenizer

    return stored_tokenizer(open_checkpoint(done.checkpoint.path))
