"""Backbone parts by the names of the configuration: adding one touches its own file and one line here."""

from pangu_sigma.model.affine import Norm, RootMeanSquareNorm
from pangu_sigma.model.embedding import LearnedPositions, NextPositionQueries, RotaryPositions
from pangu_sigma.model.head import TiedHead, UntiedHead

NORMS = {"layernorm": Norm, "rmsnorm": RootMeanSquareNorm}
POSITIONS = {"learned": LearnedPositions, "rope": RotaryPositions}
HEADS = {"tied": TiedHead, "untied": UntiedHead}
QUERY_LAYERS = {"next_position": NextPositionQueries}
