"""Backbone parts by the names of the configuration: adding one touches its own file and one line here."""

from pangu_sigma.model.layers.embedding import LearnedPositions, NextPositionQueries, RotaryPositions
from pangu_sigma.model.layers.linear_and_norm import Norm, RootMeanSquareNorm
from pangu_sigma.model.layers.tied_embedding_head import TiedHead, UntiedHead

NORMS = {"layernorm": Norm, "rmsnorm": RootMeanSquareNorm}
POSITIONS = {"learned": LearnedPositions, "rope": RotaryPositions}
HEADS = {"tied": TiedHead, "untied": UntiedHead}
QUERY_LAYERS = {"next_position": NextPositionQueries}
