"""Routers of sparse layers: one file for each, found by its spec (`rre.router_specs`)."""

from rre.routers.build_router import build_router
from rre.routers.router import ExpertGroups, Router, RouterOptions
