"""What Hugging Face runs is the model: logits, cached and padded decoding, text, tokenizer."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline

from extract.export.export_formats import Options
from extract.export.export_job import export
from pangu_sigma.generation.request import prompt_ids
from pangu_sigma.trained_model import load_trained
from tests.extract.export.conftest import CASES, LENGTH, TEXTS, domains_of, some_tokens
from tests.oracles.recomputing_decoder import RecomputingDecoder

TOLERANCE = 1e-4


@pytest.fixture(scope="session")
def exported(stored, tmp_path_factory):
    """Case name -> (what it was made from, the exported folder, the model in PyTorch)."""
    made = {}

    def get(case: str):
        if case not in made:
            source = stored(case)
            out = tmp_path_factory.mktemp("hf") / case
            export(source.path, out, "hf")
            model, info = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, output_loading_info=True)
            assert not any(info.values()), info
            made[case] = source, out, model.eval()
        return made[case]

    return get


def run(model, tokens, domains, **inputs):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens), dtype=torch.long), domain=domains, **inputs)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_agree_with_the_reference(exported, case, attention):
    source, out, model = exported(case)
    if attention == "eager":
        model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, attn_implementation="eager")
    assert model.config._attn_implementation == attention
    tokens, domains = some_tokens(source, 4, LENGTH), domains_of(source, 4)
    expected = source.logits(tokens, domains)
    assert np.abs(expected).max() > 3  # the comparison says something
    np.testing.assert_allclose(run(model, tokens, domains).logits.numpy(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_pieces_of_a_text_give_the_logits_of_the_whole(exported, case):
    source, _, model = exported(case)
    tokens, domains = some_tokens(source, 2, LENGTH), domains_of(source, 2)
    at_once = run(model, tokens, domains, use_cache=False)
    assert at_once.past_key_values is None
    cache, parts = None, []
    for start, end in [(0, 7), (7, 8), (8, 9), (9, 17), *((i, i + 1) for i in range(17, LENGTH))]:
        output = run(model, tokens[:, start:end], domains, past_key_values=cache)
        cache = output.past_key_values
        parts.append(output.logits)
    np.testing.assert_allclose(torch.cat(parts, 1).numpy(), at_once.logits.numpy(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ["full_model", "switch"])
def test_padding_changes_no_logits(exported, case, side):
    source, _, model = exported(case)
    rows = [some_tokens(source, 1, n, seed=n)[0] for n in (LENGTH - 6, 5, 11)]
    domains = domains_of(source, 3)
    longest = max(map(len, rows))
    tokens = np.full((3, longest), source.tokenizer.pad_id)
    mask = np.zeros((3, longest), int)
    for b, row in enumerate(rows):
        text_slice = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        tokens[b, text_slice], mask[b, text_slice] = row, 1
    logits = run(model, tokens, domains, attention_mask=torch.tensor(mask)).logits
    for b, row in enumerate(rows):
        alone = run(model, row[None], domains[b : b + 1]).logits[0].numpy()
        np.testing.assert_allclose(logits[b][mask[b] == 1].numpy(), alone, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("case", ["dense", "full_model", "switch"])
def test_generate_writes_what_step_by_step_decoding_writes(exported, case):
    source, _, model = exported(case)
    tokens, domains = some_tokens(source, 1, 6)[:, :5], source.groups.names[-1:]
    expected = tokens.tolist()
    while len(expected[0]) < 20 and (len(expected[0]) == 5 or expected[0][-1] != source.tokenizer.eod_id):
        logits = source.logits(np.array(expected), list(domains))
        expected[0].append(int(logits[0, -1].argmax()))
    for settings in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        written = model.generate(torch.tensor(tokens).long(), max_length=20, domain=domains[0], **settings)
        assert written.tolist() == expected, settings


def test_ids_without_a_piece_are_never_written_and_decoding_them_gives_nothing(exported):
    source, out, model = exported("full_model")
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    vocab = source.tokenizer.vocab_size
    assert tokenizer.decode([vocab, *tokenizer("return")["input_ids"][1:], vocab + 7, -1]) == "return"
    assert tokenizer.convert_ids_to_tokens([vocab, 5]) == ["", source.tokenizer.piece(5)]
    tokens = torch.tensor(some_tokens(source, 2, 6)[:, :5]).long()
    logits = model(tokens).logits
    silent = [i for i in range(vocab) if i not in (source.tokenizer.eod_id, 7, 8, 9)]
    model.config.ids_without_piece = silent
    try:
        for settings in ({}, {"do_sample": True, "temperature": 50.0}, {"num_beams": 2}):
            written = model.generate(tokens, max_length=16, **settings)[:, 5:]
            assert not set(written.flatten().tolist()) & (set(silent) - {source.tokenizer.pad_id}), settings
        assert torch.equal(model(tokens).logits, logits)  # as trained
    finally:
        model.config.ids_without_piece = []


def test_the_model_itself_writes_the_same_text_and_gives_the_same_logits(exported):
    source, out, model = exported("full_model")
    trained = load_trained(source.path)
    decoder = RecomputingDecoder(trained.model)
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    for number, domain in enumerate(source.groups.names):
        ids = list(prompt_ids(trained.tokenizer, "return "))
        inputs = tokenizer("return ", return_tensors="pt")
        assert inputs.input_ids[0].tolist() == ids
        written = model.generate(**inputs, max_length=LENGTH, domain=domain)[0].tolist()
        np.testing.assert_allclose(
            run(model, [written], domain).logits[0].numpy(), decoder.score(written, number), rtol=TOLERANCE,
            atol=TOLERANCE,
        )  # fmt: skip
        logits = decoder.begin(0, ids, number)
        while len(ids) < len(written):
            ids.append(int(logits.argmax()))
            logits = decoder.step({0: ids[-1]})[0]
        assert written == ids and (len(ids) == LENGTH or ids[-1] == source.tokenizer.eod_id)


def test_prompts_of_different_lengths_and_domains_are_written_on_together(exported):
    source, out, model = exported("full_model")
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    prompts, domains = ["def main", "春", "return [1]\n"], ["code", "poems", "code"]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    together = model.generate(**inputs, max_new_tokens=8, domain=domains)
    for row, prompt, domain in zip(together, prompts, domains, strict=True):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, domain=domain)
        assert tokenizer.decode(row, skip_special_tokens=True) == tokenizer.decode(alone[0], skip_special_tokens=True)


def test_beams_keep_their_domains_and_documents(exported):
    source, _, model = exported("full_model")
    tokens = torch.tensor(some_tokens(source, 2, 6)).long()
    settings = {"num_beams": 3, "max_new_tokens": 6, "eos_token_id": source.tokenizer.vocab_size}
    cached = model.generate(tokens, domain=["poems", "code"], **settings)
    assert cached.tolist() == model.generate(tokens, domain=["poems", "code"], use_cache=False, **settings).tolist()
    alone = model.generate(tokens[:1], domain="poems", **settings)
    assert cached[0].tolist() == alone[0].tolist()


def test_a_cache_can_be_cut_back(exported):
    source, _, model = exported("sub_model")
    tokens = some_tokens(source, 1, LENGTH)
    cache = DynamicCache()
    run(model, tokens, "code", past_key_values=cache)
    cache.crop(9)
    again = run(model, tokens[:, 9:], "code", past_key_values=cache).logits
    np.testing.assert_allclose(again.numpy(), source.logits(tokens, ["code"])[:, 9:], rtol=TOLERANCE, atol=TOLERANCE)


def test_the_domain_is_a_default_an_attribute_or_an_argument(exported):
    source, out, model = exported("full_model")
    tokens = some_tokens(source, 1, 9)
    by_domain = {d: run(model, tokens, d).logits for d in ("code", "poems")}
    assert not torch.allclose(by_domain["code"], by_domain["poems"])
    assert model.domain == "code" and torch.equal(run(model, tokens, None).logits, by_domain["code"])
    assert torch.equal(run(model, tokens, 1).logits, by_domain["poems"])
    model.domain = "poems"
    assert torch.equal(run(model, tokens, None).logits, by_domain["poems"])
    model.domain = "code"
    for wrong in ("law", 2, ["code", "code"]):
        with pytest.raises(ValueError, match="domain"):
            run(model, tokens, wrong)
    with pytest.raises(ValueError, match="no domain 'law'; it has code, poems"):
        model.domain = "law"
    other = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, domain="poems")
    assert torch.equal(run(other, tokens, None).logits, by_domain["poems"])


def test_a_chosen_domain_goes_alone(stored, exported, tmp_path):
    source, _, model = exported("full_model")
    export(source.path, tmp_path / "poems", "hf", domains=["poems"])
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "poems", trust_remote_code=True)
    tokens = some_tokens(source, 2, LENGTH)
    assert torch.equal(run(alone, tokens, None).logits, run(model, tokens, "poems").logits)
    assert alone.num_parameters() < model.num_parameters()


def test_shards_hold_the_same_numbers(exported, tmp_path):
    source, _, model = exported("full_model")
    export(source.path, tmp_path / "cut", "hf", options=Options(max_shard_bytes=20_000))
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", trust_remote_code=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(cut.state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_element_types_are_rounded_as_torch_rounds(exported, tmp_path, dtype):
    source, _, model = exported("full_model")
    export(source.path, tmp_path / dtype, "hf", options=Options(dtype=dtype))
    low = AutoModelForCausalLM.from_pretrained(tmp_path / dtype, trust_remote_code=True, dtype="auto")
    torch_dtype = getattr(torch, dtype)
    for name, tensor in model.state_dict().items():
        expected = tensor.to(torch_dtype) if tensor.is_floating_point() else tensor
        assert torch.equal(low.state_dict()[name], expected), name
    assert low.dtype == torch_dtype
    tokens, domains = some_tokens(source, 2, LENGTH), domains_of(source, 2)
    difference = run(low, tokens, domains).logits.float() - run(model, tokens, domains).logits
    assert difference.abs().max() < 0.5


def test_the_loss_is_the_mean_over_predicted_tokens(exported):
    source, _, model = exported("sub_model")
    tokens = some_tokens(source, 2, 10)
    loss = run(model, tokens, "code", labels=torch.tensor(tokens).long()).loss
    logits = source.logits(tokens, ["code"] * 2)[:, :-1]
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    np.testing.assert_allclose(loss.item(), -np.take_along_axis(log_p, tokens[:, 1:, None], -1).mean(), rtol=1e-5)


def test_it_trains_on(exported):
    """Gradients reach every parameter that the text's domains use."""
    source, out, _ = exported("full_model")
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    tokens = torch.arange(2 * LENGTH).reshape(2, LENGTH) % source.tokenizer.vocab_size
    model(tokens, labels=tokens, domain="poems").loss.backward()
    for name, parameter in model.named_parameters():
        foreign = ".groups.0." in name or ".words.0." in name
        assert (parameter.grad is None) == foreign, name


def test_hidden_states_and_attentions_come_out(exported):
    source, _, model = exported("sub_model")
    output = run(model, some_tokens(source, 2, 9), None, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == source.config.model.layers + 1
    assert [tuple(a.shape) for a in output.attentions] == [(2, 2, 9, 9)] * source.config.model.layers
    as_tuple = run(model, some_tokens(source, 2, 9), None, return_dict=False)
    np.testing.assert_allclose(as_tuple[0].numpy(), output.logits.numpy(), rtol=1e-5, atol=2e-5)


def test_a_document_longer_than_the_positions_is_refused_and_several_documents_are_not(exported):
    source, _, model = exported("dense")
    eod = source.tokenizer.eod_id
    tokens = np.full((1, LENGTH + 9), eod + 1)
    with pytest.raises(ValueError, match=f"longer than the model's {LENGTH} positions"):
        run(model, tokens, None)
    tokens[0, 15] = eod
    assert run(model, tokens, None).logits.isfinite().all()


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_makes_the_same_ids_and_text(exported, text):
    source, out, _ = exported("dense")
    ours, theirs = source.tokenizer, AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs(text).input_ids == [ours.eod_id, *ids]
    assert theirs.decode([ours.eod_id, *ids, ours.pad_id], skip_special_tokens=True) == ours.decode(ids) == text
    assert theirs.decode([ours.eod_id, *ids]) == "<eod>" + text
    assert theirs.convert_tokens_to_ids(theirs.tokenize(text)) == ids
    assert theirs.convert_tokens_to_string(theirs.tokenize(text)) == text


def test_the_tokenizer_is_saved_and_loaded_again(exported, tmp_path):
    source, out, model = exported("dense")
    AutoTokenizer.from_pretrained(out, trust_remote_code=True).save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert again.encode(TEXTS[0], add_special_tokens=False) == source.tokenizer.encode(TEXTS[0])
    assert len(again) == source.tokenizer.vocab_size and again.padding_side == "left"
    tokens = some_tokens(source, 1, 9)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert torch.equal(run(loaded, tokens, None).logits, run(model, tokens, None).logits)


def test_a_pipeline_and_the_model_without_head_work(exported):
    source, out, model = exported("full_model")
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert write("def ", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("def ")
    tokens = some_tokens(source, 1, 9)
    body = AutoModel.from_pretrained(out, trust_remote_code=True).eval()
    hidden = run(body, tokens, "poems").last_hidden_state
    assert torch.equal(hidden @ body.words[1].weight.T, run(model, tokens, "poems").logits)
    assert AutoConfig.from_pretrained(out, trust_remote_code=True).domains == ["code", "poems"]
