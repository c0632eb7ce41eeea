# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""The attention of a chain's backbone, by vLLM's modules.

What these fix and transformers reads from the configuration is taken from transformers' own module, built without
weights beside them, or compared with it.
"""

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.deepseek_v2 import DeepseekV2MLAAttention
from vllm.model_executor.models.llama import LlamaAttention
from vllm.model_executor.models.olmoe import OlmoeAttention
from vllm.model_executor.models.qwen3 import Qwen3Attention
from vllm.platforms import current_platform

from configuration_coe import BACKBONES, CoeConfig
from modeling_coe.backbones import BACKBONE_MODULES

from .configuration import TRANSFORMERS_BACKEND, expanded_head_size, is_interleaved


class NativeRotaryEmbedding(nn.Module):
    """The rotary embedding in torch's operations. vLLM's CPU kernel takes flat queries, and latent attention's have
    their heads apart."""

    def __init__(self, rotary_emb: nn.Module):
        super().__init__()
        self.rotary_emb = rotary_emb

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rotary_emb.forward_native(positions, query, key)


class GroupedQueryAttention(LlamaAttention):
    """vLLM's attention of Llama, with the scale and the order of rotated dimensions that the backbone has."""

    def _init_rotary_emb(self, config: CoeConfig, quant_config: QuantizationConfig | None) -> None:
        with torch.device("meta"):
            self.scaling = BACKBONE_MODULES[config.backbone].attention(config, 0).scaling
        self.rotary_emb = get_rope(
            self.head_dim,
            max_position=self.max_position_embeddings,
            is_neox_style=not BACKBONES[config.backbone].rotates_neighbours,
            rope_parameters=config.rope_parameters,
        )


class ExpandedLatentAttention(nn.Module):
    """DeepSeek's latent attention with keys and values expanded from the latents before they are cached, for sizes and
    fields that no kernel of vLLM's latent attention takes."""

    def __init__(self, config: CoeConfig, reference: nn.Module, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        quant_config = vllm_config.quant_config
        self.num_heads = config.num_attention_heads // get_tensor_model_parallel_world_size()
        self.kv_lora_rank = config.kv_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.qk_head_dim, self.v_head_dim = config.qk_head_dim, config.v_head_dim
        self.head_size = expanded_head_size(config)

        def linear(kind: type[nn.Module], name: str, in_features: int, out_features: int, bias: bool) -> nn.Module:
            return kind(in_features, out_features, bias=bias, quant_config=quant_config, prefix=f"{prefix}.{name}")

        query_width = config.num_attention_heads * self.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = linear(ColumnParallelLinear, "q_proj", config.hidden_size, query_width, False)
        else:
            bias = config.attention_bias
            self.q_a_proj = linear(ReplicatedLinear, "q_a_proj", config.hidden_size, config.q_lora_rank, bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=reference.q_a_layernorm.variance_epsilon)
            self.q_b_proj = linear(ColumnParallelLinear, "q_b_proj", config.q_lora_rank, query_width, False)
        latent_width = self.kv_lora_rank + self.qk_rope_head_dim
        self.kv_a_proj_with_mqa = linear(
            ReplicatedLinear, "kv_a_proj_with_mqa", config.hidden_size, latent_width, config.attention_bias
        )
        self.kv_a_layernorm = RMSNorm(self.kv_lora_rank, eps=reference.kv_a_layernorm.variance_epsilon)
        expanded_width = config.num_attention_heads * (self.qk_nope_head_dim + self.v_head_dim)
        self.kv_b_proj = linear(ColumnParallelLinear, "kv_b_proj", self.kv_lora_rank, expanded_width, False)
        output_width = config.num_attention_heads * self.v_head_dim
        self.o_proj = linear(RowParallelLinear, "o_proj", output_width, config.hidden_size, config.attention_bias)
        rope_parameters = dict(config.rope_parameters)
        if rope_parameters["rope_type"] == "yarn":
            rope_parameters["rope_type"] = "deepseek_yarn"
        self.rotary_emb = get_rope(
            self.qk_rope_head_dim,
            max_position=config.max_position_embeddings,
            is_neox_style=not is_interleaved(config),
            rope_parameters=rope_parameters,
        )
        if current_platform.is_cpu():
            self.rotary_emb = NativeRotaryEmbedding(self.rotary_emb)
        self.scaling = reference.scaling
        self.attn = Attention(
            self.num_heads,
            self.head_size,
            self.scaling,
            num_kv_heads=self.num_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "q_proj"):
            query, _ = self.q_proj(hidden_states)
        else:
            compressed, _ = self.q_a_proj(hidden_states)
            query, _ = self.q_b_proj(self.q_a_layernorm(compressed))
        query = query.view(-1, self.num_heads, self.qk_head_dim)
        latent, _ = self.kv_a_proj_with_mqa(hidden_states)
        latent, key_rope = latent.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        expanded, _ = self.kv_b_proj(self.kv_a_layernorm(latent.contiguous()))
        key, value = expanded.view(-1, self.num_heads, self.qk_nope_head_dim + self.v_head_dim).split(
            [self.qk_nope_head_dim, self.v_head_dim], dim=-1
        )
        query, query_rope = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        query_rope, key_rope = self.rotary_emb(positions, query_rope.contiguous(), key_rope.unsqueeze(1).contiguous())
        query = torch.cat((query, query_rope), dim=-1)
        key = torch.cat((key, key_rope.expand(-1, self.num_heads, -1)), dim=-1)
        query, key, value = (
            F.pad(states, (0, self.head_size - states.shape[-1])).flatten(1) for states in (query, key, value)
        )
        output = self.attn(query, key, value).view(-1, self.num_heads, self.head_size)
        output, _ = self.o_proj(output[..., : self.v_head_dim].reshape(-1, self.num_heads * self.v_head_dim))
        return output


class LatentAttention(DeepseekV2MLAAttention):
    """vLLM's latent attention, which caches the latents themselves."""

    def __init__(self, config: CoeConfig, reference: nn.Module, vllm_config: VllmConfig, prefix: str):
        super().__init__(
            vllm_config=vllm_config,
            config=copy.deepcopy(config),  # it writes to `rope_parameters`
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            max_position_embeddings=config.max_position_embeddings,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )
        for name in ("q_a_layernorm", "kv_a_layernorm"):
            if (norm := getattr(reference, name)) is not None:
                getattr(self, name).variance_epsilon = norm.variance_epsilon
        if current_platform.is_cpu():
            self.mla_attn.rotary_emb = NativeRotaryEmbedding(self.rotary_emb)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(positions, hidden_states, None)


def build_attention(vllm_config: VllmConfig, layer_idx: int, prefix: str) -> nn.Module:
    """The attention of one layer; its `forward` takes positions (T,) and hidden states (T, H).

    Raises:
        ValueError: It would compute something else than transformers' own; the message names the field.
    """
    config: CoeConfig = vllm_config.model_config.hf_config
    with torch.device("meta"):
        reference = BACKBONE_MODULES[config.backbone].attention(config, layer_idx)
    shared = {
        "cache_config": vllm_config.cache_config,
        "quant_config": vllm_config.quant_config,
        "prefix": prefix,
    }
    sizes = {
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
    }
    backbone = BACKBONES[config.backbone]
    bias = backbone.bias is not None and getattr(config, backbone.bias)
    if backbone.has_latent_attention:
        kind = LatentAttention if vllm_config.model_config.use_mla else ExpandedLatentAttention
        attention = kind(config, reference, vllm_config, prefix)
    elif config.query_key_norms == "each head":
        is_windowed = backbone.has_window_by_layer and config.layer_types[layer_idx] == "sliding_attention"
        attention = Qwen3Attention(
            **sizes,
            rope_parameters=config.rope_parameters,
            max_position=config.max_position_embeddings,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            qkv_bias=bias,
            # None where all layers have one or none, which vLLM takes from the configuration itself.
            per_layer_sliding_window=config.sliding_window if is_windowed else None,
            **shared,
        )
    elif config.query_key_norms == "all heads":
        attention = OlmoeAttention(vllm_config=vllm_config, prefix=prefix)
        attention.q_norm.variance_epsilon = attention.k_norm.variance_epsilon = config.rms_norm_eps
    else:
        attention = GroupedQueryAttention(
            config=config,
            **sizes,
            max_position_embeddings=config.max_position_embeddings,
            bias=bias,
            bias_o_proj=bias and backbone.bias_covers_output,
            **shared,
        )
    check_rotary_embedding(attention.rotary_emb, config)
    if not math.isclose(attention.scaling, reference.scaling):
        raise ValueError(
            f"`rope_parameters` is {config.rope_parameters}, by which vLLM scales attention by {attention.scaling} "
            f"and transformers by {reference.scaling}. {TRANSFORMERS_BACKEND}"
        )
    return attention


def check_rotary_embedding(rotary_emb: nn.Module, config: CoeConfig) -> None:
    """Raises `ValueError` where vLLM's table of angles is not what transformers computes."""
    table = getattr(rotary_emb, "rotary_emb", rotary_emb).cos_sin_cache
    positions = torch.arange(min(len(table), config.max_position_embeddings), device="cpu")
    positions = positions[:: max(1, len(positions) // 64)]
    with torch.device("cpu"):
        angles = BACKBONE_MODULES[config.backbone].rotary_embedding(config=config)(
            torch.empty(0, dtype=torch.float32), positions[None]
        )
    if isinstance(angles, tuple):
        cos, sin = (part[0, :, : part.shape[-1] // 2] for part in angles)
    else:
        cos, sin = angles[0].real, angles[0].imag
    expected = torch.cat((cos, sin), dim=-1)
    actual = table[positions.to(table.device)].to(expected)
    # Angles are products in float32, so their error grows with the position, and the table has the model's dtype.
    tolerance = 1e-4 + 1e-6 * positions[:, None] + torch.finfo(table.dtype).eps
    if actual.shape != expected.shape or ((actual - expected).abs() > tolerance).any():
        raise ValueError(
            f"`rope_parameters` is {config.rope_parameters}, for which vLLM's rotary embedding differs from that of "
            f"transformers. {TRANSFORMERS_BACKEND}"
        )
