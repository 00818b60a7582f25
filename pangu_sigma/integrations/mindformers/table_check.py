"""The callback that compares the network's routing tables with those that plan its batches, before the first step.

They differ where `load_checkpoint` brought another model's tables: its experts would then get tokens that they were
never trained on, without any sign of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mindspore.train import Callback

from pangu_sigma.errors import UserError
from pangu_sigma.integrations.mindformers.data_loader import PlannedBatches
from pangu_sigma.integrations.mindformers.mindformers_model import PanGuSigmaForCausalLM
from pangu_sigma.tensor_names import table_name


class PanGuSigmaTableCheck(Callback):
    """`callbacks`: stops a training whose network holds other routing tables than its data loader plans with."""

    def on_train_begin(self, run_context: Any) -> None:
        """Raises UserError naming the first table that differs."""
        arguments = run_context.original_args()
        network = arguments.train_network.network
        batches = arguments.train_dataset.source
        if not isinstance(network, PanGuSigmaForCausalLM) or not isinstance(batches, PlannedBatches):
            raise UserError("PanGuSigmaTableCheck needs PanGuSigmaForCausalLM and PanGuSigmaDataLoader in the YAML")
        planned = {
            table_name(layer_name, owner): table
            for layer_name, by_owner in batches.tables.items() for owner, table in by_owner.items()
        }  # fmt: skip
        for table in network.tables:
            if not np.array_equal(table.asnumpy(), planned[table.name]):
                raise UserError(
                    f"load_checkpoint brought another routing table {table.name} than the texts are planned with: set "
                    "pangu_sigma.run.init_from to the model that was exported, or leave load_checkpoint out"
                )
