# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Mixtral: weights are the softmax over the chosen experts, which is that over all of them, normalised."""

from ..family import Family


FAMILY = Family(
    model_type="mixtral",
    backbone="mixtral",
    equal_backbones=("llama",),
    same=("head_dim", "sliding_window"),
    renamed={"num_local_experts": "n_routed_experts", "router_aux_loss_coef": "aux_loss_alpha"},
    constants={"n_shared_experts": None, "norm_topk_prob": True, "seq_aux": False},
    # The width of an expert; there are no dense layers.
    computed={"moe_intermediate_size": lambda config: config.intermediate_size},
    derived={"intermediate_size": lambda config: config.moe_intermediate_size},
    left_out={"router_jitter_noise": "chains are trained without noise on the routers' input"},
    keys={
        "block_sparse_moe.gate.weight": "mlp.gate.weight",
        "block_sparse_moe.experts.*.w1.weight": "mlp.experts.*.gate_proj.weight",
        "block_sparse_moe.experts.*.w3.weight": "mlp.experts.*.up_proj.weight",
        "block_sparse_moe.experts.*.w2.weight": "mlp.experts.*.down_proj.weight",
    },
)
