"""The small trained model of the adaptation's tests."""

from tests.pangu_sigma.adapt.conftest import graph_mode, taught

__all__ = ["graph_mode", "taught"]
