# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""MiniCPM3, dense: latent attention that rotates halves, and multipliers of embeddings, residuals and logits."""

import math

from ..family import Family


FAMILY = Family(
    model_type="minicpm3",
    backbone="deepseek_v3",
    same=("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    renamed={"scale_emb": "embedding_multiplier"},
    constants={"rope_interleave": False, "n_shared_experts": None, "seq_aux": False},
    computed={
        "residual_multiplier": lambda config: config.scale_depth / math.sqrt(config.num_hidden_layers),
        "logits_scaling": lambda config: config.logits_scaling,
    },
    required={"mlp_bias": False},
    implied=("head_dim", "qk_head_dim", "scale_depth", "dim_model_base"),
    dense=True,
)
