# Copyright 2026 The CoE Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Grouped expert computation on the CPU, built for a chain that calls the same experts C times.

Rows (one for each token and chosen expert) are sorted by expert, and every expert multiplies its rows in one go,
straight from the stored weights. What the C calls of a layer share is [`ExpertWeights`]: their weight gradients are
computed together, after the backward of all of them, so that a chain holds one gradient per weight where separate
calls would hold, and add up, C of them.

Shapes: T tokens, H hidden, N experts, K chosen per token, I expert width, R rows.
"""

import functools
import mmap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.integrations.moe import grouped_mm_experts_forward as torch_grouped_mm_experts_forward
from transformers.utils.generic import maybe_autocast


def grouped_mm_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The `"grouped_mm"` of CoE's experts: this module's functions on the CPU, transformers' own elsewhere.

    Args:
        hidden_states (`torch.Tensor`): (T, H); computed in the dtype of the expert weights.
        top_k_index (`torch.Tensor`): (T, K) experts; ids of N and more are computed by another rank.
        top_k_weights (`torch.Tensor`): (T, K) routing weights; the weighted sum is accumulated in their dtype.

    Returns:
        `torch.Tensor`: (T, H) in the dtype of `hidden_states`.
    """
    weights = self.shared_weights
    if weights is None:
        gate_up_proj, down_proj = self.gate_up_proj, self.down_proj
        if not _is_computed_here(hidden_states, self.act_fn, gate_up_proj, down_proj):
            if not torch.compiler.is_compiling() and type(gate_up_proj).__module__.startswith("torchao."):
                # Such tensors can be multiplied with expert by expert, and not grouped: what `"eager"` does.
                return type(self).forward.__wrapped__(self, hidden_states, top_k_index, top_k_weights)
            return torch_grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        weights = ExpertWeights(gate_up_proj, down_proj)
        if self.is_sharing_weights and torch.is_grad_enabled():
            self.shared_weights = weights
    tokens = hidden_states.to(weights.gate_up_proj.dtype)
    if len(tokens) == 1 and not torch.is_grad_enabled():
        output = _one_token(tokens, top_k_index, top_k_weights, weights, self.act_fn)
    else:
        output = _GroupedExperts.apply(tokens, top_k_weights, weights.anchor, top_k_index, weights, self.act_fn)
    return output.to(hidden_states.dtype)


COE_EXPERTS_FUNCTIONS = ExpertsInterface()
COE_EXPERTS_FUNCTIONS["grouped_mm"] = grouped_mm_experts_forward
# transformers' own stays selectable.
ALL_EXPERTS_FUNCTIONS.register("torch_grouped_mm", torch_grouped_mm_experts_forward)


def _is_computed_here(hidden_states: torch.Tensor, act_fn: nn.Module, *weights: torch.Tensor) -> bool:
    return (
        hidden_states.device.type == "cpu"
        and not torch.compiler.is_compiling()
        # Subclasses (DTensor, quantised weights) do not have the plain storage that is read below.
        and all(type(weight) in (torch.Tensor, nn.Parameter) and weight.is_contiguous() for weight in weights)
        # The activation's own parameters would get no gradient.
        and next(act_fn.parameters(), None) is None
    )


# What `sharing_weights` uses of PEFT's `ParamWrapper`: all of it or, where a name is missing, nothing.
_PARAM_WRAPPER = ("_activate_lora", "merged_adapters", "merged", "disable_adapters", "active_adapters", "base_layer")


@contextmanager
def sharing_weights(experts: nn.Module) -> Iterator[None]:
    """Lets the calls of `experts` inside it share their weights and compute the weights' gradients once.

    PEFT wraps experts with adapters, one wrapper a parameter, and adds these to the weights in every call. Here that
    happens once for all calls, with gradients and without.

    Steps aside, leaving every call on its own, where nothing is gained (no gradient and no adapter), where a release
    of PEFT has other names for what is used here, or where the weights come and go with every call: experts that are a
    unit of FSDP or of ZeRO-3 themselves.
    """
    wrappers = []
    while all(hasattr(experts, name) for name in _PARAM_WRAPPER):
        wrappers.append(experts)
        experts = experts.base_layer
    if (
        not hasattr(experts, "is_sharing_weights")
        or any(isinstance(module, FSDPModule) for module in (*wrappers, experts))
        or not (wrappers or torch.is_grad_enabled())
        or torch.compiler.is_compiling()
        or is_deepspeed_zero3_enabled()
    ):
        yield
        return
    with ExitStack() as stack:
        for wrapper in wrappers:
            if not wrapper.merged and not wrapper.disable_adapters:
                stack.enter_context(wrapper._activate_lora(wrapper.active_adapters))
                # They are in the weights meanwhile, and its own forward must not add them again.
                stack.callback(setattr, wrapper, "merged_adapters", wrapper.merged_adapters)
                wrapper.merged_adapters = wrapper.active_adapters
        experts.is_sharing_weights = True
        try:
            yield
        finally:
            experts.is_sharing_weights, experts.shared_weights = False, None


class _Rows(NamedTuple):
    """The rows, sorted by expert: one for each token and expert chosen for it."""

    choice: torch.Tensor  # (R,) which of the T * K choices a row is
    slot: torch.Tensor  # (T, K) the row of a choice; R where another rank computes it
    counts: torch.Tensor  # (N,) rows of each expert

    @classmethod
    def sort(cls, top_k_index: torch.Tensor, num_experts: int) -> "_Rows":
        sorted_index, choice = top_k_index.reshape(-1).sort(stable=True)
        counts = torch.bincount(sorted_index, minlength=num_experts)
        slot = torch.empty_like(choice)
        if len(counts) > num_experts:  # another rank's, sorted to the end
            counts = counts[:num_experts]
            num_rows = int(counts.sum())
            slot.fill_(num_rows)
            choice = choice[:num_rows]
        slot[choice] = torch.arange(len(choice), device=choice.device)
        return cls(choice, slot.view_as(top_k_index), counts)

    @property
    def token(self) -> torch.Tensor:
        return self.choice // self.slot.shape[1]


def _first_order(backward: Callable) -> Callable:
    """Marks the backward of an autograd function that has no backward of its own, and that autocast leaves alone."""

    @functools.wraps(backward)
    def checked_backward(ctx: FunctionCtx, grad_output: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "`grouped_mm` experts on the CPU have no second derivative (`create_graph=True`). "
                'Choose `experts_implementation="torch_grouped_mm"`, "batched_mm" or "eager".'
            )
        with maybe_autocast("cpu", enabled=False):
            return backward(ctx, grad_output)

    return checked_backward


class _GroupedExperts(torch.autograd.Function):
    """Weighted sum (T, H) of each token's experts. The weights' gradients are left to [`ExpertWeights`]."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        tokens: torch.Tensor,
        top_k_weights: torch.Tensor,
        anchor: torch.Tensor | None,
        top_k_index: torch.Tensor,
        weights: "ExpertWeights",
        act_fn: Callable,
    ) -> torch.Tensor:
        gate_up_proj, down_proj = weights.gate_up_proj, weights.down_proj
        rows = _Rows.sort(top_k_index, len(gate_up_proj))
        gate_up = _grouped_mm(tokens.index_select(0, rows.token), gate_up_proj.mT, rows.counts)
        gate, up = gate_up.chunk(2, dim=-1)
        outputs = _grouped_mm(act_fn(gate) * up, down_proj.mT, rows.counts)
        row_weights = top_k_weights.reshape(-1, 1)[rows.choice]
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(tokens, gate_up, row_weights, gate_up_proj, down_proj, *rows)
            ctx.gradients, ctx.act_fn = weights.gradients, act_fn
        outputs = outputs.mul_(row_weights) if outputs.dtype == row_weights.dtype else outputs * row_weights
        return _sum_rows(outputs, rows.slot)

    @staticmethod
    @_first_order
    def backward(ctx: FunctionCtx, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens, gate_up, row_weights, gate_up_proj, down_proj, *rows = ctx.saved_tensors
        rows = _Rows(*rows)
        gate, up = gate_up.chunk(2, dim=-1)
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            act = ctx.act_fn(gate)
        inner = act.detach() * up  # the input (R, I) of the down projection

        # With w the weight of a row, its share of the output is w * down(inner).
        grad_output = grad_output.to(tokens.dtype)
        grad_inner = _grouped_mm(grad_output.index_select(0, rows.token), down_proj, rows.counts)
        grad_top_k_weights = None
        if ctx.needs_input_grad[1]:
            grad_top_k_weights = row_weights.new_zeros(rows.slot.shape)
            grad_row_weights = torch.linalg.vecdot(grad_inner.to(row_weights.dtype), inner.to(row_weights.dtype))
            grad_top_k_weights.view(-1)[rows.choice] = grad_row_weights
        row_weights = row_weights.to(inner.dtype)
        grad_inner.mul_(row_weights)

        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad_inner, act.detach(), out=grad_up)
        grad_gate.copy_(torch.autograd.grad(act, gate, grad_inner.mul_(up))[0])
        if ctx.needs_input_grad[2]:
            ctx.gradients.add(
                gate_up=_Factors(rows, grad_gate_up, tokens),
                down=_Factors(rows, inner.mul_(row_weights), grad_output),
            )
        grad_tokens = None
        if ctx.needs_input_grad[0]:
            grad_tokens = _sum_rows(_grouped_mm(grad_gate_up, gate_up_proj, rows.counts), rows.slot).to(tokens.dtype)
        return grad_tokens, grad_top_k_weights, None, None, None, None


def _grouped_mm(inputs: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Rows (R, in) times the matrix of their expert in `weight` (N, in, out): (R, out)."""
    if _torch_takes(inputs, weight):
        return F.grouped_mm(inputs, weight, offs=counts.cumsum(0, dtype=torch.int32))
    output, start = inputs.new_empty(len(inputs), weight.shape[2]), 0
    for expert, count in enumerate(counts.tolist()):
        if count:  # in decoding most experts have no row
            rows = slice(start, start + count)
            _mm(inputs[rows], weight[expert], out=output[rows])
            start += count
    return output


def _torch_takes(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch's own `grouped_mm` computes this dtype and these widths on the CPU, as fast as `_mm` does."""
    return (
        hasattr(F, "grouped_mm")
        and inputs.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(width * inputs.itemsize % 16 == 0 for width in weight.shape[1:])
        and not _is_onednn_faster()
    )


def _sum_rows(values: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """Sums the rows (R, H) of each token's choices, `slot` (T, K), in float32 or wider: (T, H)."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if slot.numel() > len(values):  # choices that another rank computes
        values = torch.cat((values, values.new_zeros(1, values.shape[1])))
    return F.embedding_bag(slot, values, mode="sum")


def _one_token(
    token: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weights: "ExpertWeights",
    act_fn: Callable,
) -> torch.Tensor:
    """A single token (1, H) without gradient: reads the weights of its experts once, and nothing else."""
    gate_up_proj, down_proj = weights.gate_up_proj, weights.down_proj
    slots, experts = [], []
    for slot, expert in enumerate(top_k_index[0].tolist()):
        if expert < len(gate_up_proj):
            slots.append(slot)
            experts.append(expert)
    gate_up = token.new_empty(len(experts), gate_up_proj.shape[1])
    for row, expert in enumerate(experts):
        torch.mv(gate_up_proj[expert], token[0], out=gate_up[row])
    gate, up = gate_up.chunk(2, dim=-1)
    inner = act_fn(gate) * up
    outputs = token.new_empty(len(experts), token.shape[1])
    for row, expert in enumerate(experts):
        torch.mv(down_proj[expert], inner[row], out=outputs[row])
    return (outputs * top_k_weights[0, slots].unsqueeze(-1)).sum(dim=0, keepdim=True)


class _Factors(NamedTuple):
    """What one call leaves for the gradient of a weight: the two sides of an outer product for each of its rows."""

    rows: _Rows
    by_row: torch.Tensor  # (R, width)
    by_token: torch.Tensor  # (T, width)

    def by_expert(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        counts = self.rows.counts.tolist()
        for by_row, token in zip(self.by_row.split(counts), self.rows.token.split(counts), strict=True):
            yield by_row, self.by_token.index_select(0, token)


class _PendingGradients:
    """What the calls of a layer's experts have left, in one backward pass, for the gradients of the weights."""

    def __init__(self):
        self.gate_up: list[_Factors] = []  # output gradients by row, inputs by token
        self.down: list[_Factors] = []  # inputs by row, output gradients by token
        self.backward_pass: int | None = None

    def add(self, gate_up: _Factors, down: _Factors) -> None:
        # A pass that ended before it reached the weights (for the gradient of an activation, say) left its factors.
        backward_pass = torch._C._current_graph_task_id()
        if backward_pass != self.backward_pass:
            self.clear()
            self.backward_pass = backward_pass
        self.gate_up.append(gate_up)
        self.down.append(down)

    def clear(self) -> None:
        self.gate_up.clear()
        self.down.clear()


class ExpertWeights:
    """The expert weights of one layer in one forward pass.

    `anchor` is an empty tensor that depends on the weights. Every call takes it, so that autograd reaches the weights
    once, after the backward of all calls.
    """

    def __init__(self, gate_up_proj: torch.Tensor, down_proj: torch.Tensor):
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj
        self.gradients = _PendingGradients()
        self.anchor = None
        if torch.is_grad_enabled():
            self.anchor = _WeightGradients.apply(gate_up_proj, down_proj, self.gradients)


class _WeightGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, gradients: _PendingGradients
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradients = gradients
        # Not the weights themselves: a merged adapter's would live as long as the graph.
        ctx.like = [weight.new_empty(weight.shape, device="meta") for weight in (gate_up_proj, down_proj)]
        return gate_up_proj.new_empty(0)

    @staticmethod
    @_first_order
    def backward(ctx: FunctionCtx, _: None) -> tuple[torch.Tensor | None, ...]:
        gradients, grad_gate_up_proj, grad_down_proj = ctx.gradients, None, None
        if gradients.backward_pass == torch._C._current_graph_task_id():
            if ctx.needs_input_grad[0]:
                grad_gate_up_proj = _empty_in_huge_pages(ctx.like[0])
                _sum_outer_products(gradients.gate_up, out=grad_gate_up_proj)
            gradients.gate_up.clear()  # frees them before the other gradient takes memory
            if ctx.needs_input_grad[1]:
                grad_down_proj = _empty_in_huge_pages(ctx.like[1])
                _sum_outer_products(gradients.down, out=grad_down_proj.mT)
        gradients.clear()
        return grad_gate_up_proj, grad_down_proj, None


def _sum_outer_products(factors: list[_Factors], out: torch.Tensor) -> None:
    """Sum over all rows of all calls, by row times by token, for each expert: `out` (N, by row, by token)."""
    for expert_out, *pairs in zip(out.unbind(), *(call.by_expert() for call in factors), strict=True):
        by_row, by_token = pairs[0] if len(pairs) == 1 else map(torch.cat, zip(*pairs, strict=True))
        if not len(by_row):
            expert_out.zero_()
        elif expert_out.is_contiguous():
            _mm(by_row.t(), by_token, expert_out)
        else:
            _mm(by_token.t(), by_row, expert_out.t())


def _empty_in_huge_pages(like: torch.Tensor) -> torch.Tensor:
    """A CPU tensor of the shape and dtype of another, in pages of 2 MiB where the system has them.

    Weight gradients are fresh memory in every training step, and touching it for the first time in pages of 4 KiB
    costs nearly as much as computing what goes in.
    """
    # What is smaller comes from memory that malloc keeps, touched before.
    if like.nbytes < 2**25 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(like.shape, dtype=like.dtype)
    memory = mmap.mmap(-1, like.nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return torch.empty(like.shape, dtype=like.dtype)
    address = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
    return torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=-address % _HUGE_PAGE).view_as(like)


_HUGE_PAGE = 2**21


def _mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`torch.mm`, by oneDNN where that is the faster library for float32."""
    if a.dtype != torch.float32 or len(a) < _ONEDNN_ROWS or not _is_onednn_faster():
        return torch.mm(a, b, out=out)
    # oneDNN compiles a kernel for every shape, so sizes that routing decides come in steps.
    padding = -len(a) % _ONEDNN_ROWS
    inner_padding = -a.shape[1] % _ONEDNN_ROWS
    if padding or inner_padding:
        a = F.pad(a, (0, inner_padding, 0, padding))
    if inner_padding:
        b = F.pad(b, (0, 0, 0, inner_padding))
    return out.copy_(torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")[: len(out)])


_ONEDNN_ROWS = 16


@functools.cache
def _is_onednn_faster() -> bool:
    """Whether torch's default library, MKL, leaves its fastest kernels unused: it keeps them to Intel's processors."""
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and "vendor_id" in cpu
        and "GenuineIntel" not in cpu
    )
