# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Helium, dense: neighbouring dimensions are rotated."""

from ..family import Family


FAMILY = Family(
    model_type="helium",
    backbone="ernie4_5_moe",
    same=("head_dim",),
    constants={"n_shared_experts": None, "seq_aux": False},
    # Its output projection has no bias in any case, ERNIE's has one where the others have.
    required={"attention_bias": False, "mlp_bias": False},
    dense=True,
)
