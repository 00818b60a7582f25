"""The registry of routers: a name of the configuration -> the class that builds the router of one sparse layer.

`rre.router_specs` says of each name what must be known before a framework is loaded; a new router is one file and
one line in both.
"""

from rre.routers.every_expert import EveryExpertRouter
from rre.routers.expert_choice import ExpertChoiceRouter
from rre.routers.glam import GlamRouter
from rre.routers.gshard import GShardRouter
from rre.routers.hash import HashRouter
from rre.routers.noisy_top_k import NoisyTopKRouter
from rre.routers.olmoe import OlmoeRouter
from rre.routers.router import Assignment, ExpertGroups, Router, RouterOptions
from rre.routers.switch import SwitchRouter
from rre.routers.table_router import TableRouter

ROUTERS: dict[str, type[Router]] = {
    "rre": TableRouter,
    "hash": HashRouter,
    "switch": SwitchRouter,
    "gshard": GShardRouter,
    "glam": GlamRouter,
    "noisy_top_k": NoisyTopKRouter,
    "olmoe": OlmoeRouter,
    "expert_choice": ExpertChoiceRouter,
    "every_expert": EveryExpertRouter,
}

__all__ = ["ROUTERS", "Assignment", "ExpertGroups", "Router", "RouterOptions", "SwitchRouter", "TableRouter"]
