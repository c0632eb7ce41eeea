# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Youtu-LLM, dense: DeepSeek-V3's latent attention."""

from ..family import Family


FAMILY = Family(
    model_type="youtu",
    backbone="deepseek_v3",
    same=("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave"),
    constants={"n_shared_experts": None, "seq_aux": False},
    implied=("head_dim", "qk_head_dim"),
    left_out={"embedding_initializer_range": "chains initialise embeddings as everything else"},
    dense=True,
)
