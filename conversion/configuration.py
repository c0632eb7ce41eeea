# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""The source's configuration: read by transformers, and checked value by value before anything is made of it."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import modeling_coe  # noqa: F401  registers the Auto classes
from configuration_coe import CoeConfig
from configuration_coe.configuration_coe import OFFICIAL_MODEL_TYPE

from .checkpoint import Checkpoint, ConversionError
from .errors import kind_and_message
from .families import ALIASES, FAMILIES


# What must be 1 or more, and what 0 or more. What depends on other fields is left to the classes of configurations.
_POSITIVE_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "moe_intermediate_size",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_experts_per_tok",
    "moe_k",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "decoder_sparse_step",
    "moe_layer_freq",
    "moe_layer_interval",
    "inner_iter",
)
_COUNTS = (
    "intermediate_size",
    "first_k_dense_replace",
    "moe_layer_start_index",
    "n_shared_experts",
    "num_shared_experts",
    "moe_num_shared_experts",
    "shared_expert_intermediate_size",
    "num_nextn_predict_layers",
    "sliding_window",
)
_NUMBERS = ("rms_norm_eps", "initializer_range", "attention_dropout", "aux_loss_alpha", "router_aux_loss_coef")
# Fields of which every unit is a tensor or a row of one. With more than the weights have, building a model has no end.
_LIMITED = (
    "num_hidden_layers",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "inner_iter",
    "hidden_size",
    "head_dim",
    "qk_rope_head_dim",
)
# Fields of the rotary embedding that it divides by, or takes powers of.
_POSITIVE_IN_ROPE = ("rope_theta", "factor")
# Where the weights are, and how they are stored, is no property of the model: the checkpoint has read it.
_OF_WEIGHTS = ("transformers_weights", "quantization_config", "compression_config")
# Fields of any configuration that transformers reads without looking.
_TYPES = {"architectures": list, "auto_map": dict, "attn_implementation": str | dict}


def load_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The configuration of a checkpoint.

    Raises:
        ConversionError: Names the field, its value and what to do about it.
    """
    values = {name: value for name, value in checkpoint.config_dict.items() if name not in _OF_WEIGHTS}
    supported = [*FAMILIES, *ALIASES, CoeConfig.model_type, OFFICIAL_MODEL_TYPE]
    if values.get("model_type") not in supported:
        raise ConversionError(
            f"`model_type` in config.json is {values.get('model_type')!r}, an architecture that is not supported. "
            f"Choose a source of one of these: {', '.join(supported)}."
        )
    _check_values(values, checkpoint)
    if known := ALIASES.get(values["model_type"]):
        name = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[known]].__name__
        if values.get("architectures") != [name]:
            raise _wrong(
                "architectures",
                values.get("architectures"),
                f"and transformers knows `{values['model_type']}` as {name} alone",
            )
        values["model_type"] = known
    try:
        return _build(values)
    except Exception as error:  # of whatever check or computation a value has failed
        culprits = ", ".join(f"`{name}={_short(values[name])}`" for name in find_culprits(values, _build))
        raise ConversionError(
            f"transformers makes no `{values['model_type']}` of config.json ({kind_and_message(error)}). Correct "
            f"{f'{culprits} in config.json' if culprits else 'config.json'}."
        ) from error


def find_culprits(values: dict[str, Any], make: Callable[[dict[str, Any]], object]) -> list[str]:
    """Names of the values of which each alone makes `make(values)` fail: without it, there is no error."""

    def succeeds_without(name: str) -> bool:
        try:
            make({other: value for other, value in values.items() if other != name})
        except Exception:
            return False
        return True

    return [name for name in values if succeeds_without(name)]


def _build(values: dict[str, Any]) -> PreTrainedConfig:
    """A configuration of which transformers can build a model."""
    config = CONFIG_MAPPING[values["model_type"]].from_dict(copy.deepcopy(values))
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return config


def _check_values(values: dict[str, Any], checkpoint: Checkpoint) -> None:
    for name, kind in _TYPES.items():
        if not isinstance(values.get(name), kind | None):
            raise _wrong(name, values[name], "of another type than transformers takes", "Correct or remove it.")
    for name, value in _walk(values):
        if isinstance(value, float) and not math.isfinite(value):
            raise _wrong(name, value, "not a finite number")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise _wrong(name, value, "beyond 64 bits")
        if name.rpartition(".")[2] in _POSITIVE_IN_ROPE and _is_number(value) and not value > 0:
            raise _wrong(name, value, "not greater than 0")
    # What a family leaves out may be anything.
    family = FAMILIES.get(values["model_type"])
    unread = () if family is None else family.left_out
    for least, kind, names in ((1, int, _POSITIVE_COUNTS), (0, int, _COUNTS), (0, int | float, _NUMBERS)):
        for name in names:
            value = None if name in unread else values.get(name)
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                raise _wrong(name, value, "not a whole number" if kind is int else "not a number")
            if value is not None and value < least:
                raise _wrong(name, value, f"less than {least}")
    limit = max([len(checkpoint.tensors), *(size for tensor in checkpoint.tensors.values() for size in tensor.shape)])
    for name in _LIMITED:
        if (values.get(name) or 0) > limit:
            raise _wrong(name, values[name], "more than the weights can hold", "Correct it, or complete the weights.")
    pad, vocabulary = values.get("pad_token_id"), values.get("vocab_size")
    # Negative ids count from the end, as in all of PyTorch's indices.
    if _is_number(pad) and _is_number(vocabulary) and not -vocabulary <= pad < vocabulary:
        raise _wrong(
            "pad_token_id",
            pad,
            f"beyond the vocabulary (`vocab_size={vocabulary}`): transformers makes no embedding for it",
            "Set it to the id of a token, or to null.",
        )


def _wrong(name: str, value: Any, why: str, remedy: str = "Correct it.") -> ConversionError:
    return ConversionError(f"`{name}` in config.json is {_short(value)}, {why}. {remedy}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All values in nested dictionaries and lists, with their names."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _walk(item, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item, path)
    else:
        yield path, value
