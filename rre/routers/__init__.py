"""The registry of routers: a name of the configuration -> how to build the router of one sparse layer."""

from rre.routers.base import Assignment, Groups, Router
from rre.routers.switch import SwitchRouter
from rre.routers.table import TableRouter

ROUTERS = {"rre": TableRouter, "switch": SwitchRouter}

__all__ = ["ROUTERS", "Assignment", "Groups", "Router", "SwitchRouter", "TableRouter"]
