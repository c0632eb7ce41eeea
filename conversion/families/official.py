# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""The official implementation's own layout: the same tensors as here, and a config.json of its own."""

import copy
from typing import Any

from configuration_coe import CoeConfig
from configuration_coe.configuration_coe import OFFICIAL_MODEL_TYPE

from ..checkpoint import ConversionError


# What its config.json holds under the same names.
_FIELDS = (
    "attention_bias",
    "attention_dropout",
    "aux_loss_alpha",
    "bos_token_id",
    "eos_token_id",
    "first_k_dense_replace",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "inner_iter",
    "inner_residual",
    "intermediate_size",
    "kv_lora_rank",
    "max_position_embeddings",
    "moe_intermediate_size",
    "moe_layer_freq",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "outer_residual",
    "pad_token_id",
    "pretraining_tp",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "rms_norm_eps",
    "routed_scaling_factor",
    "scoring_func",
    "seq_aux",
    "tie_word_embeddings",
    "topk_group",
    "topk_method",
    "use_cache",
    "use_igate",
    "v_head_dim",
    "vocab_size",
)
# Fields with the only values that its code implements: some it does not have, in others it fails.
_REQUIRED = {
    "backbone": ("deepseek_v2",),
    "upcycling": (None,),
    "chain_layers": (None,),
    "iteration_norm": (False,),
    "branch_norm": (False,),
    "residual_scale": (None,),
    "reinject": (None,),
    "prenorm_residual": (False,),
    "init_residual": (False,),
    "first_k_dense_replace": (0,),
    "moe_layer_freq": (1,),
    "mlp_only_layers": (None, []),
    "decoder_sparse_step": (1,),
    "mlp_bias": (False,),
    "shared_expert_intermediate_size": (None,),
    "scoring_func": ("softmax",),
    "topk_method": ("greedy", "group_limited_greedy"),
    "router_z_loss_coef": (0,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
}


def official_config(config: CoeConfig) -> dict[str, Any]:
    """The official config.json of a chain, with the names of the transformers version it was written for.

    Raises:
        ConversionError: The official code cannot express the model; the message names the fields.
    """
    wrong = [
        f"`{name}={getattr(config, name)!r}` (it has {' or '.join(map(repr, allowed))})"
        for name, allowed in _REQUIRED.items()
        if getattr(config, name) not in allowed
    ]
    if wrong:
        raise ConversionError(f"The official code cannot express this model: {', '.join(wrong)}.")
    values = {name: getattr(config, name) for name in _FIELDS}
    values["n_shared_experts"] = config.n_shared_experts or None  # its code makes an MLP of width 0 for 0
    rope = copy.deepcopy(config.rope_parameters)
    values["rope_theta"], rope_type = rope.pop("rope_theta"), rope.pop("rope_type")
    values["rope_scaling"] = None if rope_type == "default" else {"type": rope_type, **rope}
    values["torch_dtype"] = str(config.dtype or "float32").removeprefix("torch.")
    return {"architectures": ["CoeForCausalLM"], "model_type": OFFICIAL_MODEL_TYPE, "ep_size": 1, **values}
