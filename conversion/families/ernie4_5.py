# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""ERNIE 4.5, dense: neighbouring dimensions are rotated."""

from ..family import Family


FAMILY = Family(
    model_type="ernie4_5",
    backbone="ernie4_5_moe",
    same=("head_dim",),
    constants={"n_shared_experts": None, "seq_aux": False},
    required={"use_bias": False},
    dense=True,
)
