# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Granite, dense: GraniteMoE's attention and multipliers."""

from ..family import Family


FAMILY = Family(
    model_type="granite",
    backbone="granitemoe",
    same=("head_dim", "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"),
    constants={"n_shared_experts": None, "seq_aux": False},
    required={"mlp_bias": False},
    dense=True,
)
