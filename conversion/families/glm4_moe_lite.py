# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""GLM-4.7-Flash: latent attention and router of DeepSeek-V3, dense layers by a list."""

from ..family import Family


FAMILY = Family(
    model_type="glm4_moe_lite",
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
        "n_group",
        "topk_group",
        "norm_topk_prob",
        "routed_scaling_factor",
    ),
    constants={"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    computed={
        "mlp_only_layers": lambda config: [i for i, kind in enumerate(config.mlp_layer_types) if kind == "dense"]
    },
    derived={
        "mlp_layer_types": lambda config: [
            "sparse" if config.is_sparse_layer(layer_idx) else "dense" for layer_idx in range(config.num_hidden_layers)
        ]
    },
    required={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_parameters.partial_rotary_factor": 1.0},
    implied=("head_dim", "qk_head_dim", "num_nextn_predict_layers", "partial_rotary_factor"),
    dropped_keys={r"^model\.layers\.(\d+)\.": "predicts further tokens (MTP)"},
)
