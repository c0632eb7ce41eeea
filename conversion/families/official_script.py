# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What the official script makes of a mixture of experts: a chain with learned weights, which start at zero.

Its folders say `coe_deepseekv2` with both residuals, and what they hold decides what is computed. With f_t the experts
behind router t, x_0 = post_attention_layernorm(h) and C iterations, a sparse layer is, in the layout that its authors

    document, `mlp.coe_weight` w:       x_1 = x_0 + w * f_0(x_0),  output = h + f_1(x_1)                     C = 2
    have in code, `mlp.coe_weights.t`:  z_0 = f_0(x_0),  z_t = z_{t-1} + w_{t-1} * f_t(z_{t-1}),  output = h + z_{C-1}

The first is the rule `refine`. The second is another rule, which is what `refine` computes where all w are zero.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from configuration_coe import CoeConfig
from modeling_coe import CoeForCausalLM
from modeling_coe.checkpoint import SCRIPT_KEY
from modeling_coe.modeling_coe import CoeDecoderLayer

from ..checkpoint import Checkpoint, ConversionError, stored_dtype
from ..plan import Options, Output, Plan
from ..tensors import ROUTER, Place, router_name


# What config.json says where the script wrote it.
_REQUIRED = {"inner_residual": True, "outer_residual": True, "init_residual": False, "prenorm_residual": False}


def script_weights(checkpoint: Checkpoint) -> list[str]:
    """Names of the weights that the script has added, none where it did not write the checkpoint."""
    return [key for key in checkpoint.tensors if SCRIPT_KEY.fullmatch(Place.of(key).name)]


def plan_from_script(checkpoint: Checkpoint, config: CoeConfig, options: Options) -> Plan:
    """To a `refine` chain, whose scales are the script's weights.

    Args:
        checkpoint (`Checkpoint`): What the script wrote.
        config (`CoeConfig`): What its config.json says.
        options (`Options`): What to make of it.

    Raises:
        ConversionError: Its chain is none of ours.
    """
    weights = script_weights(checkpoint)
    is_documented = all(key.endswith("coe_weight") for key in weights)
    _check(checkpoint, config, weights, is_documented)
    fields = {"outer_residual": False, "use_igate": True, "upcycling": "refine"}
    result = CoeConfig(**config.to_dict() | fields)
    options = Options(**vars(options) | {"mode": "refine", "iterations": config.inner_iter})
    explanation = "its chain is `refine`, with the weights of the official script as iteration scales"
    plan = Plan(checkpoint, config, result, options, config, result, True, explanation)
    plan.source_class = _model_class(checkpoint, weights, is_documented)
    for key, tensor in checkpoint.tensors.items():
        place = Place.of(key)
        if key not in weights:
            for t, name in enumerate(_chain_names(place, config)):
                dtype = stored_dtype(name, tensor.dtype, options.dtype)
                rule = "copied to a later iteration" if t else "copied"
                plan.outputs.append(Output(place.prefix + name, tensor.shape, dtype, key, rule))
        elif is_documented or key.endswith(".0"):
            shape = (config.inner_iter - 1, config.hidden_size)
            plan.outputs.append(
                Output(
                    f"{place.prefix}iteration_scale",
                    shape,
                    stored_dtype(key, tensor.dtype, options.dtype),
                    key,
                    "widened to every channel",
                    lambda weight, shape=shape: weight.reshape(-1).expand(shape),
                )
            )
        else:
            plan.dropped[key] = "zero"
    return plan


def _chain_names(place: Place, config: CoeConfig) -> list[str]:
    """What a tensor is called in a chain, which has a router for every iteration."""
    router = ROUTER.fullmatch(place.name)
    if router is None or router["iteration"]:
        return [place.name]
    return [router_name(router["part"], t) for t in range(config.inner_iter)]


def _check(checkpoint: Checkpoint, config: CoeConfig, weights: list[str], is_documented: bool) -> None:
    """Raises `ConversionError` where what the script has made is no chain of ours."""
    example = weights[0]
    wrong = [
        f"`{name}={getattr(config, name)}`" for name, value in _REQUIRED.items() if getattr(config, name) != value
    ]
    if wrong:
        raise ConversionError(
            f"The source has `{example}`, which the official conversion script writes with both residuals, but "
            f"config.json says {', '.join(wrong)}. Correct it, or remove these weights."
        )
    if is_documented and config.inner_iter != 2:
        raise ConversionError(
            f"`inner_iter` in config.json is {config.inner_iter}, but `{example}` is documented for two iterations. "
            "Correct it."
        )
    for key in weights:
        shape = checkpoint.tensors[key].shape
        if torch.Size(shape).numel() not in (1, config.hidden_size):
            raise ConversionError(
                f"`{key}` has the shape {list(shape)}, which is neither one number nor one for each of `hidden_size="
                f"{config.hidden_size}`. Correct it."
            )
        if not is_documented and checkpoint.read(key).any():
            raise ConversionError(
                f"`{key}` is not zero. There, an iteration reads the output of the one before it, and not the layer's "
                "input with a part of that output added, which no residual rule does. Convert the folder as the "
                "script wrote it, before training."
            )
    if is_documented:
        return
    for key in checkpoint.tensors:
        place = Place.of(key)
        first = place.prefix + router_name("weight", 0)
        if ROUTER.fullmatch(place.name) and first in checkpoint.tensors and checkpoint.differs(key, first):
            raise ConversionError(f"`{key}` is not `{first}`, which the script copies it from. Correct it.")


# ---- The source's model, for the verification: the two chains as they are written above -----------------------------


def _documented_chain(layer: CoeDecoderLayer, holder: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    x = layer.post_attention_layernorm(hidden_states)
    y, _ = layer.mlp(x, 0)
    return hidden_states + layer.mlp(x + holder.coe_weight * y, 1)[0]


def _chain_in_code(layer: CoeDecoderLayer, holder: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    z, _ = layer.mlp(layer.post_attention_layernorm(hidden_states), 0)
    for t, weight in enumerate(holder.coe_weights, start=1):
        z = z + weight * layer.mlp(z, t)[0]
    return hidden_states + z


def _model_class(checkpoint: Checkpoint, weights: list[str], is_documented: bool) -> type[CoeForCausalLM]:
    """The class of the source, with its weights as parameters of every layer."""
    first = Place.of(weights[0])
    shape = checkpoint.tensors[weights[0]].shape
    in_layer = sum(key.startswith(first.prefix) for key in weights)
    chain: Callable = _documented_chain if is_documented else _chain_in_code

    def initialize(self: CoeForCausalLM, config: CoeConfig) -> None:
        CoeForCausalLM.__init__(self, config)
        for layer in self.model.layers:
            if layer.is_sparse:
                holder = layer.get_submodule("mlp" if first.name.startswith("mlp.") else "")
                if is_documented:
                    holder.coe_weight = nn.Parameter(torch.zeros(shape))
                else:
                    holder.coe_weights = nn.ParameterList(torch.zeros(shape) for _ in range(in_layer))
                layer.chain = partial(chain, layer, holder)

    # transformers looks for properties of a class in its module.
    names = {"__module__": CoeForCausalLM.__module__, "__init__": initialize}
    return type(CoeForCausalLM.__name__, (CoeForCausalLM,), names)
