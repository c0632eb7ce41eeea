# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V2's latent attention, cheaper to decode with. Every other backbone's attention is transformers' own."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Attention,
    apply_rotary_emb,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .releases import takes_cache


class CoeAttention(DeepseekV2Attention):
    """DeepSeek-V2's latent attention, with two detours that change its cost and not its result.

    Where no gradient is needed and few queries meet a long cache (decoding), keys and values are not expanded from
    the latents: `kv_b_proj` is absorbed into the queries and the output instead (DeepSeek-V2, arXiv 2405.04434,
    section 2.1.2). Elsewhere, SDPA on the CPU gets the values of long sequences padded to the width of the keys,
    without which it does not take its flash kernel.
    """

    min_flash_length = 128  # shorter sequences gain nothing from it

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        position_embeddings: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, query_rope = self.queries(hidden_states)
        latent, key_rope = self.latents(hidden_states)
        query_rope, key_rope = apply_rotary_emb(query_rope, key_rope, position_embeddings.to(query_rope.device))
        if cache is not None:
            latent, key_rope = cache.update(latent, key_rope, self.layer_idx, kwargs=kwargs)

        if self.absorbs(query, latent, attention_mask):
            output, attentions = self.absorbed_attention(query, query_rope, latent, key_rope, attention_mask)
            if self.config._attn_implementation != "eager":  # no other returns them
                attentions = None
        else:
            query = torch.cat((query, query_rope), dim=-1)
            key, value = self.expand_kv(latent, key_rope)
            pads = query.device.type == "cpu" and self.config._attn_implementation == "sdpa"
            pads = pads and not torch.compiler.is_exporting() and query.shape[2] >= self.min_flash_length
            if pads:
                value = F.pad(value, (0, max(0, self.qk_head_dim - self.v_head_dim)))
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            dropout = self.attention_dropout if self.training else 0.0
            output, attentions = attention(
                self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
            )
            if pads:
                output = output[..., : self.v_head_dim]
        # The heads may be side by side already: vLLM's function returns them so.
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), attentions

    def queries(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The parts of the queries without and with position, (B, heads, S, qk_nope_head_dim or qk_rope_head_dim)."""
        if self.q_lora_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        query = query.unflatten(-1, (-1, self.qk_head_dim)).transpose(1, 2)
        return query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)

    def latents(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the cache holds: compressed keys and values, and the keys' part with position, (B, 1, S, width)."""
        latent, key_rope = self.kv_a_proj_with_mqa(hidden_states).split(
            [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1
        )
        return self.kv_a_layernorm(latent).unsqueeze(1), key_rope.unsqueeze(1)

    def absorbs(self, query: torch.Tensor, latent: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
        """Whether absorbing `kv_b_proj` is possible, and cheaper than expanding all latents."""
        length, context = query.shape[2], latent.shape[2]
        expanded = self.qk_nope_head_dim + self.v_head_dim
        return (
            not torch.is_grad_enabled()
            and not (self.training and self.attention_dropout)
            and not torch.compiler.is_exporting()  # lengths may have no value to compare
            and length * (self.kv_lora_rank * expanded + context * (2 * self.kv_lora_rank - expanded))
            < context * self.kv_lora_rank * expanded
            and self.config._attn_implementation in ("eager", "sdpa")
            # Without a mask, several queries are causal.
            and (length == 1 if attention_mask is None else attention_mask.dim() == 4)
            # Adapters, quantisation, parallel plans and offloading act when the projection is called.
            and type(self.kv_b_proj) is nn.Linear
            and type(self.kv_b_proj.weight) is nn.Parameter
            and not self.kv_b_proj._forward_pre_hooks
            and not self.kv_b_proj._forward_hooks
            and "forward" not in vars(self.kv_b_proj)
        )

    def absorbed_attention(
        self,
        query: torch.Tensor,
        query_rope: torch.Tensor,
        latent: torch.Tensor,
        key_rope: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over the latents themselves, one key and value for all heads.

        Returns:
            The heads' outputs (B, S, heads, v_head_dim) and the attention weights (B, heads, S, context).
        """
        weight = self.kv_b_proj.weight.view(-1, self.qk_nope_head_dim + self.v_head_dim, self.kv_lora_rank)
        to_key, to_value = weight.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        latent, key_rope = latent.squeeze(1), key_rope.squeeze(1)
        # einsum, since matmul would copy weights and latents for every pair of sequence and head.
        query = torch.einsum("bhqn,hnr->bhqr", query, to_key)
        dtype = torch.promote_types(query.dtype, torch.float32)
        scores = torch.einsum("bhqr,bkr->bhqk", query.to(dtype), latent.to(dtype))
        scores = (scores + torch.einsum("bhqr,bkr->bhqk", query_rope.to(dtype), key_rope.to(dtype))) * self.scaling
        if attention_mask is not None:
            minimum = torch.finfo(scores.dtype).min  # not -inf, of which softmax makes NaN where all is masked
            if attention_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attention_mask, minimum)
            else:
                scores = (scores + attention_mask).clamp(min=minimum)
        attentions = scores.softmax(dim=-1).to(query.dtype)
        output = torch.einsum("bhqk,bkr->bhqr", attentions, latent)
        output = torch.einsum("bhqr,hvr->bqhv", output, to_value)
        return output, attentions
