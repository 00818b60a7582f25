"""Router builder: a router of the class that its spec names."""

from __future__ import annotations

from importlib import import_module

from rre.routers.router import Router, RouterOptions


def build_router(options: RouterOptions) -> Router:
    """Build the router of one layer."""
    module, _, name = options.spec.implementation.partition(":")
    return getattr(import_module(module), name)(options)
