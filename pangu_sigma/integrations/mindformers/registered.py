"""Registers this product's classes with MindFormers, under the names that its YAML files write."""

from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from pangu_sigma.integrations.mindformers.data import PanGuSigmaDataLoader, PanGuSigmaDataset
from pangu_sigma.integrations.mindformers.model import PanGuSigmaConfig, PanGuSigmaForCausalLM
from pangu_sigma.integrations.mindformers.optimizer import PanGuSigmaAdamW, PanGuSigmaLR
from pangu_sigma.integrations.mindformers.step import PanGuSigmaTrainOneStep
from pangu_sigma.integrations.mindformers.tables import PanGuSigmaTableCheck

REGISTERED = {
    MindFormerModuleType.CONFIG: (PanGuSigmaConfig,),
    MindFormerModuleType.MODELS: (PanGuSigmaForCausalLM,),
    MindFormerModuleType.DATASET_LOADER: (PanGuSigmaDataLoader,),
    MindFormerModuleType.DATASET: (PanGuSigmaDataset,),
    MindFormerModuleType.OPTIMIZER: (PanGuSigmaAdamW,),
    MindFormerModuleType.LR: (PanGuSigmaLR,),
    MindFormerModuleType.WRAPPER: (PanGuSigmaTrainOneStep,),
    MindFormerModuleType.CALLBACK: (PanGuSigmaTableCheck,),
}

for _kind, _classes in REGISTERED.items():
    for _class in _classes:
        MindFormerRegister.register_cls(_class, _kind)
