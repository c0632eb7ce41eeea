# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Chain-of-Experts models in vLLM: `vllm serve FOLDER` and `vllm.LLM(FOLDER)` work wherever this package is installed.

vLLM calls [`register`] in each of its processes (entry point `vllm.general_plugins`). Attention, experts' kernels,
caches, scheduling and parallelism are vLLM's own; routers and the loop over iterations are those of `modeling_coe`.
"""


def register() -> None:
    """Registers configuration and model with vLLM and transformers. May be called any number of times."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    import modeling_coe  # noqa: F401  registers the Auto classes, which vLLM reads configurations with
    from configuration_coe import CoeConfig

    from .configuration import CoeModelArchConfigConvertor, CoeServingConfig, TransformersServingConfig

    MODEL_ARCH_CONFIG_CONVERTORS[CoeConfig.model_type] = CoeModelArchConfigConvertor
    MODELS_CONFIG_MAP["CoeForCausalLM"] = CoeServingConfig
    for backend in ("TransformersForCausalLM", "TransformersMoEForCausalLM"):
        MODELS_CONFIG_MAP.setdefault(backend, TransformersServingConfig)
    # By name: importing the model may initialise a device, which a process that forks later must not.
    ModelRegistry.register_model("CoeForCausalLM", "vllm_coe.model:CoeForCausalLM")
