"""Chain-of-Experts models for transformers.

`import modeling_coe` is all that is needed: the Auto classes then load, train and save Chain-of-Experts checkpoints,
those of the official implementation included.
"""

from importlib import import_module
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import CONFIG_NAME

from configuration_coe import CoeConfig
from configuration_coe.configuration_coe import OFFICIAL_MODEL_TYPE

from . import experts
from .lora import lora_config, register_default_targets
from .modeling_coe import (
    CoeForCausalLM,
    CoeForQuestionAnswering,
    CoeForSequenceClassification,
    CoeForTokenClassification,
    CoeModel,
    CoePreTrainedModel,
)
from .quantization import int4_weight_only, int8_weight_only, quantization_report


AutoConfig.register(CoeConfig.model_type, CoeConfig, exist_ok=True)
# `AutoConfig.register` insists on the class's own `model_type`; the official one is only ever read.
CONFIG_MAPPING.register(OFFICIAL_MODEL_TYPE, CoeConfig, exist_ok=True)
CoeConfig.register_for_auto_class()
for _auto_class, _model_class in (
    (AutoModel, CoeModel),
    (AutoModelForCausalLM, CoeForCausalLM),
    (AutoModelForSequenceClassification, CoeForSequenceClassification),
    (AutoModelForTokenClassification, CoeForTokenClassification),
    (AutoModelForQuestionAnswering, CoeForQuestionAnswering),
):
    _auto_class.register(CoeConfig, _model_class, exist_ok=True)
    # Saved folders then carry the code of the class.
    _model_class.register_for_auto_class(_auto_class)
    # Where pipelines and `transformers serve` look for the class that a folder's `architectures` names. Not the module
    # of an `import` above: transformers puts another in its place while it is imported.
    setattr(import_module("transformers"), _model_class.__name__, _model_class)
register_default_targets()


def _megablocks_experts_forward(*args):
    # Imported by the first call, so that `python -m modeling_coe.megablocks` runs a module not imported before.
    from .megablocks import megablocks_experts_forward

    return megablocks_experts_forward(*args)


def _prefers_megablocks(weight):
    if weight.device.type != "cuda":
        return False
    from .megablocks import is_preferred

    return is_preferred(weight)


ALL_EXPERTS_FUNCTIONS.register("megablocks", _megablocks_experts_forward)
experts.prefers_megablocks = _prefers_megablocks


def _write_model_card(model, folder, **details):
    # Imported when a model is saved, since `model_cards` is built on this package's configuration.
    import model_cards

    if (Path(folder) / CONFIG_NAME).is_file():  # or else an adapter is all that is saved
        model_cards.write(model, folder, **details)


CoePreTrainedModel.write_model_card = _write_model_card

__all__ = [
    "CoeConfig",
    "CoeForCausalLM",
    "CoeForQuestionAnswering",
    "CoeForSequenceClassification",
    "CoeForTokenClassification",
    "CoeModel",
    "CoePreTrainedModel",
    "int4_weight_only",
    "int8_weight_only",
    "lora_config",
    "quantization_report",
]
