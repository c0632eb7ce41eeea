# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What vLLM has to know of a chain before it builds one, and which chains it would compute differently."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from vllm import envs
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase
from vllm.utils.math_utils import round_up
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from configuration_coe import BACKBONES, CoeConfig
from modeling_coe.checkpoint import check_chain_keys, read_keys


# Widths of latent plus rotary part that vLLM has kernels for: some device has each.
LATENT_HEAD_SIZES = (320, 512, 576)
# The rotary embeddings whose angles depend on the position alone, which vLLM tabulates as transformers does.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# The modules that adapters can be served for, under the names that PEFT saves them with.
LORA_MODULES = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    *("gate_proj", "up_proj", "down_proj", "shared_expert_gate", "embed_tokens", "lm_head"),
)
# What may serve a model that the plugin's own does not, or the other way round.
TRANSFORMERS_BACKEND = "Serve it with vLLM's Transformers backend: `--model-impl transformers`."
OWN_MODEL = "Serve it with the plugin's own model: leave `model_impl` out."


def module_name(name: str) -> str:
    """The name in memory of a tensor on disk: there, scales of a converted chain are not in a module of their own."""
    return f"{name}.weight" if name.endswith(".iteration_scale") else name


def caches_latents(config: CoeConfig) -> bool:
    """Whether vLLM's latent attention (MLA) can serve a model. Its keys and values are expanded otherwise."""
    if not BACKBONES[config.backbone].has_latent_attention or config.attention_bias or not is_interleaved(config):
        return False
    return has_latent_kernel(config)


def has_latent_kernel(config: CoeConfig) -> bool:
    """Whether vLLM's latent attention has a kernel for the sizes of a model that has latents."""
    if config.sliding_window is not None:
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
        if problem := next(differences(vllm_config), None):
            raise ValueError(f"vLLM does not serve this Chain-of-Experts model: {problem}")
        # Layers of experts are found by name. Found by counting calls, the second iteration would be the next layer.
        vllm_config.compilation_config.fast_moe_cold_start = False
        # The experts are left out: vLLM would replace their runner, and refuses adapters of what it has not replaced.
        if (lora_config := vllm_config.lora_config) is not None and lora_config.target_modules is None:
            lora_config.target_modules = list(LORA_MODULES)
        choose_latent_kernel(vllm_config)


class TransformersServingConfig(VerifyAndUpdateConfig):
    """The same for vLLM's Transformers backend, which runs the model of `modeling_coe` with attention and experts of
    its own in place. It serves models of every kind, of which others are left alone."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        model_config = vllm_config.model_config
        if model_config.hf_config.model_type != CoeConfig.model_type:
            return
        if problem := next(backend_differences(vllm_config), None):
            raise ValueError(f"vLLM's Transformers backend does not serve this Chain-of-Experts model: {problem}")
        # Its loader misses no expert as long as another of the layer is there.
        files = sorted(Path(model_config.model).glob("*.safetensors"))
        check_chain_keys(map(module_name, read_keys(files)), model_config.hf_config)
        vllm_config.compilation_config.fast_moe_cold_start = False
        if backend_caches_latents(model_config):
            config = model_config.hf_config
            model_config.model_arch_config.head_size = config.kv_lora_rank + config.qk_rope_head_dim
            choose_latent_kernel(vllm_config)
        elif model_config.use_mla:
            # As the backend does too, but only while it builds the model. Until then vLLM would lay the cache out
            # for latents: on a processor without AMX in blocks that attention of whole heads has no kernel for.
            os.environ["VLLM_MLA_DISABLE"] = "1"


def backend_caches_latents(model_config: ModelConfig) -> bool:
    """Whether vLLM's Transformers backend caches latents. Those of DeepSeek-V2 it expands, since it does not recognise
    `modeling_coe`'s attention as latent."""
    return model_config.use_mla and model_config.hf_config.backbone != "deepseek_v2"


def choose_latent_kernel(vllm_config: VllmConfig) -> None:
    """Keeps latents in the model's dtype. vLLM would take the kernel of AMX wherever the processor has that, which
    computes in bfloat16 alone."""
    model_config = vllm_config.model_config
    if current_platform.is_cpu() and model_config.use_mla and model_config.dtype != torch.bfloat16:
        vllm_config.attention_config.backend = AttentionBackendEnum.CPU_MLA


def differences(vllm_config: VllmConfig) -> Iterator[str]:
    """What the plugin's own model would compute differently from transformers: field, value and remedy of each."""
    config: CoeConfig = vllm_config.model_config.hf_config
    backbone = config.backbone
    attention = f"with `backbone={backbone!r}`, whose attention in vLLM has none"
    if not config.num_sparse_layers and config.hidden_act != "silu":
        yield f"`hidden_act` is {config.hidden_act!r}, and its gated MLPs have 'silu'. {TRANSFORMERS_BACKEND}"
    if backbone in ("olmoe", "qwen3", "qwen3_moe") and config.attention_bias:
        yield f"`attention_bias` is True {attention} in its output projection. {TRANSFORMERS_BACKEND}"
    if BACKBONES[backbone].query_key_norms == "each head, rotated":
        yield f"`backbone` is {backbone!r}, which has norms of rotated queries and keys. {TRANSFORMERS_BACKEND}"
    if backbone == "olmoe" and config.clip_qkv is not None:
        yield f"`clip_qkv` is {config.clip_qkv} {attention}. {TRANSFORMERS_BACKEND}"
    head_dim = config.hidden_size // config.num_attention_heads
    if config.query_key_norms == "all heads" and config.head_dim != head_dim:
        yield (
            f"`head_dim` is {config.head_dim} with `backbone={backbone!r}`, whose attention in vLLM has "
            f"`hidden_size / num_attention_heads = {head_dim}`. {TRANSFORMERS_BACKEND}"
        )
    yield from shared_differences(vllm_config)


def backend_differences(vllm_config: VllmConfig) -> Iterator[str]:
    """What vLLM's Transformers backend would compute differently, as [`differences`]."""
    config: CoeConfig = vllm_config.model_config.hf_config
    if backend_caches_latents(vllm_config.model_config) and not has_latent_kernel(config):
        yield (
            f"`kv_lora_rank` is {config.kv_lora_rank}, `qk_rope_head_dim` is {config.qk_rope_head_dim} and "
            f"`sliding_window` is {config.sliding_window}, which its latent attention does not take on this device. "
            f"Set VLLM_MLA_DISABLE=1 to cache keys and values in place of latents. {OWN_MODEL}"
        )
    chosen = {config.experts_per_iteration(layer_idx) for layer_idx in config.sparse_layers}
    if chosen - {config.num_experts_per_tok}:
        yield (
            f"`chain_layers` is {config.chain_layers}, and the other layers use {max(chosen)} experts, where it has "
            f"`num_experts_per_tok={config.num_experts_per_tok}` in all. {OWN_MODEL}"
        )
    if config.logits_scaling != 1:
        yield f"`logits_scaling` is {config.logits_scaling}, by which it divides no logits. {OWN_MODEL}"
    parallel_config = vllm_config.parallel_config
    if current_platform.is_cpu() and parallel_config.enable_expert_parallel and parallel_config.world_size > 1:
        yield f"`enable_expert_parallel` is True, and vLLM's CPU kernel takes all experts for its own. {OWN_MODEL}"
    yield from shared_differences(vllm_config)


def shared_differences(vllm_config: VllmConfig) -> Iterator[str]:
    """What both would compute differently, as [`differences`]."""
    config: CoeConfig = vllm_config.model_config.hf_config
    if config.num_sparse_layers and config.hidden_act != "silu":
        yield f"`hidden_act` is {config.hidden_act!r}, and vLLM's experts have 'silu'. Use transformers for it."
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
