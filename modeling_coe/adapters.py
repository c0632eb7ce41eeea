# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""PEFT's low-rank adapters of expert weights, read as factors that rows are multiplied by.

PEFT adds `scaling * B A` to the weights of all experts in every pass, in time and memory in proportion to the weights.
Multiplying the rows instead, `W x + scaling * B (A x)`, takes time in proportion to the tokens, and no gradient of a
weight is made for those of its adapters. On the CPU [`Projection`] does that; [`adapted_experts_forward`] does it
elsewhere.

Shapes: T tokens, H hidden, N experts, K chosen per token, I expert width, R rows, r rank.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import _grouped_linear

from .grouped_experts import Projection, Rows, sum_rows


# What is used of PEFT's `ParamWrapper`, which wraps experts once for each adapted parameter.
PARAM_WRAPPER = (
    *("_activate_lora", "merged_adapters", "merged", "disable_adapters", "active_adapters", "base_layer"),
    *("parameter_name", "lora_A", "lora_B", "scaling"),
)
PROJECTIONS = ("gate_up_proj", "down_proj")


def obstacle(experts: nn.Module, wrappers: Iterable[nn.Module]) -> str | None:
    """Why rows of these experts cannot be multiplied by the active adapters of `wrappers`, or `None`."""
    implementation = experts.config._experts_implementation
    if implementation != "grouped_mm":
        return f'`experts_implementation` is {implementation!r}, and only "grouped_mm" multiplies rows by adapters'
    if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return "the pass is traced or transformed"
    for wrapper in wrappers:
        name = wrapper.parameter_name
        if name not in PROJECTIONS:
            return f"there is an adapter of `{name}`"
        weight = getattr(experts, name)
        if type(weight) not in (torch.Tensor, nn.Parameter) or weight.dtype.itemsize < 2:
            return f"`{name}` is of type {type(weight).__name__} and {weight.dtype}"
        if weight.device.type not in ("cpu", "cuda"):
            return f"`{name}` is on {weight.device}, where grouped products are not known to work"
        num_experts, out_features, in_features = weight.shape
        for adapter in _active(wrapper):
            a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
            rows = a.shape[0]
            is_plain = all(type(factor) in (torch.Tensor, nn.Parameter) for factor in (a, b))
            if not is_plain or rows % num_experts or a.shape != (rows, in_features) or b.shape != (out_features, rows):
                return f"the adapter {adapter!r} of `{name}` is sharded, or laid out in another way"
            if not weight.device == a.device == b.device:
                return f"the adapter {adapter!r} of `{name}` is on another device"
    return None


def low_rank_factors(
    experts: nn.Module, wrappers: Iterable[nn.Module]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The active adapters of each parameter as one: their factors side by side, in the dtype of the weights.

    Args:
        experts (`nn.Module`): With the parameters of `PROJECTIONS`, (N, out, in) each.
        wrappers (`Iterable[nn.Module]`): PEFT's, whose adapters have no [`obstacle`].

    Returns:
        `dict`: Name of the parameter -> `a` (N, r, in), the scaling in it, and `b` (N, out, r) of a [`Projection`]; r
            is the sum of the ranks.
    """
    parts = {}
    for wrapper in wrappers:
        weight = getattr(experts, wrapper.parameter_name)
        num_experts, out_features, in_features = weight.shape
        for adapter in _active(wrapper):
            # PEFT has (N * r, in) and (out, r * N): one is sorted by expert, the other by rank.
            a = wrapper.lora_A[adapter].weight.to(weight.dtype).reshape(num_experts, -1, in_features)
            b = wrapper.lora_B[adapter].weight.to(weight.dtype).reshape(out_features, -1, num_experts)
            parts.setdefault(wrapper.parameter_name, []).append((wrapper.scaling[adapter] * a, b.permute(2, 0, 1)))
    factors = {}
    for name, adapters in parts.items():
        a, b = adapters[0]
        if len(adapters) > 1:
            every_a, every_b = zip(*adapters, strict=True)
            a, b = torch.cat(every_a, dim=1), torch.cat(every_b, dim=2)
        # A token that is decoded needs few of the matrices, and a copy of all of them would cost more than it does.
        factors[name] = (a, b.contiguous()) if torch.is_grad_enabled() else (a, b)
    return factors


def is_active(wrapper: nn.Module) -> bool:
    """Whether a wrapper has an adapter that is to be applied, and is not in the weights already."""
    return not wrapper.merged and not wrapper.disable_adapters and bool(_active(wrapper))


def _active(wrapper: nn.Module) -> list[str]:
    return [adapter for adapter in wrapper.active_adapters if adapter in wrapper.lora_A]


def adapted_experts_forward(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: Projection,
    down: Projection,
) -> torch.Tensor:
    """Weighted sum of each token's adapted experts by transformers' grouped products, on any device.

    Args:
        experts (`nn.Module`): Whose activation is used.
        hidden_states (`torch.Tensor`): (T, H); computed in the dtype of the expert weights.
        top_k_index (`torch.Tensor`): (T, K) experts; ids of N and more are computed by another rank.
        top_k_weights (`torch.Tensor`): (T, K) routing weights; the weighted sum is accumulated in their dtype.
        gate_up (`Projection`): (N, 2I, H).
        down (`Projection`): (N, H, I).

    Returns:
        `torch.Tensor`: (T, H) in the dtype of `hidden_states`.
    """
    rows = Rows.sort(top_k_index, len(gate_up.weight))
    offsets = rows.counts.cumsum(0, dtype=torch.int32)
    gate_up_rows = _project(hidden_states[rows.token].to(gate_up.weight.dtype), gate_up, offsets)
    outputs = _project(experts._apply_gate(gate_up_rows), down, offsets)
    return sum_rows(outputs, rows.slot, top_k_weights).to(hidden_states.dtype)


def missing_columns(width: int, dtype: torch.dtype) -> int:
    """How many more columns make rows of whole 16 bytes, which torch's grouped products need."""
    return -width % (16 // dtype.itemsize)


def _project(inputs: torch.Tensor, projection: Projection, offsets: torch.Tensor) -> torch.Tensor:
    """Rows (R, in) times the matrices of their experts: (R, out)."""
    weight, a, b = projection
    output = _grouped_linear(inputs, weight, offsets)
    if a is None:
        return output
    padding = missing_columns(a.shape[1], a.dtype)
    a, b = F.pad(a, (0, 0, 0, padding)), F.pad(b, (0, padding)).contiguous()
    return output + _grouped_linear(_grouped_linear(inputs, a, offsets), b, offsets)
