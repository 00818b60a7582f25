"""The OLMoE speed comparison: its figures, that it goes on where it was interrupted, that all compute the same."""

import json
import math

import pytest

from benchmarks.olmoe_speed import FORMS, OURS, VARIANTS, VOCABULARY, complaints, measure, read_rounds, summary, table


def round_of(**seconds: float) -> dict:
    return {
        name: {"seconds": [s, s], "losses": [8.0, 7.0], "first_loss": math.log(VOCABULARY), "parameters": 5}
        for name, s in ({OURS: 1.0} | seconds).items()
    }


ROUND = round_of(**{"Hugging Face": 2.0, "PyTorch loop": 1.5, "PyTorch sorted bmm": 4.0})


def test_ratios_are_taken_inside_a_round_and_the_faster_plain_form_is_the_baseline():
    summed = summary(VARIANTS["fine"], [ROUND, ROUND])
    assert summed["ratios"] == {"Hugging Face": 2.0, "PyTorch loop": 1.5, "PyTorch sorted bmm": 4.0}
    assert summed["plain"] == "PyTorch loop" and summed["medians"][OURS] == 4 * 512
    assert "| 64 experts of 128, top 8 | Hugging Face | 1024 | **2.00** |" in table([summed])
    assert not complaints(summed)
    summed["parameters"][OURS] = 6
    assert len(complaints(summed | {"losses": {OURS: (2.0, 3.0)}})) == 3


def test_finished_rounds_are_kept_and_a_half_written_one_is_measured_again(tmp_path):
    kept = tmp_path / "rounds_of_2_steps.jsonl"
    kept.write_text(json.dumps(ROUND) + "\n" + json.dumps(ROUND) + "\n" + json.dumps(ROUND)[:40], encoding="utf-8")
    assert len(read_rounds(kept)) == 2
    # Enough rounds are there: nothing is started.
    assert measure(VARIANTS["fine"], tmp_path, rounds=2, steps=2) == [ROUND, ROUND]


def test_both_variants_compute_with_as_many_inner_values():
    assert len({v.top_k * v.ffn for v in VARIANTS.values()}) == 1


def test_the_plain_forms_compute_what_hugging_faces_model_does():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from benchmarks.torch_olmoe import build

    sizes = {"vocab_size": 50, "hidden": 16, "layers": 2, "heads": 2, "positions": 12}
    sizes |= {"experts": 5, "top_k": 2, "ffn": 8}
    built = {form: build(form, sizes) for form in FORMS.values()}
    theirs = built["hf"][0]
    ids = torch.randint(0, 50, (3, 13))
    expected = None
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        for form in ("loop", "bmm"):
            copy_weights(theirs, built[form][0])
        for form, (_, forward) in built.items():
            summed = torch.stack(forward(ids[:, :-1], ids[:, 1:]))
            expected = summed if form == "hf" else expected
            assert torch.allclose(summed, expected, atol=1e-4), form
            assert sum(p.numel() for p in built[form][0].parameters()) == sum(p.numel() for p in theirs.parameters())


def copy_weights(theirs, plain) -> None:
    inner = theirs.model
    plain.words.weight.copy_(inner.embed_tokens.weight)
    plain.norm.weight.copy_(inner.norm.weight)
    plain.head.weight.copy_(theirs.lm_head.weight)
    for layer, own in zip(inner.layers, plain.layers, strict=True):
        attention = layer.self_attn
        pairs = [
            (own.norm1, layer.input_layernorm), (own.norm2, layer.post_attention_layernorm),
            (own.query, attention.q_proj), (own.key, attention.k_proj), (own.value, attention.v_proj),
            (own.out, attention.o_proj), (own.query_norm, attention.q_norm), (own.key_norm, attention.k_norm),
            (own.router, layer.mlp.gate),
        ]  # fmt: skip
        for to, source in pairs:
            to.weight.copy_(source.weight)
        for e, expert in enumerate(layer.mlp.experts):
            own.gate[e].copy_(expert.gate_proj.weight.T)
            own.up[e].copy_(expert.up_proj.weight.T)
            own.down[e].copy_(expert.down_proj.weight.T)
