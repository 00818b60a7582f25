"""float16: its loss curve beside float32's, and the way out of an overflow."""

import numpy as np

from pangu_sigma.config import load_config
from pangu_sigma.data.mixture_sampler import Batch
from pangu_sigma.monitor.metrics_log import read_metrics
from pangu_sigma.training.job import train
from tests.pangu_sigma.training.small_trainer import LENGTH, VOCAB, small_trainer, step_on

STEPS = 100
# Nats per token, between means over ten steps. Measured here: 0.0005 (0.003 between single steps).
TOLERANCE = 0.005


def learnable(step: int) -> Batch:
    """Sequences in which three tokens of four follow from the one before, by a rule of the domain."""
    draw = np.random.default_rng(step)
    domain = np.array([0, 1, 2, 2], np.int32)
    tokens = np.empty((4, LENGTH + 1), np.int32)
    tokens[:, 0] = draw.integers(0, VOCAB, 4)
    for position in range(LENGTH):
        follows = (tokens[:, position] * 5 + 7 * domain + 3) % VOCAB
        tokens[:, position + 1] = np.where(draw.random(4) < 0.75, follows, draw.integers(0, VOCAB, 4))
    return Batch(tokens, domain, 4 * step + np.arange(4), step)


def curve(precision: str) -> np.ndarray:
    """Loss of every step; a step that overflows is tried again on the next batch, as in a run."""
    trainer = small_trainer(train={"precision": precision})
    losses = []
    for index in range(STEPS + 20):
        result = step_on(trainer, len(losses), learnable(index))
        assert result.finite or result.overflow
        if result.finite:
            losses.append(result.loss)
    return np.array(losses[:STEPS])


def test_float16_learns_as_float32_does():
    single, half = curve("float32"), curve("float16")
    assert single[-10:].mean() < single[:10].mean() - 0.5
    smooth = [c.reshape(-1, 10).mean(axis=1) for c in (single, half)]
    assert np.abs(smooth[0] - smooth[1]).max() < TOLERANCE


def test_overflows_cut_the_loss_scale_and_the_run_completes(small_yaml, tmp_path):
    run = tmp_path / "run"
    changes = ["model.dropout=0", "model.attention.dropout=0"]  # compiles faster
    changes += ["train.precision=float16", "train.loss_scale.initial=1e36", "train.loss_scale.factor=1000"]
    train(load_config(small_yaml, [f"run.dir={run}", "evaluate.every=0", "run.tensorboard=false", *changes]))
    records = read_metrics(run)
    messages = [record["message"] for record in records if record["kind"] == "event"]
    assert messages[:2] == ["float16 overflow: loss scale 1e+33", "float16 overflow: loss scale 1e+30"]
    steps = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert all(np.isfinite(record["loss"]) and 0 < record["gradient_norm"] < 100 for record in steps)
    # An overflow is no fault of the run: it does not count against the budget.
    assert steps[-1]["skipped_steps"] == 0 and steps[-1]["loss_scale"] == 1e36 / 1000 ** len(messages)
