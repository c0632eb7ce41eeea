# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""GraniteMoE: multipliers of embeddings, attention, residuals and logits; experts that are stored in one tensor."""

from ..family import Family


FAMILY = Family(
    model_type="granitemoe",
    backbone="granitemoe",
    same=("head_dim", "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"),
    renamed={"num_local_experts": "n_routed_experts", "router_aux_loss_coef": "aux_loss_alpha"},
    # Its weights are the softmax over the chosen experts, which is that over all of them, normalised.
    constants={"n_shared_experts": None, "norm_topk_prob": True, "seq_aux": False},
    # The width of an expert; there are no dense layers.
    computed={"moe_intermediate_size": lambda config: config.intermediate_size},
    derived={"intermediate_size": lambda config: config.moe_intermediate_size},
    keys={
        "block_sparse_moe.router.layer.weight": "mlp.gate.weight",
        "block_sparse_moe.input_linear.weight": "mlp.experts.gate_up_proj",
        "block_sparse_moe.output_linear.weight": "mlp.experts.down_proj",
        # As transformers has them in memory.
        "block_sparse_moe.router.weight": "mlp.gate.weight",
        "block_sparse_moe.experts.gate_up_proj": "mlp.experts.gate_up_proj",
        "block_sparse_moe.experts.down_proj": "mlp.experts.down_proj",
    },
)
