"""PanGu-Σ on MindSpore: one language model for many text domains. `import pangu_sigma as ps`; see docs/python.md.

Nothing heavy is imported before a name of it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from pangu_sigma.errors import UserError
from pangu_sigma.version import VERSION as __version__

if TYPE_CHECKING:
    from extract.export.export_job import Export
    from extract.extraction_job import Extraction
    from pangu_sigma.api import (
        analyze,
        dpo,
        evaluate,
        evaluate_tasks,
        export,
        extract,
        init_config,
        load,
        load_config,
        plan_cluster,
        read_metrics,
        serve,
        sft,
        train,
        write_report,
    )
    from pangu_sigma.api_models import (
        add_domain,
        add_domain_of_model,
        extend_vocabulary,
        import_model,
        list_domains,
        merge_models,
        remove_domain,
        rename_domain,
        resize_domain,
        upcycle,
    )
    from pangu_sigma.config import Config
    from pangu_sigma.convert.converted_folder import ConvertedModel
    from pangu_sigma.domains.checkpoint_editor import EditResult
    from pangu_sigma.domains.list_domains import DomainFacts
    from pangu_sigma.evaluation.evaluation_result import DomainEvaluation
    from pangu_sigma.generation.completion import Completion
    from pangu_sigma.language_model import LanguageModel
    from pangu_sigma.new_configuration import NewConfiguration
    from pangu_sigma.serving.model_server import ModelServer
    from pangu_sigma.training.training_result import TrainingResult

__all__ = [
    "Completion",
    "Config",
    "ConvertedModel",
    "DomainEvaluation",
    "DomainFacts",
    "EditResult",
    "Export",
    "Extraction",
    "LanguageModel",
    "ModelServer",
    "NewConfiguration",
    "TrainingResult",
    "UserError",
    "__version__",
    "add_domain",
    "add_domain_of_model",
    "analyze",
    "dpo",
    "evaluate",
    "evaluate_tasks",
    "export",
    "extend_vocabulary",
    "extract",
    "import_model",
    "init_config",
    "list_domains",
    "load",
    "load_config",
    "merge_models",
    "plan_cluster",
    "read_metrics",
    "remove_domain",
    "rename_domain",
    "resize_domain",
    "serve",
    "sft",
    "train",
    "upcycle",
    "write_report",
]

# Names that are not in `api`, by their module.
_MODULES = {
    **dict.fromkeys(
        (
            "add_domain", "add_domain_of_model", "extend_vocabulary", "import_model", "list_domains", "merge_models",
            "remove_domain", "rename_domain", "resize_domain", "upcycle",
        ),  # fmt: skip
        "pangu_sigma.api_models",
    ),
    "ConvertedModel": "pangu_sigma.convert.converted_folder",
    "Completion": "pangu_sigma.generation.completion",
    "Config": "pangu_sigma.config",
    "DomainEvaluation": "pangu_sigma.evaluation.evaluation_result",
    "DomainFacts": "pangu_sigma.domains.list_domains",
    "EditResult": "pangu_sigma.domains.checkpoint_editor",
    "Export": "extract.export.export_job",
    "Extraction": "extract.extraction_job",
    "LanguageModel": "pangu_sigma.language_model",
    "ModelServer": "pangu_sigma.serving.model_server",
    "NewConfiguration": "pangu_sigma.new_configuration",
    "TrainingResult": "pangu_sigma.training.training_result",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'pangu_sigma' has no attribute '{name}'")
    return getattr(import_module(_MODULES.get(name, "pangu_sigma.api")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
