# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Mistral, dense: its attention is Mixtral's."""

from ..family import Family


FAMILY = Family(
    model_type="mistral",
    backbone="mixtral",
    same=("head_dim", "sliding_window"),
    constants={"n_shared_experts": None, "seq_aux": False},
    dense=True,
)
