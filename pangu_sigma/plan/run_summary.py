"""What a run is about to build and do, in two lines: parameters, experts, tokens, memory, estimated time."""

from __future__ import annotations

import time

import numpy as np

from pangu_sigma.config import Config, parameter_counts
from pangu_sigma.config.capacity_sizes import samples_at_a_time
from pangu_sigma.monitor.printable_text import compact, duration
from pangu_sigma.plan.hardware import GIB, Hardware
from pangu_sigma.plan.requirements import training_memory
from pangu_sigma.plan.time_estimate import step_flops, step_seconds

_MEASURED_SECONDS = 0.05


def run_summary(config: Config, vocabulary: int, step: int = 0) -> list[str]:
    """Lines for the start of a run that has done `step` steps, whose model has a word embedding of `vocabulary` rows.

    Memory is that of the run's processes on this machine (`requirements`); the framework's own is not known.
    """
    counts, model, train = parameter_counts(config, vocabulary), config.model, config.train
    active = max(counts.activated_per_token.values())
    names = list(config.domain_names)
    listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    in_step, left = train.batch_size * config.data.sequence_length, train.steps - step
    memory = sum(training_memory(config, vocabulary).values()) / GIB
    seconds = left * seconds_of_step(config, vocabulary)
    return [
        f"builds {compact(counts.total)} parameters, {compact(active)} active per token: {model.layers} layers, "
        f"{len(model.sparse_prefixes)} with experts; {len(names)} domain{'s' * (len(names) > 1)}: {listed}",
        f"trains {left:,} steps of {in_step:,} tokens ({compact(left * in_step)} in all); about {memory:.2g} GiB of "
        f"memory and {duration(seconds)} at this machine's speed, text and compiling apart",
    ]


def seconds_of_step(config: Config, vocabulary: int) -> float:
    """Estimated seconds of a step: by the plan's rates on Ascend, by a measured matrix product on CPU, whose processes
    share its cores."""
    if config.run.device == "Ascend":
        return sum(step_seconds(config, vocabulary, Hardware()).values())
    return step_flops(config, vocabulary) / _cpu_flops(samples_at_a_time(config) * config.data.sequence_length, config)


def _cpu_flops(rows: int, config: Config) -> float:
    """FLOP/s of a float32 product of a feed-forward network's shape on this machine, now."""
    hidden, ffn = min(config.model.hidden, 1024), min(config.model.ffn, 4096)
    a, b = np.ones((min(max(rows, 1), 1024), hidden), np.float32), np.ones((hidden, ffn), np.float32)
    out, best, end = a @ b, np.inf, time.perf_counter() + _MEASURED_SECONDS
    while (started := time.perf_counter()) < end:
        np.matmul(a, b, out=out)
        best = min(best, time.perf_counter() - started)
    return 2 * a.size * ffn / best
