# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Ministral, dense: Qwen2's attention without biases."""

from ..family import Family


FAMILY = Family(
    model_type="ministral",
    backbone="qwen2_moe",
    same=("head_dim", "sliding_window", "layer_types"),
    constants={"qkv_bias": False, "n_shared_experts": None, "seq_aux": False},
    dense=True,
)
