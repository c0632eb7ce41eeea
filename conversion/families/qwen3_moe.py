# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Qwen3-MoE: norms of queries and keys, no shared expert."""

from ..family import Family


FAMILY = Family(
    model_type="qwen3_moe",
    backbone="qwen3_moe",
    equal_backbones=("qwen3",),
    same=(
        "head_dim",
        "sliding_window",
        "moe_intermediate_size",
        "norm_topk_prob",
        "decoder_sparse_step",
        "mlp_only_layers",
    ),
    renamed={"num_experts": "n_routed_experts", "router_aux_loss_coef": "aux_loss_alpha"},
    constants={"n_shared_experts": None, "seq_aux": False},
    computed={"mlp_only_layers": lambda config: config.mlp_only_layers or None},  # as chains of dense models have it
    derived={"use_sliding_window": lambda config: config.sliding_window is not None},
    implied=("max_window_layers",),  # all layers have the window, or none
)
