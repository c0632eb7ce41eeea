# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Qwen3, dense: norms of queries and keys."""

from ..family import Family


FAMILY = Family(
    model_type="qwen3",
    backbone="qwen3",
    same=("head_dim", "sliding_window", "layer_types"),
    constants={"n_shared_experts": None, "seq_aux": False},
    implied=("use_sliding_window", "max_window_layers"),  # in `sliding_window` and `layer_types`
    dense=True,
)
