"""Backbone parts chosen by name: adding one touches its own file and one line here."""

from pangu_sigma.model.affine import Norm

NORMS = {"layernorm": Norm}
