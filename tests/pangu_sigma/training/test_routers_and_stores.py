"""Every router under every dispatch and expert store that it has, and a sentence for what it has not."""

import numpy as np
import pytest

from pangu_sigma.errors import UserError
from rre.router_specs import MIXTURE_GATE, ROUTER_SPECS
from tests.pangu_sigma.training.small_trainer import LENGTH, batch, small_config, small_trainer, step_on, tensors_now

STORES = ("device", "host", "disk")
DISPATCHES = ("dropless", "capacity")
SPECS = {**ROUTER_SPECS, MIXTURE_GATE.name: MIXTURE_GATE}
ALL = [(router, dispatch, store) for router in SPECS for dispatch in DISPATCHES for store in STORES]
MORE = {"noisy_top_k": {"top_k": 2}, "olmoe": {"top_k": 2}}
# One layer is the whole model: graphs take seconds to compile.
SHORT = {"layers": 1, "query_layer": "none"}


def refusal(router: str, dispatch: str, store: str) -> str | None:
    """What the configuration says to a combination that means nothing; None where there is one."""
    if dispatch == "capacity" and router == "expert_choice":
        return "every expert takes a fixed number of tokens"
    if dispatch == "capacity" and router == "every_expert":
        return "every expert takes every row"
    if store != "device" and SPECS[router].learned:
        return "set experts.store to device"
    return None


def sections(router: str, dispatch: str, store: str) -> dict:
    sparse = {"router": router, "dispatch": dispatch, "capacity_factor": 0.5, **MORE.get(router, {})}
    model = {**SHORT, "sparse": sparse}
    if router == "every_expert":
        model |= {"top_layer": "mixture", "sparse": {"layers": 0, "dispatch": dispatch}}
    return {"model": model, "experts": {"store": store, "resident_gib": 0.001}}


WORKS = [case for case in ALL if refusal(*case) is None]


def test_table_routers_have_all_stores_and_gates_both_dispatches_unless_every_expert_is_full():
    assert len(ALL) == 9 * 2 * 3 and len(WORKS) == 2 * 2 * 3 + 5 * 2 + 2


@pytest.mark.parametrize("case", [case for case in ALL if refusal(*case)], ids="-".join)
def test_what_a_router_cannot_do_is_refused_with_a_sentence(case):
    with pytest.raises(UserError, match=refusal(*case)):
        small_config(**sections(*case))
    small_config(**sections("rre", *case[1:]))  # it is the router's doing


def trained(case: tuple[str, str, str], tmp_path) -> tuple[dict[str, np.ndarray], dict]:
    """Tensors after three steps, and what the steps recorded."""
    given = sections(*case)
    trainer = small_trainer(given["model"], experts=given["experts"], run={"dir": str(tmp_path / case[2])})
    for step in range(3):
        assert step_on(trainer, step, batch(step, [0, 1, 2, 0])).finite
    tensors = tensors_now(trainer)
    trainer.model.store.close()
    return tensors, trainer.take_record()


# Two that nothing else covers are quick enough for every run of the tests; the others are long ones together.
QUICK = {("hash", "capacity"), ("every_expert", "dropless")}
ONCE = [pytest.param(r, d, marks=() if (r, d) in QUICK else pytest.mark.slow, id=f"{r}-{d}")
        for r, d, store in WORKS if store == "device"]  # fmt: skip


@pytest.mark.parametrize(("router", "dispatch"), ONCE)
def test_every_store_trains_the_same_model_and_capacity_alone_drops(router, dispatch, tmp_path):
    tensors, figures = trained((router, dispatch, "device"), tmp_path)
    (load,) = ([n for rows in by.values() for n in rows] for by in figures["expert_load"].values())
    (dropped,) = ([share for share in by.values()] for by in figures["dropped_share"].values())
    rows = 3 * 4 * LENGTH
    if router == "expert_choice":
        assert len(set(load)) == 1  # even by construction
    else:
        assert (max(dropped) > 0.1) == (dispatch == "capacity")
    if router == "every_expert":
        assert load == [rows] * 6
    elif dispatch == "dropless" and SPECS[router].experts_per_token == 1:
        assert sum(load) == rows
    for store in STORES[1:] if not SPECS[router].learned else ():
        other, record = trained((router, dispatch, store), tmp_path)
        assert record["expert_load"] == figures["expert_load"] and record["dropped_share"] == figures["dropped_share"]
        for name, tensor in tensors.items():
            np.testing.assert_allclose(other[name], tensor, rtol=1e-5, atol=1e-7, err_msg=name)
