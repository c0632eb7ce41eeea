# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""HunYuan, dense: norms of rotated queries and keys."""

from ..family import Family


FAMILY = Family(
    model_type="hunyuan_v1_dense",
    backbone="hunyuan_v1_moe",
    same=("head_dim",),
    constants={"n_shared_experts": None, "seq_aux": False},
    dense=True,
)
