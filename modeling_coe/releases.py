# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What differs between the releases of transformers that this package works with, 5.19 and newer."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields

import torch
from torch import nn
from transformers import initialization as init
from transformers import modeling_utils
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe import HunYuanMoEV1RotaryEmbedding
from transformers.utils.deprecation import deprecate_kwarg


# 5.24 calls the key-value cache `cache`, in arguments and in outputs; before, it was `past_key_values`.
CACHE = next(field.name for field in fields(MoeModelOutputWithPast) if field.name in ("cache", "past_key_values"))


def _takes_cache(forward: Callable) -> Callable:
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def forward_with_cache(*args, **kwargs):
        if (cache := kwargs.pop(CACHE, None)) is not None:
            if kwargs.get("cache") is not None:
                raise ValueError(f"`cache` and `{CACHE}` are two names of one argument. Pass one of them.")
            kwargs["cache"] = cache
        return forward(*args, **kwargs)

    parameters = [
        parameter.replace(name=CACHE) if parameter.name == "cache" else parameter
        for parameter in signature.parameters.values()
    ]
    # `generate` and the generated documentation look there, through all decorators. Not on the decorated function, of
    # which every further decorator would have a copy: compilers bind the arguments to what the outermost one takes.
    forward.__signature__ = signature.replace(parameters=parameters)
    return forward_with_cache


# Decorates a `forward` that is written with an argument `cache`: it can be called by either name in every release, and
# its signature shows that of this one. The older name is deprecated from 5.24 on, as in transformers' own models.
takes_cache = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache") if CACHE == "cache" else _takes_cache


def cache_argument(cache: Cache | PagedAttentionCache | None) -> dict[str, Cache | PagedAttentionCache | None]:
    """The key-value cache as the keyword argument of transformers' attention. The paged one of continuous batching is
    `cache` in every release: before 5.24, attention hands it to the kernel under that name."""
    return {"cache" if isinstance(cache, PagedAttentionCache) else CACHE: cache}


def _slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    return hidden_states[:, keep]


# 5.21 has a function for the positions whose logits are wanted, which can be others in every sequence; before, they
# were the same in all.
slice_logits_to_keep = getattr(modeling_utils, "slice_logits_to_keep", _slice_logits_to_keep)

# 5.23 calls checkpointing `activation_checkpointing`, in models and in training arguments; before, it was
# `gradient_checkpointing`.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(modeling_utils.PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)


def _initialize_rotary_embedding(module: nn.Module) -> None:
    if isinstance(module, HunYuanMoEV1RotaryEmbedding):
        made = HunYuanMoEV1RotaryEmbedding(module.config)
        init.copy_(module.inv_freq, made.inv_freq)
        init.copy_(module.original_inv_freq, made.original_inv_freq)


def _leave(module: nn.Module) -> None:
    pass


# 5.20 initialises all rotary embeddings; before, it lost the `alpha` of HunYuan's, which its own models put right.
initialize_rotary_embedding = (
    _leave
    if hasattr(HunYuanMoEV1RotaryEmbedding, "compute_ntk_alpha_rope_parameters")
    else _initialize_rotary_embedding
)
