"""Hash layers: one table over all experts of the layer, whoever wrote the text."""

import numpy as np

from parallel.operator_layout import Layout
from rre.dispatch.dispatch_plan import DROPPED
from rre.router_specs import LAYER, ROUTER_SPECS
from rre.routers import ExpertGroups, RouterOptions, build_router

GROUPS = ExpertGroups(("code", "law"), (3, 2))
TABLE = np.array([4, 0, 3, 3, 1, 2], np.int32)
TOKENS = np.array([[0, 1, 2, 3], [2, 3, 2, 5]])


def assigned(training: bool, factor: float | None = None) -> np.ndarray:
    spec = ROUTER_SPECS["hash"]
    router = build_router(RouterOptions(spec, GROUPS, 8, 4, Layout(), tables={LAYER: TABLE}, capacity_factor=factor))
    return router.assign(TOKENS, np.array([0, 1]), 3, np.array([7, 8]), training).reshape(TOKENS.shape)


def test_the_expert_is_the_tables_entry_in_training_and_evaluation_for_every_domain():
    for training in (True, False):
        np.testing.assert_array_equal(assigned(training), TABLE[TOKENS])


def test_an_expert_takes_its_share_of_a_sample_first_come_first_served_and_evaluation_drops_nothing():
    # ceil(1.25 * 4 tokens / 5 experts) = 1
    np.testing.assert_array_equal(assigned(True, 1.25), [[4, 0, 3, DROPPED], [3, DROPPED, DROPPED, 2]])
    np.testing.assert_array_equal(assigned(False, 1.25), TABLE[TOKENS])
