# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Qwen2 and Qwen2.5, dense: biases of queries, keys and values."""

from ..family import Family


FAMILY = Family(
    model_type="qwen2",
    backbone="qwen2_moe",
    same=("head_dim", "sliding_window", "layer_types"),
    constants={"qkv_bias": True, "n_shared_experts": None, "seq_aux": False},
    implied=("use_sliding_window", "max_window_layers"),  # in `sliding_window` and `layer_types`
    dense=True,
)
