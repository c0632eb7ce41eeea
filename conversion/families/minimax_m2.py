# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""MiniMax-M2: half of every head is rotated, norms over all queries and all keys, sigmoid scores, a selection bias."""

from ..family import Family


FAMILY = Family(
    model_type="minimax_m2",
    backbone="minimax_m2",
    same=("head_dim",),
    renamed={"num_local_experts": "n_routed_experts", "router_aux_loss_coef": "aux_loss_alpha"},
    constants={
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "n_shared_experts": None,
        "seq_aux": False,
    },
    # The width of an expert; there are no dense layers.
    computed={"moe_intermediate_size": lambda config: config.intermediate_size},
    derived={"intermediate_size": lambda config: config.moe_intermediate_size},
    required={"scoring_func": "sigmoid", "use_qk_norm": True, "use_routing_bias": True, "shared_intermediate_size": 0},
    implied=("rotary_dim", "partial_rotary_factor"),  # in `rope_parameters`
    left_out={
        "router_jitter_noise": "chains are trained without noise on the routers' input",
        "use_mtp": "chains predict one token at a time",
    },
    keys={
        "block_sparse_moe.gate.weight": "mlp.gate.weight",
        "block_sparse_moe.e_score_correction_bias": "mlp.gate.e_score_correction_bias",
        "block_sparse_moe.experts.*.w1.weight": "mlp.experts.*.gate_proj.weight",
        "block_sparse_moe.experts.*.w3.weight": "mlp.experts.*.up_proj.weight",
        "block_sparse_moe.experts.*.w2.weight": "mlp.experts.*.down_proj.weight",
        # Of a folder with fused experts.
        "mlp.e_score_correction_bias": "mlp.gate.e_score_correction_bias",
    },
)
