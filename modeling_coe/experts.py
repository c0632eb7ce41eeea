# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Which function computes a layer's experts, and what the calls of a chain share.

The `"grouped_mm"` of CoE's experts is `grouped_experts.py` on the CPU, MegaBlocks' kernels on a CUDA device for which
torch has no grouped kernel, and transformers' own elsewhere. A chain calls the same experts C times:
[`sharing_weights`] lets these calls have one [`ExpertWeights`], and PEFT's adapters once.

Shapes: T tokens, H hidden, N experts, K chosen per token.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.integrations.moe import grouped_mm_experts_forward as torch_grouped_mm_experts_forward
from transformers.utils import logging

from .adapters import (
    PARAM_WRAPPER,
    PROJECTIONS,
    adapted_experts_forward,
    is_active,
    low_rank_factors,
    missing_columns,
    obstacle,
)
from .cpu_memory import LARGE_BYTES
from .grouped_experts import ExpertWeights, Projection, compute_experts
from .quantized_weights import QuantizedMatrices, dtype_of_products, is_quantized


logger = logging.get_logger(__name__)

ALTERNATIVES = 'Other values of `experts_implementation`: "grouped_mm", "batched_mm", "eager".'
ExpertsForward = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def prefers_megablocks(weight: torch.Tensor) -> bool:
    """Whether `"grouped_mm"` multiplies such weights with MegaBlocks' kernels. The package puts a function that knows
    them in the place of this one; the code beside a saved model is without them."""
    return False


def grouped_mm_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The `"grouped_mm"` of CoE's experts: this module's functions on the CPU, and elsewhere transformers' own, or
    `"megablocks"` where torch would loop over experts. `"torch_grouped_mm"` is transformers' own everywhere.

    Args:
        hidden_states (`torch.Tensor`): (T, H); computed in the dtype of the expert weights, or autocast's.
        top_k_index (`torch.Tensor`): (T, K) experts; ids of N and more are computed by another rank.
        top_k_weights (`torch.Tensor`): (T, K) routing weights; the weighted sum is accumulated in their dtype.

    Returns:
        `torch.Tensor`: (T, H) in the dtype of `hidden_states`.
    """
    # Apart, as what was made without gradients would give none to a later call: checkpointing makes both kinds.
    has_gradients = torch.is_grad_enabled()
    weights = self.shared_weights.get(has_gradients)
    if weights is None:
        gate_up_proj, down_proj = self.gate_up_proj, self.down_proj
        if is_quantized(gate_up_proj) or is_quantized(down_proj):
            forward = _quantized_experts_forward
            if torch.compiler.is_compiling():
                forward = torch.compiler.disable(forward, reason="the routing decides which matrices are read")
            return forward(self, hidden_states, top_k_index, top_k_weights)
        gate_up, down = (
            Projection(weight, *self.adapters.get(name, ()))
            for name, weight in zip(PROJECTIONS, (gate_up_proj, down_proj), strict=True)
        )
        dtype = _autocast_dtype(gate_up_proj, top_k_index)
        if _is_computed_here(hidden_states, self.act_fn, gate_up_proj, down_proj):
            are_as_stored = dtype is None and not self.adapters
            if are_as_stored and _gains_nothing(self.config.inner_iter, top_k_index, gate_up_proj, down_proj):
                return torch_grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
            prepare = ExpertWeights
        else:
            is_plain = not torch.compiler.is_compiling() and _are_plain(gate_up_proj, down_proj)
            if not self.adapters and is_plain and prefers_megablocks(gate_up_proj):
                return ALL_EXPERTS_FUNCTIONS["megablocks"](self, hidden_states, top_k_index, top_k_weights)
            prepare = for_torchs_products
        if dtype is not None:
            gate_up, down = gate_up.to(dtype), down.to(dtype)
        weights = prepare(gate_up, down)
        if self.is_sharing_weights:
            self.shared_weights[has_gradients] = weights
    if isinstance(weights, ExpertWeights):
        tokens = hidden_states.to(weights.dtype)
        return compute_experts(tokens, top_k_index, top_k_weights, weights, self.act_fn).to(hidden_states.dtype)
    return torch_experts_forward(self, hidden_states, top_k_index, top_k_weights, *weights)


def for_torchs_products(gate_up: Projection, down: Projection) -> tuple[Projection, Projection]:
    """Matrices (N, 2I, H) and (N, H, I) as torch's grouped products take them: with zeros where a width is no whole 16
    bytes. Others stay as they are."""
    missing_hidden, missing_inner = (missing_columns(size, down.weight.dtype) for size in down.weight.shape[1:])
    if missing_hidden or missing_inner:
        gate_up = gate_up.pad(missing_inner, missing_hidden, parts=2)
        down = down.pad(missing_hidden, missing_inner)
    return gate_up, down


def torch_experts_forward(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: Projection,
    down: Projection,
) -> torch.Tensor:
    """Experts by torch's grouped products.

    Args:
        experts (`nn.Module`): Whose activation is used.
        hidden_states (`torch.Tensor`): (T, H).
        top_k_index (`torch.Tensor`): (T, K) experts; ids of N and more are computed by another rank.
        top_k_weights (`torch.Tensor`): (T, K) routing weights.
        gate_up, down (`Projection`): Of [`for_torchs_products`]; computed in their dtype.

    Returns:
        `torch.Tensor`: (T, H) in the dtype of `hidden_states`.
    """
    width = hidden_states.shape[1]
    missing = down.weight.shape[1] - width
    if missing:
        hidden_states = F.pad(hidden_states, (0, missing))
    if gate_up.a is not None or down.a is not None:
        output = adapted_experts_forward(experts, hidden_states, top_k_index, top_k_weights, gate_up, down)
    else:
        experts = _ExpertsWith(experts, gate_up.weight, down.weight)
        output = torch_grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    return output[:, :width] if missing else output


class _ExpertsWith:
    """Experts with other weights, for transformers' function, which reads the weights from the module."""

    def __init__(self, experts: nn.Module, gate_up_proj: torch.Tensor, down_proj: torch.Tensor):
        self.experts, self.gate_up_proj, self.down_proj = experts, gate_up_proj, down_proj

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experts, name)


def _quantized_experts_forward(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """On the CPU as other weights, in the dtype of `hidden_states` or autocast's. What torchao's tensors can do
    elsewhere is to be multiplied with expert by expert, which is what `"eager"` does."""
    dtype = dtype_of_products(hidden_states)
    gate_up, down = (QuantizedMatrices.of(weight, dtype) for weight in (experts.gate_up_proj, experts.down_proj))
    if gate_up is None or down is None or not _is_computed_here(hidden_states, experts.act_fn):
        return type(experts).forward.__wrapped__(experts, hidden_states, top_k_index, top_k_weights)
    weights = ExpertWeights(Projection(gate_up), Projection(down))
    output = compute_experts(hidden_states.to(dtype), top_k_index, top_k_weights, weights, experts.act_fn)
    return output.to(hidden_states.dtype)


def _from_the_hub(name: str, trains: bool) -> ExpertsForward:
    """An implementation of transformers' with kernels of the Hub, whose errors name the remedy."""
    experts_forward = ALL_EXPERTS_FUNCTIONS[name]

    def experts_forward_or_remedy(
        self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if not trains and torch.is_grad_enabled() and any(weight.requires_grad for weight in self.parameters()):
            raise ValueError(f"`{name}` has no gradients. Use it under `torch.no_grad()`. {ALTERNATIVES}")
        try:
            return experts_forward(self, hidden_states, top_k_index, top_k_weights)
        except ImportError as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ImportError(f"`{name}` cannot run: {reason}. {ALTERNATIVES}") from error

    return experts_forward_or_remedy


COE_EXPERTS_FUNCTIONS = ExpertsInterface()
COE_EXPERTS_FUNCTIONS["grouped_mm"] = grouped_mm_experts_forward
for _name, _trains in {"sonicmoe": True, "deepgemm": False}.items():
    if _name in ALL_EXPERTS_FUNCTIONS:
        COE_EXPERTS_FUNCTIONS[_name] = _from_the_hub(_name, _trains)
# transformers' own stays selectable.
ALL_EXPERTS_FUNCTIONS.register("torch_grouped_mm", torch_grouped_mm_experts_forward)


def _is_computed_here(hidden_states: torch.Tensor, act_fn: nn.Module, *weights: torch.Tensor) -> bool:
    return (
        hidden_states.device.type == "cpu"
        and not torch.compiler.is_compiling()
        # Counts of rows are read as numbers, which a traced graph would keep, and transforms of `torch.func` refuse.
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and _are_plain(*weights)
        and all(weight.is_contiguous() for weight in weights)
        # The activation's own parameters would get no gradient.
        and next(act_fn.parameters(), None) is None
    )


def _are_plain(*weights: torch.Tensor) -> bool:
    """Subclasses (DTensor, quantised weights) do not have the plain storage that kernels read."""
    return all(type(weight) in (torch.Tensor, nn.Parameter) for weight in weights)


def is_autocasting(weight: torch.Tensor) -> bool:
    device_type = weight.device.type  # that of "meta", of which no autocast can be asked, among them
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _autocast_dtype(weight: torch.Tensor, top_k_index: torch.Tensor) -> torch.dtype | None:
    """What autocast would have the weights multiplied in, as it has those of linear modules, where that is another
    dtype than theirs: torch's grouped products know nothing of autocast. Without gradients and with few tokens, a copy
    of all weights costs more than the products."""
    if not is_autocasting(weight) or weight.dtype == torch.float64:
        return None
    if not torch.is_grad_enabled() and top_k_index.numel() < len(weight):
        return None
    dtype = torch.get_autocast_dtype(weight.device.type)
    return None if dtype == weight.dtype else dtype


def _gains_nothing(
    num_iterations: int, top_k_index: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor
) -> bool:
    """Whether transformers' function does as well, with less around its products: where there are no gradients and few
    tokens, or one call with gradients so small that their memory is quickly had. What checkpointing computes again has
    to find the same answer."""
    if torch.is_grad_enabled():
        is_little = num_iterations == 1 and gate_up_proj.nbytes < LARGE_BYTES
    else:
        is_little = len(top_k_index) > 1 and top_k_index.numel() <= len(gate_up_proj)
    return (
        is_little
        and gate_up_proj.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not any(missing_columns(width, down_proj.dtype) for width in down_proj.shape[1:])
        # It takes no care of other ranks' experts unless a plan of parallelism has told it of them.
        and bool((top_k_index < len(gate_up_proj)).all())
    )


def check_adaptable(weight: torch.Tensor) -> None:
    """Raises `ValueError` where a weight of the experts is quantised, to which PEFT cannot add an adapter."""
    if is_quantized(weight):
        raise ValueError(
            f"The routed experts are quantised ({type(weight).__name__}): PEFT adapts parameters by adding to them, "
            "which such tensors cannot do. Adapt attention, shared experts and routers alone, `lora_config(model, "
            "experts=False)`, or load the model without `quantization_config`."
        )


@contextmanager
def sharing_weights(experts: nn.Module) -> Iterator[None]:
    """Lets the calls of `experts` inside it share their weights and compute the weights' gradients once.

    PEFT wraps experts with adapters, one wrapper a parameter, and adds these to the weights in every call. Here rows
    are multiplied by the adapters instead (see `adapters.py`). Where that cannot be, they are added once for all
    calls, with gradients and without.

    Steps aside, leaving every call on its own, where nothing is gained (no gradient, adapter nor autocast), where a
    release of PEFT has other names for what is used here, or where the weights come and go with every call: experts
    that are a unit of FSDP or of ZeRO-3 themselves.
    """
    wrappers = []
    while all(hasattr(experts, name) for name in PARAM_WRAPPER):
        wrappers.append(experts)
        experts = experts.base_layer
    if (
        not hasattr(experts, "is_sharing_weights")
        or not (wrappers or torch.is_grad_enabled() or is_autocasting(next(experts.parameters())))
        or torch.compiler.is_compiling()
    ):
        yield
        return
    active = [wrapper for wrapper in wrappers if is_active(wrapper)]
    if is_deepspeed_zero3_enabled() or any(isinstance(module, FSDPModule) for module in (*wrappers, experts)):
        if active:
            _warn_of_added_weights("the experts' weights come and go with every call")
        yield
        return
    if wrappers:
        check_adaptable(experts.gate_up_proj)
    why_not = obstacle(experts, active) if active else None
    with ExitStack() as stack:
        if why_not is not None:
            _warn_of_added_weights(why_not)
            for wrapper in active:
                stack.enter_context(wrapper._activate_lora(wrapper.active_adapters))
        for wrapper in active:
            # They are applied here, and its own forward must not add them again.
            stack.callback(setattr, wrapper, "merged_adapters", wrapper.merged_adapters)
            wrapper.merged_adapters = wrapper.active_adapters
        stack.callback(experts.stop_sharing)
        experts.is_sharing_weights = True
        experts.adapters = low_rank_factors(experts, active) if why_not is None else {}
        yield


def _warn_of_added_weights(reason: str) -> None:
    logger.warning_once(
        f"Adapters are added to all weights of their experts in every pass, since {reason}. This takes time and "
        "memory in proportion to the weights."
    )
