# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Llama, dense."""

from ..family import Family


FAMILY = Family(
    model_type="llama",
    backbone="llama",
    same=("head_dim",),
    constants={"n_shared_experts": None, "seq_aux": False},
    required={"mlp_bias": False},
    dense=True,
)
