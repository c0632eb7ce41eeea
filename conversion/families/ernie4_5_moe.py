# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""ERNIE 4.5 with experts: softmax scores with a selection bias, sparse layers from one index to another."""

from ..family import Family


FAMILY = Family(
    model_type="ernie4_5_moe",
    backbone="ernie4_5_moe",
    same=("head_dim", "moe_intermediate_size"),
    renamed={
        "moe_k": "num_experts_per_tok",
        "moe_num_experts": "n_routed_experts",
        "moe_num_shared_experts": "n_shared_experts",
        "moe_layer_start_index": "first_k_dense_replace",
        "moe_layer_interval": "decoder_sparse_step",
        "router_aux_loss_coef": "aux_loss_alpha",
    },
    constants={"topk_method": "noaux_tc", "norm_topk_prob": True, "seq_aux": False},
    computed={"mlp_only_layers": lambda config: list(range(config.moe_layer_end_index + 1, config.num_hidden_layers))},
    derived={
        "moe_layer_end_index": lambda config: config.num_hidden_layers - len(config.mlp_only_layers or ()) - 1,
    },
    # With biases, the head and all MLPs would have some. The other is the least that weights are divided by to sum to
    # one: a chain has a smaller one, and the scores of the chosen experts are far above both.
    required={"use_bias": False, "moe_norm_min": 1e-12},
    keys={
        "mlp.moe_statics.e_score_correction_bias": "mlp.gate.e_score_correction_bias",
        # Of a folder with fused experts.
        "mlp.gate.moe_statics.e_score_correction_bias": "mlp.gate.e_score_correction_bias",
    },
    rows=("moe_statics.e_score_correction_bias",),
    dropped_keys={r"^model\.mtp_": "predicts further tokens (MTP)"},
)
