# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V3, Kimi-K2, Moonlight: latent attention, sigmoid scores, a selection bias, groups ranked by best pairs."""

from ..family import Family


FAMILY = Family(
    model_type="deepseek_v3",
    backbone="deepseek_v3",
    same=(
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "rope_interleave",
        "moe_intermediate_size",
        "n_routed_experts",
        "n_shared_experts",
        "first_k_dense_replace",
        "n_group",
        "topk_group",
        "norm_topk_prob",
        "routed_scaling_factor",
        "aux_loss_alpha",
        "seq_aux",
    ),
    constants={"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    derived={"num_nextn_predict_layers": lambda config: 0},
    required={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    implied=("head_dim", "qk_head_dim", "num_nextn_predict_layers"),
    dropped_keys={r"^model\.layers\.(\d+)\.": "predicts further tokens (MTP)"},
    aliases=("kimi_k2",),
)
