# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Qwen1.5-MoE and Qwen2-MoE: biases of queries, keys and values, a shared expert that is gated by a sigmoid."""

from ..family import Family


FAMILY = Family(
    model_type="qwen2_moe",
    backbone="qwen2_moe",
    same=(
        "head_dim",
        "qkv_bias",
        "layer_types",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "norm_topk_prob",
        "decoder_sparse_step",
        "mlp_only_layers",
    ),
    renamed={"num_experts": "n_routed_experts", "router_aux_loss_coef": "aux_loss_alpha"},
    constants={"n_shared_experts": 1, "seq_aux": False},
    # Its config makes the window 0 where it is not used.
    computed={"sliding_window": lambda config: config.sliding_window or None},
    derived={
        "sliding_window": lambda config: config.sliding_window,
        "use_sliding_window": lambda config: config.sliding_window is not None,
    },
    implied=("max_window_layers",),  # in `layer_types`
    keys={
        "mlp.shared_expert.gate_proj.weight": "mlp.shared_experts.gate_proj.weight",
        "mlp.shared_expert.up_proj.weight": "mlp.shared_experts.up_proj.weight",
        "mlp.shared_expert.down_proj.weight": "mlp.shared_experts.down_proj.weight",
    },
)
