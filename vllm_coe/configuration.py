# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What vLLM has to know of a chain before it builds one, and which chains it would compute differently."""

from collections.abc import Iterator

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase
from vllm.utils.math_utils import round_up
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from configuration_coe import BACKBONES, CoeConfig


# Widths of latent plus rotary part that vLLM has kernels for: some device has each.
LATENT_HEAD_SIZES = (320, 512, 576)
# The rotary embeddings whose angles depend on the position alone, which vLLM tabulates as transformers does.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def caches_latents(config: CoeConfig) -> bool:
    """Whether vLLM's latent attention (MLA) can serve a model. Its keys and values are expanded otherwise."""
    if not BACKBONES[config.backbone].has_latent_attention or config.sliding_window is not None:
        return False
    if config.attention_bias or not is_interleaved(config):
        return False
    if current_platform.is_cpu():
        return (config.kv_lora_rank, config.qk_rope_head_dim) == (512, 64)
    return config.kv_lora_rank + config.qk_rope_head_dim in LATENT_HEAD_SIZES


def is_interleaved(config: CoeConfig) -> bool:
    """Whether latent attention rotates neighbouring dimensions, rather than those half a head apart."""
    return config.backbone == "deepseek_v2" or config.rope_interleave


def expanded_head_size(config: CoeConfig) -> int:
    """Width of the heads that expanded keys and values are cached with: `qk_head_dim`, or the next with a kernel."""
    if current_platform.is_cpu():
        sizes = [size for size in CPUAttentionBackend.get_supported_head_sizes() if size >= config.qk_head_dim]
        return min(sizes, default=config.qk_head_dim)
    return round_up(config.qk_head_dim, 8)


class CoeModelArchConfigConvertor(ModelArchConfigConvertorBase):
    """Says which chains have latent attention, and how wide a head is in the cache."""

    def is_deepseek_mla(self) -> bool:
        return caches_latents(self.hf_text_config)

    def get_head_size(self) -> int:
        config = self.hf_text_config
        if not BACKBONES[config.backbone].has_latent_attention:
            return config.head_dim
        if self.is_deepseek_mla() and not envs.VLLM_MLA_DISABLE:
            return config.kv_lora_rank + config.qk_rope_head_dim
        return expanded_head_size(config)


class CoeServingConfig(VerifyAndUpdateConfig):
    """Refuses what vLLM would compute differently, when an engine is configured."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        for problem in differences(vllm_config):
            raise ValueError(f"vLLM does not serve this Chain-of-Experts model: {problem}")
        # Layers of experts are found by name. Found by counting calls, the second iteration would be the next layer.
        vllm_config.compilation_config.fast_moe_cold_start = False
        model_config, attention_config = vllm_config.model_config, vllm_config.attention_config
        if current_platform.is_cpu() and model_config.use_mla and model_config.dtype != torch.bfloat16:
            # vLLM would take the kernel of AMX wherever the processor has that, which computes in bfloat16 alone.
            attention_config.backend = AttentionBackendEnum.CPU_MLA


def differences(vllm_config: VllmConfig) -> Iterator[str]:
    """What vLLM would compute differently from transformers: field, value and remedy of each."""
    config: CoeConfig = vllm_config.model_config.hf_config
    backbone = config.backbone
    attention = f"with `backbone={backbone!r}`, whose attention in vLLM has none"
    if config.hidden_act != "silu":
        yield f"`hidden_act` is {config.hidden_act!r}, and vLLM's gated MLPs have 'silu'. Use transformers for it."
    if backbone in ("olmoe", "qwen3", "qwen3_moe") and config.attention_bias:
        yield f"`attention_bias` is True {attention} in its output projection. Use transformers for it."
    if backbone == "olmoe" and config.clip_qkv is not None:
        yield f"`clip_qkv` is {config.clip_qkv} {attention}. Use transformers for it."
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        yield (
            f"`rope_parameters['rope_type']` is {rope_type!r}; vLLM has the same angles for {ROPE_TYPES}. Use "
            "transformers for it."
        )
    if current_platform.is_cpu() and config.num_sparse_layers and config.hidden_size % 32:
        yield (
            f"`hidden_size` is {config.hidden_size}, and vLLM's experts need a multiple of 32 on the CPU. Use "
            "transformers for it."
        )
    if quantization := getattr(config, "quantization_config", None):
        method = quantization["quant_method"] if isinstance(quantization, dict) else quantization.quant_method
        yield (
            f"`quantization_config` says that the weights are quantised ({getattr(method, 'value', method)}). Serve "
            "the original weights, quantised by vLLM if need be (`--quantization`)."
        )
    if vllm_config.parallel_config.enable_eplb:
        yield "`enable_eplb` is True, which counts one call of a layer's experts. Leave it out."
    if vllm_config.aux_output_config.enable_return_routed_experts:
        yield "`enable_return_routed_experts` is True, which keeps one call of a layer's experts. Leave it out."
