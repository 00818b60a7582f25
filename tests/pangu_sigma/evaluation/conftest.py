"""The small trained model of the adaptation's tests."""

from tests.pangu_sigma.finetuning.conftest import graph_mode, taught

__all__ = ["graph_mode", "taught"]
