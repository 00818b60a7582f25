"""The plan of a configuration: memory against limits, bytes and time of a step, what to change if it does not fit."""

from __future__ import annotations

from dataclasses import asdict
from operator import attrgetter
from typing import Any

from pangu_sigma.config import Config, config_from_dict, parameter_counts
from pangu_sigma.config.capacity_sizes import dispatch_buffer
from pangu_sigma.config.load_config import load_values
from pangu_sigma.data.tokenizers.vocabulary_size import vocabulary_size
from pangu_sigma.errors import UserError, argument
from pangu_sigma.plan.hardware import GIB, PAPER_DEVICES, PAPER_TOKENS_PER_SECOND, Hardware
from pangu_sigma.plan.memory_estimate import device_bytes, host_bytes
from pangu_sigma.plan.time_estimate import step_flops, step_seconds
from pangu_sigma.plan.traffic_estimate import step_bytes

# Tried in this order where a device's memory does not suffice: the cheapest first.
REMEDIES: tuple[tuple[str, Any], ...] = (
    ("parallel.optimizer_parallel", True),
    ("train.recompute", True),
    ("parallel.sequence_parallel", True),
    ("experts.store", "host"),
    *(("train.gradient_accumulation_steps", parts) for parts in (2, 4, 8)),
    *(("parallel.tensor", parts) for parts in (2, 4, 8)),
)


def for_devices(config: Config, devices: int | None) -> Config:
    """The configuration on so many devices: parallel.data takes what the other axes leave, and a batch that nobody
    wrote is a multiple of the ranks that read. Raises UserError."""
    mesh = config.parallel.mesh
    if devices is None or devices == mesh.size:
        return config
    others = mesh.expert * mesh.tensor * mesh.pipeline
    if devices < 1 or devices % others:
        raise UserError(
            f"{argument('devices', devices)} is no multiple of parallel.expert x tensor x pipeline = {others}: choose "
            "a multiple, or change one of them"
        )
    values = config.written()
    values.setdefault("parallel", {})["data"] = devices // others
    return load_values(values, f"parallel.data={devices // others}")


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """The configuration with other values at these keys, checked by all rules. Raises UserError."""
    values = config.to_dict()
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    return config_from_dict(values, " ".join(f"{k}={v}" for k, v in changes.items()))


def plan(config: Config, hardware: Hardware, devices: int | None = None) -> dict[str, Any]:
    """The plan as plain values for JSON; bytes, seconds, FLOP. Raises UserError for what does not divide."""
    config = for_devices(config, devices)
    if config.run.device == "Ascend" and config.model.sparse_prefixes and config.model.sparse.dispatch == "dropless":
        raise UserError("model.sparse.dispatch is dropless, which no fixed memory can hold: set it to capacity")
    vocabulary = vocabulary_size(config)
    mesh = config.parallel.mesh
    on_device, on_host = device_bytes(config, vocabulary), host_bytes(config, hardware)
    seconds = step_seconds(config, vocabulary, hardware)
    tokens = config.train.batch_size * config.data.sequence_length
    sent = dispatch_buffer(config)
    report: dict[str, Any] = {
        "devices": mesh.size,
        "mesh": asdict(mesh),
        "parameters": parameter_counts(config, vocabulary).to_dict(),
        "assumptions": asdict(hardware),
        "device": _against(on_device, hardware.device_gib),
        "host": _against({"experts and moments": on_host}, hardware.host_gib),
        "dispatch": None
        if sent is None
        else {"slots": sent.slots, "rows": sent.rows, "tokens": sent.tokens, "times_tokens": sent.times_tokens},
        "step": {
            "tokens": tokens,
            "flop": step_flops(config, vocabulary),
            "bytes_per_device": step_bytes(config, vocabulary),
            "seconds": seconds,
            "total_seconds": sum(seconds.values()),
            "tokens_per_second": tokens / sum(seconds.values()),
        },
        "placements": _placements(config, vocabulary),
        "paper": {"tokens_per_second": PAPER_TOKENS_PER_SECOND, "devices": PAPER_DEVICES},
    }
    report["fits"] = report["device"]["fits"] and report["host"]["fits"]
    report["advice"] = _advice(config, vocabulary, hardware, report)
    return report


def _against(parts: dict[str, float], limit_gib: float) -> dict[str, Any]:
    total = sum(parts.values())
    return {"bytes": parts, "total": total, "limit": limit_gib * GIB, "fits": total <= limit_gib * GIB}


def _placements(config: Config, vocabulary: int) -> dict[str, dict[str, float]]:
    """Bytes of the step's all-to-alls a device under this placement, and under the global one beside it."""
    by_placement = {}
    variants = {config.parallel.placement: config}
    if config.parallel.placement == "domain":
        # The same experts and the same domains in a step; only that any rank may read any of them.
        limit = config.data.max_domains_per_batch
        everywhere = None if limit is None else limit * config.parallel.placement_groups
        variants["global"] = changed(
            config,
            {"parallel.placement": "global", "parallel.placement_groups": 1, "data.max_domains_per_batch": everywhere},
        )
    for name, variant in variants.items():
        sent = step_bytes(variant, vocabulary)
        by_placement[name] = {
            "exchange_ranks": variant.parallel.mesh.exchange_size,
            "all-to-all": sent["all-to-all"],
            "all-reduce": sent["tensor sums"] + sent["gradient sums"],
        }
    return by_placement


def _advice(config: Config, vocabulary: int, hardware: Hardware, report: dict[str, Any]) -> list[str]:
    """Sentences: which change makes it fit, alone or with the ones before it."""
    advice = []
    if not report["device"]["fits"]:
        advice += _device_advice(config, vocabulary, hardware, report["device"]["total"])
    if not report["host"]["fits"]:
        hosts = -(-report["devices"] // hardware.devices_per_host)
        needed = -(-report["host"]["total"] * hosts // (hardware.host_gib * GIB))
        advice.append(
            f"a host needs {report['host']['total'] / GIB:,.1f} of {hardware.host_gib:,.0f} GiB: spread the experts "
            f"over {needed:,.0f} hosts (parallel.expert), give hosts more memory, or set experts.store=disk"
        )
    sent = report["dispatch"]
    sparse = config.model.sparse
    if sent is not None and sent["times_tokens"] > 2 * sparse.capacity_factor * config.experts_per_token:
        advice.append(
            f"{sent['times_tokens']:.1f} rows are reserved for each token, because any sample may be of any of "
            f"{sent['slots']} experts: use parallel.placement=domain with more groups, or a host store with a smaller "
            "data.max_domains_per_batch"
        )
    return advice


def _device_advice(config: Config, vocabulary: int, hardware: Hardware, total: float) -> list[str]:
    best, taken = total, {}
    limit = hardware.device_gib * GIB
    current = config
    for key, value in REMEDIES:
        old = attrgetter(key)(current)
        if old == value or (type(value) is int and old >= value):
            continue
        try:
            tried = changed(current, {key: value})
        except UserError:
            continue  # this layout does not divide: another remedy
        now = sum(device_bytes(tried, vocabulary).values())
        if now < 0.98 * best:
            best, current = now, tried
            taken[key] = value
        if best <= limit:
            break
    if not taken:
        return [f"a device needs {total / GIB:,.1f} of {hardware.device_gib:,.0f} GiB: use more devices"]
    changes = " ".join(f"{k}={str(v).lower()}" for k, v in taken.items())
    ending = "" if best <= limit else ", which is still too much: use more devices"
    more = current.parallel.mesh.size
    devices = f" on {more} devices" if more != config.parallel.mesh.size else ""
    return [
        f"a device needs {total / GIB:,.1f} of {hardware.device_gib:,.0f} GiB: set {changes} for {best / GIB:,.1f} "
        f"GiB{devices}{ending}"
    ]
