"""Backbone parts by the names of the configuration: adding one touches its own file and one line here."""

from pangu_sigma.model.affine import Norm
from pangu_sigma.model.embedding import LearnedPositions, NextPositionQueries
from pangu_sigma.model.feed_forward import DenseFeedForward
from pangu_sigma.model.head import TiedHead

NORMS = {"layernorm": Norm}
POSITIONS = {"learned": LearnedPositions}
FEED_FORWARDS = {"mlp": DenseFeedForward}
HEADS = {"tied": TiedHead}
QUERY_LAYERS = {"next_position": NextPositionQueries}
