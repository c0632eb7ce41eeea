# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""HunYuan with experts: norms of rotated queries and keys, a shared expert as wide as the others."""

from transformers import PreTrainedConfig

from ..checkpoint import ConversionError
from ..family import Family


def _top_k(config: PreTrainedConfig) -> int:
    """The one number of experts per token, which its configurations list for every layer.

    Raises:
        ConversionError: It is not the same in all layers.
    """
    top_k = config.moe_topk
    if isinstance(top_k, int):
        return top_k
    if len(set(top_k)) != 1:
        raise ConversionError(f"`moe_topk` of the source is {top_k}. Only one number for all layers can be kept.")
    return top_k[0]


FAMILY = Family(
    model_type="hunyuan_v1_moe",
    backbone="hunyuan_v1_moe",
    same=("head_dim",),
    renamed={"num_experts": "n_routed_experts"},
    constants={"n_shared_experts": 1, "norm_topk_prob": True, "seq_aux": False},
    computed={
        # The width of an expert; there are no dense layers.
        "moe_intermediate_size": lambda config: config.intermediate_size,
        "num_experts_per_tok": _top_k,
    },
    derived={
        "intermediate_size": lambda config: config.moe_intermediate_size,
        "moe_topk": lambda config: config.num_experts_per_tok,
    },
    left_out={"moe_intermediate_size": "transformers' experts are as wide as `intermediate_size`"},
    keys={
        "mlp.gate.wg.weight": "mlp.gate.weight",
        "mlp.shared_mlp.gate_proj.weight": "mlp.shared_experts.gate_proj.weight",
        "mlp.shared_mlp.up_proj.weight": "mlp.shared_experts.up_proj.weight",
        "mlp.shared_mlp.down_proj.weight": "mlp.shared_experts.down_proj.weight",
    },
)
