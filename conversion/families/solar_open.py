# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Solar Open: Llama's attention, DeepSeek-V3's router, no dense layers."""

from ..family import Family


FAMILY = Family(
    model_type="solar_open",
    backbone="llama",
    same=(
        "head_dim",
        "moe_intermediate_size",
        "n_routed_experts",
        "n_shared_experts",
        "n_group",
        "topk_group",
        "norm_topk_prob",
        "routed_scaling_factor",
    ),
    constants={"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    computed={"intermediate_size": lambda config: config.moe_intermediate_size},  # there are no dense layers
    # Its output projection has no bias in any case, Llama's has one where the others have.
    required={"attention_bias": False, "rope_parameters.partial_rotary_factor": 1.0},
    implied=("partial_rotary_factor",),  # in `rope_parameters`
)
