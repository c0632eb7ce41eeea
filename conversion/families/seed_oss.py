# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Seed-OSS, dense: biases of queries, keys and values."""

from ..family import Family


FAMILY = Family(
    model_type="seed_oss",
    backbone="qwen2_moe",
    same=("head_dim",),
    constants={"n_shared_experts": None, "seq_aux": False},
    computed={"qkv_bias": lambda config: config.attention_bias},
    required={"attention_out_bias": False, "mlp_bias": False},
    left_out={"residual_dropout": "chains are trained without dropout outside of attention"},
    dense=True,
)
