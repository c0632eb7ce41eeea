# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""OLMoE: norms over all queries and all keys, optional clipping, no shared expert."""

from ..family import Family


FAMILY = Family(
    model_type="olmoe",
    backbone="olmoe",
    same=("head_dim", "clip_qkv", "norm_topk_prob"),
    renamed={"num_experts": "n_routed_experts", "router_aux_loss_coef": "aux_loss_alpha"},
    constants={"n_shared_experts": None, "seq_aux": False},
    # The width of an expert; there are no dense layers.
    computed={"moe_intermediate_size": lambda config: config.intermediate_size},
)
