"""Registers this product's classes with MindFormers, under the names that its YAML files write."""

from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from pangu_sigma.integrations.mindformers.data_loader import PanGuSigmaDataLoader, PanGuSigmaDataset
from pangu_sigma.integrations.mindformers.mindformers_model import PanGuSigmaConfig, PanGuSigmaForCausalLM
from pangu_sigma.integrations.mindformers.mindformers_optimizer import PanGuSigmaAdamW, PanGuSigmaLR
from pangu_sigma.integrations.mindformers.table_check import PanGuSigmaTableCheck
from pangu_sigma.integrations.mindformers.train_one_step import PanGuSigmaTrainOneStep

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
