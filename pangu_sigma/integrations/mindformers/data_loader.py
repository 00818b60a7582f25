"""Data loader and dataset of MindFormers over our token stores: our sampler's batches, planned, one a step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mindformers.dataset import BaseDataset
from mindformers.dataset.dataloader import build_dataset_loader
from mindformers.tools.utils import get_output_root_path, get_real_rank
from mindspore import context
from mindspore.dataset import GeneratorDataset

from pangu_sigma.data.mixture_sampler import MixtureSampler
from pangu_sigma.errors import UserError
from pangu_sigma.integrations.mindformers.batch_columns import columns, open_text, row, structure_of
from pangu_sigma.integrations.mindformers.companion_files import write_companion
from pangu_sigma.integrations.mindformers.mindformers_settings import model_settings
from pangu_sigma.model.batch_planner import BatchPlanner
from pangu_sigma.training.schedule import domain_weights


class PlannedBatches:
    """`steps` whole batches as rows of columns; this process's part of each, in order, once."""

    def __init__(self, sections: Any, steps: int, batch_size: int, shard: int, shards: int) -> None:
        text = open_text(model_settings(sections, context.get_context("device_target"), get_output_root_path()))
        if get_real_rank() == 0:
            write_companion(Path(get_output_root_path()), text)
        model = structure_of(text)
        self.tables = model.tables
        self.steps = steps
        self.inputs = model.training_inputs(batch_size)
        self._planner = BatchPlanner(model, self.inputs, training=True)
        self._batch_size = batch_size * shards
        self._rows = slice(shard * batch_size, (shard + 1) * batch_size)
        config = text.config
        self._sampler = MixtureSampler(
            text.corpus.training_streams(),
            partial(domain_weights, config),
            config.run.seed,
            config.data.max_domains_per_batch,
        )

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        for _ in range(self.steps):
            batch = self._sampler.next_batch(self._batch_size, self._rows)
            planned = self._planner(
                batch.tokens, batch.domain, batch.sample, batch.step, batch.mask, batch.padding
            )
            yield row(planned, self.inputs)


class PanGuSigmaDataLoader:
    """`train_dataset.data_loader`: planned batches of the texts that `pangu_sigma` describes, for `steps` steps.

    The order of the samples is our own trainer's for the same sections, seed and global batch size.
    """

    def __new__(
        cls, pangu_sigma: Any, steps: int, batch_size: int, shard_id: int | None = None, num_shards: int | None = None
    ) -> GeneratorDataset:
        batches = PlannedBatches(pangu_sigma, steps, batch_size, shard_id or 0, num_shards or 1)
        return GeneratorDataset(
            batches,
            column_names=columns(batches.inputs),
            shuffle=False,
            num_parallel_workers=1,
            python_multiprocessing=False,
        )


class PanGuSigmaDataset(BaseDataset):
    """`train_dataset_task`: builds the data loader for this process's part of every batch."""

    def __new__(cls, dataset_config: Any = None) -> GeneratorDataset:
        if dataset_config is None or not dataset_config.get("data_loader"):
            raise UserError("train_dataset.data_loader is missing: name PanGuSigmaDataLoader there")
        cls.init_dataset_config(dataset_config)
        shard_id, num_shards = cls._generate_shard_info()
        settings = {"batch_size": dataset_config["batch_size"], "shard_id": shard_id, "num_shards": num_shards}
        return build_dataset_loader(dataset_config["data_loader"], default_args=settings)
