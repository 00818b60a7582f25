"""Built model of one process: its structure with the weights, in the network and in the expert store."""

from __future__ import annotations

from dataclasses import dataclass

from pangu_sigma.model.model_structure import ModelStructure
from pangu_sigma.model.pangu import PanGuSigma
from pangu_sigma.model.sharded_parameters import SharedParameters
from rre.store import ExpertStore


@dataclass(frozen=True)
class Model(ModelStructure):
    """A built model: the network, its shared parameters as this process holds them, and the store of every domain's
    experts."""

    store: ExpertStore
    net: PanGuSigma
    shared: SharedParameters
