"""The plan against arithmetic done by hand, and its advice against itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pangu_sigma.cli import app
from pangu_sigma.config import load_config, tensor_shapes
from pangu_sigma.config.capacity_sizes import activated_slots
from pangu_sigma.errors import UserError
from pangu_sigma.model.tensor_parallel_layout import spec_of
from pangu_sigma.plan.cluster_plan import changed, plan
from pangu_sigma.plan.hardware import GIB, Hardware
from pangu_sigma.plan.memory_estimate import number_of_layers, stage_bytes

CONFIGS = Path(__file__).parents[3] / "configs"
CLUSTER = sorted(path.name for path in CONFIGS.glob("*.yaml") if path.name.startswith(("pangu_", "eight_")))
EXPERT = 2 * 5120 * 20480 + 5120 + 20480


def made(name, *overrides, devices=None, **hardware):
    return plan(load_config(CONFIGS / name, overrides), Hardware(**hardware), devices)


@pytest.mark.parametrize("name", CLUSTER)
def test_every_shipped_cluster_configuration_fits(name):
    assert made(name)["fits"]


def test_the_papers_model_by_hand():
    plan_record = made("pangu_sigma_1085b.yaml")
    assert plan_record["devices"] == 512
    assert round(plan_record["parameters"]["total"] / 1e9) == 1085
    # 10 experts of 8 layers on each of 8 ranks of a host that share them over the tensor axis, with two moments.
    assert plan_record["host"]["total"] == 12 * 10 * 8 * EXPERT
    # One domain's 16 experts, ceil(1.25 * 1024 / 16) = 80 rows of each of 4 samples.
    assert plan_record["dispatch"] == {"slots": 16, "rows": 16 * 80 * 4, "tokens": 4096, "times_tokens": 1.25}
    # 8 layers, 2 micro-batches, 2 exchanges forward, 1 again in the recomputation, 2 backward, 7 of 8 rows leave.
    assert plan_record["step"]["bytes_per_device"]["all-to-all"] == 8 * 2 * 5 * 5120 * 5120 * 2 * 7 / 8
    assert plan_record["step"]["bytes_per_device"]["host link"] == 2 * (2 * 4) * 8 * 2 * EXPERT / 8
    assert plan_record["placements"]["domain"]["exchange_ranks"] == 8
    assert plan_record["placements"]["global"]["exchange_ranks"] == 64
    # Read anywhere, a sample may be of 8 times as many domains, and a domain's 16 experts lie on 16 of 64 ranks: where
    # the 8 domains of a step meet on the same ones, each of those computes 8 experts instead of 2.
    ratio = plan_record["placements"]["global"]["all-to-all"] / plan_record["placements"]["domain"]["all-to-all"]
    assert ratio == pytest.approx(8 * 4 * (63 / 64) / (7 / 8))


def test_state_without_any_cut_is_sixteen_bytes_a_parameter():
    plan_record = made("eight_devices_dense.yaml", "parallel={}", "train.precision=float32")
    held = plan_record["device"]["bytes"]
    total = plan_record["parameters"]["total"]
    assert (held["weights"], held["moments"], held["gradients"]) == (4 * total, 8 * total, 4 * total)
    assert held["compute copies"] == 0 and not any(plan_record["step"]["bytes_per_device"].values())


def test_a_mesh_cuts_state_by_what_each_tensor_is_cut():
    moments = made("eight_devices_global.yaml", "parallel={}")["device"]["bytes"]["moments"]
    cut = made("eight_devices_global.yaml")["device"]["bytes"]["moments"]
    config = load_config(CONFIGS / "eight_devices_global.yaml")
    axes = {"expert": 4, "tensor": 2, None: 1}
    expected = sum(
        8 * math.prod(shape) / math.prod(axes[a] for a in spec_of(name, shape))
        for name, shape in tensor_shapes(config, 8192).items()
        if not name.endswith(".routing")
    )
    assert cut == expected < moments / 4


def test_every_matrix_of_a_layer_is_cut():
    config = load_config(CONFIGS / "eight_devices_global.yaml")
    for name, shape in tensor_shapes(config, 8192).items():
        cut = spec_of(name, shape)
        assert len(cut) == len(shape)
        if len(shape) > 1 and name.endswith((".weight", ".word")):
            assert "tensor" in cut, name


@pytest.mark.parametrize(
    ("name", "overrides", "limit"),
    [
        ("pangu_alpha_13b.yaml", ["parallel.optimizer_parallel=false", "train.recompute=false"], 32),
        ("pangu_sigma_1085b.yaml", ["experts.store=device", "data.max_domains_per_batch=null"], 32),
        ("eight_devices_global.yaml", [], 0.4),
    ],
)
def test_advice_followed_fits(name, overrides, limit):
    before = made(name, *overrides, device_gib=limit)
    assert not before["device"]["fits"]
    advice = before["advice"][0]
    changes = advice.split(": set ")[1].split(" for ")[0].split()
    after = made(name, *overrides, *changes, device_gib=limit)
    assert after["device"]["fits"] and f"{after['device']['total'] / GIB:,.1f} GiB" in advice


def test_what_cannot_fit_is_said():
    plan_record = made("pangu_sigma_1085b.yaml", device_gib=1, host_gib=64)
    assert not plan_record["fits"]
    assert "use more devices" in plan_record["advice"][0]
    assert "187.5 of 64 GiB: spread the experts over 188 hosts" in plan_record["advice"][1]


def test_other_numbers_of_devices_change_the_data_axis():
    assert made("pangu_alpha_13b.yaml", devices=512)["mesh"]["data"] == 64
    assert made("eight_devices_dense.yaml", "train.batch_size=null", devices=24)["devices"] == 24
    with pytest.raises(UserError, match="devices=20 is no multiple of parallel.expert x tensor x pipeline = 8"):
        made("pangu_alpha_13b.yaml", devices=20)
    with pytest.raises(UserError, match=r"parallel.data=5: train.batch_size = 1024 .* which the 5 ranks that read"):
        made("pangu_alpha_13b.yaml", devices=40)


def test_slower_links_cost_time():
    fast, slow = made("pangu_sigma_38b.yaml"), made("pangu_sigma_38b.yaml", between_gbps=1.25)
    assert slow["step"]["seconds"]["all-to-all"] == pytest.approx(10 * fast["step"]["seconds"]["all-to-all"])
    assert slow["step"]["seconds"]["tensor sums"] == fast["step"]["seconds"]["tensor sums"]


def test_the_command_prints_text_and_json():
    file = str(CONFIGS / "pangu_sigma_1085b.yaml")
    shown = CliRunner().invoke(app, ["plan", file])
    assert shown.exit_code == 0 and "69,905 tokens/s" in shown.stdout and "no NPU has run this yet" in shown.stdout
    plan_record = json.loads(CliRunner().invoke(app, ["plan", file, "--json", "--device-gib", "8"]).stdout)
    assert plan_record["assumptions"]["device_gib"] == 8 and plan_record["fits"] is False
    refused = CliRunner().invoke(app, ["plan", file, "parallel.expert=48"])
    assert refused.exit_code == 2 and "parallel.placement_groups" not in refused.stderr
    assert "parallel.expert = 48 does not divide the 640 experts" in refused.stderr


def test_several_choices_of_a_token_and_a_shared_expert_are_counted():
    alone = ("run.device=CPU", "parallel={}", "train.precision=float32")
    one = made("eight_devices_global.yaml", *alone, "model.sparse.router=switch")
    two = made("eight_devices_global.yaml", *alone, "model.sparse.router=gshard")
    # An expert of 16 takes ceil(1.25 k 512 / 16) rows of a sample; 1.25 rows are reserved for each choice in both.
    assert (one["dispatch"]["rows"], two["dispatch"]["rows"]) == (16 * 40 * 16, 16 * 80 * 16)
    expert = 2 * 512 * 2048 + 512 + 2048
    tokens = 16 * 512
    assert two["step"]["flop"] - one["step"]["flop"] == pytest.approx(6 * 1.25 * expert * tokens * 2, rel=1e-6)
    assert made("eight_devices_global.yaml", *alone, "model.sparse.router=gshard")["advice"] == one["advice"]
    beside = made("eight_devices_global.yaml", *alone, "model.sparse.router=switch", "model.sparse.shared_expert=true")
    assert beside["step"]["flop"] - one["step"]["flop"] == pytest.approx(6 * expert * tokens * 2, rel=1e-6)
    inner = 4 * 2048 * tokens * 2  # before the activation, in both sparse layers
    more = beside["device"]["bytes"]["activations"] - one["device"]["bytes"]["activations"]
    assert more == inner


def test_a_rank_has_slots_for_the_worst_choice_of_domains():
    config = load_config(CONFIGS / "pangu_sigma_1085b.yaml")
    assert activated_slots(config) == 16  # 16 experts of one domain, two on each of 8 ranks
    assert activated_slots(changed(config, {"data.max_domains_per_batch": 2})) == 32
    uneven = {"parallel.expert": 32, "parallel.placement_groups": 1, "parallel.placement": "global"}
    # 16 experts on 32 ranks: every second domain lies on the same ones, so three may meet there.
    assert activated_slots(changed(config, {**uneven, "data.max_domains_per_batch": 3})) == 3 * 32


def test_the_fullest_pipeline_stage_counts():
    name, options = (
        "eight_devices_global.yaml",
        ("parallel.pipeline=2", "train.gradient_accumulation_steps=2", "model.layers=8"),
    )
    config = load_config(CONFIGS / name, options)
    vocabulary = config.model.vocab_size
    first, last = (stage_bytes(config, vocabulary, stage) for stage in range(2))
    # All sparse layers are on top, and the last stage is sent the word table.
    assert [number_of_layers(config, stage) for stage in range(2)] == [(4, 0), (4, 2)]
    words = 8192 * 512 // 2
    shared = {stage: 0 for stage in range(2)}
    experts = 0
    for tensor, shape in tensor_shapes(config, vocabulary).items():
        parts = [getattr(config.parallel.mesh, axis) if axis else 1 for axis in spec_of(tensor, shape)]
        held = math.prod(size // ways for size, ways in zip(shape, parts, strict=True))
        if "routing" in tensor:
            continue
        if tensor.startswith("domains."):
            experts += held
            continue
        low = tensor.startswith(("embedding.word", "embedding.position", *(f"blocks.{i}." for i in range(4))))
        shared[0 if low else 1] += held
    assert first["weights"] == 4 * shared[0]
    assert last["weights"] == 4 * (shared[1] + words + experts)
    assert made(name, *options)["device"]["bytes"] == last


def test_a_stage_keeps_micro_batches_until_their_gradients_come():
    config = load_config(
        CONFIGS / "eight_devices_dense.yaml",
        ("parallel={tensor: 2, pipeline: 4}", "train.gradient_accumulation_steps=4"),
    )
    kept = [stage_bytes(config, config.model.vocab_size, stage)["activations"] for stage in range(4)]
    logits = 2 * 4 * 4 * 512 * 8192 / 2
    assert kept[0] == 4 * kept[2] / 2 == 4 * (kept[3] - logits)
