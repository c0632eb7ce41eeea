# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""dots.llm1: Qwen3's attention, DeepSeek-V3's router."""

from ..family import Family


FAMILY = Family(
    model_type="dots1",
    backbone="qwen3",
    same=(
        "head_dim",
        "sliding_window",
        "layer_types",
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
    required={"moe_layer_freq": 1},
    implied=("max_window_layers",),  # in `layer_types`
)
