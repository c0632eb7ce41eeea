# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V2: latent attention, shared experts, softmax scores, whole groups of experts left out."""

from ..family import Family


FAMILY = Family(
    model_type="deepseek_v2",
    backbone="deepseek_v2",
    same=(
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "mlp_bias",
        "moe_intermediate_size",
        "n_routed_experts",
        "n_shared_experts",
        "first_k_dense_replace",
        "topk_method",
        "n_group",
        "topk_group",
        "routed_scaling_factor",
        "aux_loss_alpha",
        "seq_aux",
    ),
    constants={"norm_topk_prob": False},
    required={"scoring_func": "softmax", "moe_layer_freq": 1},
    implied=("head_dim", "qk_head_dim"),
    left_out={"norm_topk_prob": "transformers' DeepSeek-V2 does not normalise"},
)
