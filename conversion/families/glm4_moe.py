# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""GLM-4.5 and 4.6: half of every head is rotated, norms of queries and keys by choice, DeepSeek-V3's router."""

from ..family import Family


FAMILY = Family(
    model_type="glm4_moe",
    backbone="glm4_moe",
    same=(
        "head_dim",
        "use_qk_norm",
        "moe_intermediate_size",
        "n_routed_experts",
        "n_shared_experts",
        "first_k_dense_replace",
        "n_group",
        "topk_group",
        "norm_topk_prob",
        "routed_scaling_factor",
    ),
    constants={"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    derived={"num_nextn_predict_layers": lambda config: 0},
    required={"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    implied=("num_nextn_predict_layers", "partial_rotary_factor"),  # the latter in `rope_parameters`
    dropped_keys={r"^model\.layers\.(\d+)\.": "predicts further tokens (MTP)"},
)
