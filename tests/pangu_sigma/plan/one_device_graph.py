"""In the dry process: the training graph of one Ascend device, with its own operators, compiled without one.

python one_device_graph.py CONFIG.yaml [section.key=value …]
"""

import sys

import mindspore as ms
from mindspore.nn.utils import no_init_parameters

from pangu_sigma.config import load_config
from pangu_sigma.data.tokenizers.vocabulary_size import vocabulary_size
from pangu_sigma.model.build_model import build_model
from pangu_sigma.training.objective import TrainingObjective
from pangu_sigma.training.step import GradientStep

config = load_config(sys.argv[1], sys.argv[2:])
ms.set_context(device_target="GPU", mode=ms.GRAPH_MODE, save_graphs=2, save_graphs_path="graphs")
with no_init_parameters():
    layer_names = config.model.sparse_prefixes
    model = build_model(config, vocabulary_size(config), 0, tables={p: {} for p in layer_names}, initialise=False)
    step = GradientStep(
        model.net, model.training_inputs(config.train.batch_size), model.layout, True, TrainingObjective()
    )
ms.set_recursion_limit(100_000)
step.compile(*step.get_inputs())
