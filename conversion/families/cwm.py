# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""CWM, dense: Qwen2's attention without biases."""

from ..family import Family


FAMILY = Family(
    model_type="cwm",
    backbone="qwen2_moe",
    same=("head_dim", "sliding_window", "layer_types"),
    constants={"qkv_bias": False, "n_shared_experts": None, "seq_aux": False},
    required={"mlp_bias": False},
    dense=True,
)
