"""What a router itself costs: milliseconds for the routing of 2,048 tokens in one sparse layer, by the clock.

    python -m benchmarks.router_time [ROUTER …]

A gate is compiled alone, forward and backward; a table's part is on the host: looking up, sorting and balancing blocks
of one layer, which in training runs ahead in the reading thread. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

TOKENS, SAMPLES, REPEATS, WARMUP = 2048, 16, 60, 36


def milliseconds(work) -> float:
    """The median of REPEATS calls after WARMUP others (MindSpore chooses its threads over the first launches)."""
    taken = []
    for number in range(WARMUP + REPEATS):
        start = time.perf_counter()
        work()
        if number >= WARMUP:
            taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken)


def measure(name: str) -> float:
    """Milliseconds of one layer's routing of TOKENS tokens under the system `name`."""
    import mindspore as ms
    from mindspore import Tensor, nn, ops

    from benchmarks.router_systems import DOMAINS, SYSTEMS
    from parallel.operator_layout import Layout
    from parallel.ops.compiled_kernels import library
    from rre.dispatch.dispatch_plan import plan_present
    from rre.router_specs import ROUTER_SPECS
    from rre.routers import ExpertGroups, RouterOptions, build_router
    from rre.routing_tables import draw_owned_table

    system = SYSTEMS[name]
    spec = ROUTER_SPECS[system.router]
    groups = ExpertGroups(DOMAINS, (system.experts,) * len(DOMAINS))
    draw = np.random.default_rng(0)
    ids = draw.zipf(1.3, (SAMPLES, TOKENS // SAMPLES)).astype(np.int64) % 4096
    domain = np.arange(SAMPLES, dtype=np.int32) % len(DOMAINS)
    experts = dict.fromkeys(DOMAINS, system.experts)
    owners = spec.table_owners(DOMAINS)
    tables = {owner: draw_owned_table("uniform", 1, "blocks.0", owner, 4096, experts, {}) for owner in owners}
    capacity = 1.25 if "model.sparse.dispatch=capacity" in system.more else None
    router = build_router(
        RouterOptions(spec, groups, 192, TOKENS // SAMPLES, Layout("CPU", library()), top_k=system.top_k, tables=tables,
                      capacity_factor=capacity)
    )  # fmt: skip
    if not spec.learned:
        return milliseconds(
            lambda: plan_present(router.assign(ids, domain, 0, np.arange(SAMPLES), True), groups.total)
        )

    class Whole(nn.Cell):
        """The gate with something to differentiate: its combine weights and its loss."""

        def __init__(self) -> None:
            super().__init__()
            self.gate = router.cell()

        def construct(self, x, noise):
            plan, weights, auxiliary, rows = self.gate(x, noise)
            return weights.sum() + auxiliary, plan, rows

    net = Whole().set_train()
    step = ops.value_and_grad(net, 0, ms.ParameterTuple(net.trainable_params()), has_aux=True)
    compiled = ms.jit(step)
    x = Tensor(draw.standard_normal((TOKENS, 192)).astype(np.float32))
    noise = ()
    if router.noise_shape(TOKENS):
        noise = (Tensor(router.noise(0, np.arange(SAMPLES))),)

    def once() -> None:
        (value, *_), _ = compiled(x, noise)
        value.asnumpy()

    return milliseconds(once)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a router itself costs.")
    parser.add_argument("routers", nargs="*", metavar="ROUTER", default=[])
    given = parser.parse_args()
    from benchmarks.router_systems import SYSTEMS

    names = given.routers or [name for name, system in SYSTEMS.items() if system.router]
    print(json.dumps({name: measure(name) for name in names}))


if __name__ == "__main__":
    main()
