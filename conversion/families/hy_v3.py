# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Hy3: Qwen3's attention, DeepSeek-V3's router without groups, dense layers by a list."""

from ..family import Family


FAMILY = Family(
    model_type="hy_v3",
    backbone="qwen3",
    same=("head_dim", "mlp_bias", "moe_intermediate_size"),
    renamed={
        "num_experts": "n_routed_experts",
        "num_shared_experts": "n_shared_experts",
        "router_scaling_factor": "routed_scaling_factor",
    },
    constants={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True},
    computed={
        "mlp_only_layers": lambda config: [i for i, kind in enumerate(config.mlp_layer_types) if kind == "dense"]
    },
    derived={
        "mlp_layer_types": lambda config: [
            "sparse" if config.is_sparse_layer(layer_idx) else "dense" for layer_idx in range(config.num_hidden_layers)
        ]
    },
    implied=("num_nextn_predict_layers",),
    left_out={"enable_moe_fp32_combine": "chains add shared experts to the others in the model's dtype"},
    keys={
        "mlp.router.gate.weight": "mlp.gate.weight",
        "mlp.expert_bias": "mlp.gate.e_score_correction_bias",
        "mlp.shared_mlp.gate_proj.weight": "mlp.shared_experts.gate_proj.weight",
        "mlp.shared_mlp.up_proj.weight": "mlp.shared_experts.up_proj.weight",
        "mlp.shared_mlp.down_proj.weight": "mlp.shared_experts.down_proj.weight",
        "mlp.shared_mlp.gate_proj.bias": "mlp.shared_experts.gate_proj.bias",
        "mlp.shared_mlp.up_proj.bias": "mlp.shared_experts.up_proj.bias",
        "mlp.shared_mlp.down_proj.bias": "mlp.shared_experts.down_proj.bias",
        # Of a folder with fused experts.
        "mlp.e_score_correction_bias": "mlp.gate.e_score_correction_bias",
    },
    dropped_keys={r"^model\.layers\.(\d+)\.": "predicts further tokens (MTP)"},
)
