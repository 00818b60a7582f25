"""The models that the commands work on: made by the fixtures of the packages behind them."""

from tests.extract.conftest import parent
from tests.pangu_sigma.convert.conftest import dense, pieces, sparse_yaml, vocab_model

__all__ = ["dense", "parent", "pieces", "sparse_yaml", "vocab_model"]
