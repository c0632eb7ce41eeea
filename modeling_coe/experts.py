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
import math
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.integrations.moe import grouped_mm_experts_forward as torch_grouped_mm_experts_forward


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
            return torch_grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        weights = ExpertWeights(gate_up_proj, down_proj)
        if self.is_sharing_weights:
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


@contextmanager
def sharing_weights(experts: nn.Module) -> Iterator[None]:
    """Lets the calls of `experts` inside it share their weights and compute the weights' gradients once.

    Steps aside, leaving every call on its own, where nothing is gained (no gradient) or where the weights come and go
    with every call: experts that are a unit of FSDP or of ZeRO-3 themselves, or wrapped, as PEFT wraps them.
    """
    if (
        not hasattr(experts, "is_sharing_weights")
        or isinstance(experts, FSDPModule)
        or not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or is_deepspeed_zero3_enabled()
    ):
        yield
        return
    experts.is_sharing_weights = True
    try:
        yield
    finally:
        experts.is_sharing_weights, experts.shared_weights = False, None


class _Rows(NamedTuple):
    """Which token each row belongs to, and which rows belong to each expert."""

    token: torch.Tensor  # (R,) the row's token
    slot: torch.Tensor  # (T, K) the row of a token's k-th expert; R where another rank computes it
    counts: torch.Tensor  # (N,) rows of each expert

    @classmethod
    def sort(cls, top_k_index: torch.Tensor, num_experts: int) -> "_Rows":
        sorted_index, order = top_k_index.reshape(-1).sort(stable=True)
        counts = torch.bincount(sorted_index, minlength=num_experts)
        slot = torch.empty_like(order)
        if len(counts) > num_experts:  # sorted to the end
            counts = counts[:num_experts]
            num_rows = int(counts.sum())
            slot.fill_(num_rows)
            order = order[:num_rows]
        slot[order] = torch.arange(len(order), device=order.device)
        return cls(order // top_k_index.shape[1], slot.view_as(top_k_index), counts)


def _segments(counts: torch.Tensor) -> dict[int, slice]:
    """The experts that have rows, each with its rows."""
    segments, start = {}, 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            segments[expert] = slice(start, start + count)
            start += count
    return segments


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
        segments = _segments(rows.counts)
        gate_up = _grouped_linear(tokens.index_select(0, rows.token), gate_up_proj, segments)
        gate, up = gate_up.chunk(2, dim=-1)
        outputs = _grouped_linear(act_fn(gate) * up, down_proj, segments)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(tokens, top_k_weights, gate_up, gate_up_proj, down_proj, *rows)
            ctx.weights, ctx.act_fn = weights, act_fn
        return _weighted_sum(outputs, rows.slot, top_k_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens, top_k_weights, gate_up, gate_up_proj, down_proj, *rows = ctx.saved_tensors
        rows = _Rows(*rows)
        segments = _segments(rows.counts)
        gate, up = gate_up.chunk(2, dim=-1)
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            act = ctx.act_fn(gate)
        inner = act.detach() * up  # the input (R, I) of the down projection

        # With w a row's weight, its share of the output is w * down(inner).
        grad_output = grad_output.to(tokens.dtype)
        grad_inner = _grouped_linear(grad_output.index_select(0, rows.token), down_proj.mT, segments)
        grad_top_k_weights = None
        if ctx.needs_input_grad[1]:
            dtype = top_k_weights.dtype
            products = torch.linalg.vecdot(grad_inner.to(dtype), inner.to(dtype))
            grad_top_k_weights = _with_zero_row(products, rows.slot)[rows.slot]
        row_weights = torch.empty(len(inner) + 1, 1, dtype=inner.dtype, device=inner.device)
        row_weights[rows.slot.view(-1), 0] = top_k_weights.to(inner.dtype).view(-1)
        grad_inner.mul_(row_weights[:-1])

        grad_gate_up = torch.empty_like(gate_up)
        torch.mul(grad_inner, act.detach(), out=grad_gate_up[:, up.shape[1] :])
        grad_gate_up[:, : up.shape[1]] = torch.autograd.grad(act, gate, grad_inner.mul_(up))[0]
        if ctx.needs_input_grad[2]:
            part = _GradientPart(segments, rows.token, tokens, grad_gate_up, inner.mul_(row_weights[:-1]), grad_output)
            ctx.weights.add(part)
        grad_tokens = None
        if ctx.needs_input_grad[0]:
            grad_tokens = _weighted_sum(_grouped_linear(grad_gate_up, gate_up_proj.mT, segments), rows.slot, None)
        return grad_tokens, grad_top_k_weights, None, None, None, None


def _grouped_linear(inputs: torch.Tensor, weight: torch.Tensor, segments: dict[int, slice]) -> torch.Tensor:
    """Rows (R, in) times the transpose of their expert's matrix in `weight` (N, out, in)."""
    output = inputs.new_empty(len(inputs), weight.shape[1])
    for expert, rows in segments.items():
        _mm(inputs[rows], weight[expert].t(), out=output[rows])
    return output


def _weighted_sum(values: torch.Tensor, slot: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Sums the K rows (R, H) of each token, weighted where `weights` (T, K) is given."""
    values = _with_zero_row(values, slot)
    if values.dtype in (torch.float32, torch.float64) and (weights is None or weights.dtype == values.dtype):
        return F.embedding_bag(slot, values, mode="sum", per_sample_weights=weights)
    terms = values[slot].to(torch.float32 if weights is None else weights.dtype)
    return (terms if weights is None else terms * weights.unsqueeze(-1)).sum(dim=1).to(values.dtype)


def _with_zero_row(values: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """`values`, with what slots of another rank's experts read appended where there are such slots."""
    return torch.cat((values, values.new_zeros(1, *values.shape[1:]))) if slot.numel() > len(values) else values


def _one_token(
    token: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weights: "ExpertWeights",
    act_fn: Callable,
) -> torch.Tensor:
    """A single token (1, H) without gradient: reads the weights of its experts once, and nothing else."""
    gate_up_proj, down_proj = weights.gate_up_proj, weights.down_proj
    chosen = [(slot, index) for slot, index in enumerate(top_k_index[0].tolist()) if index < len(gate_up_proj)]
    gate_up = token.new_zeros(top_k_index.shape[1], gate_up_proj.shape[1])
    for slot, index in chosen:
        torch.mv(gate_up_proj[index], token[0], out=gate_up[slot])
    gate, up = gate_up.chunk(2, dim=-1)
    inner = (act_fn(gate) * up * top_k_weights[0, :, None]).to(token.dtype)
    output = torch.zeros_like(token[0])
    for slot, index in chosen:
        output.addmv_(down_proj[index], inner[slot])
    return output[None]


class _GradientPart(NamedTuple):
    """What one call leaves for the gradients of the weights it used."""

    segments: dict[int, slice]
    token: torch.Tensor  # (R,)
    tokens: torch.Tensor  # (T, H), the input of the call
    grad_gate_up: torch.Tensor  # (R, 2I)
    inner: torch.Tensor  # (R, I), the weighted input of the down projection
    grad_output: torch.Tensor  # (T, H)

    def gate_up_factors(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return self.grad_gate_up[rows], self.tokens.index_select(0, self.token[rows])

    def down_factors(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return self.grad_output.index_select(0, self.token[rows]), self.inner[rows]


class ExpertWeights:
    """The expert weights of one layer in one forward pass, and what its calls leave for their gradients.

    `anchor` is an empty tensor that depends on the weights. Every call takes it, so that autograd reaches the weights
    once, after the backward of all calls.
    """

    def __init__(self, gate_up_proj: torch.Tensor, down_proj: torch.Tensor):
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj
        self.parts: list[_GradientPart] = []
        self.backward_pass: int | None = None
        self.anchor = _WeightGradients.apply(gate_up_proj, down_proj, self) if torch.is_grad_enabled() else None

    def add(self, part: _GradientPart) -> None:
        # A pass that ended before it reached the weights (for the gradient of an activation, say) left its parts.
        backward_pass = torch._C._current_graph_task_id()
        if backward_pass != self.backward_pass:
            self.parts.clear()
            self.backward_pass = backward_pass
        self.parts.append(part)


class _WeightGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, weights: ExpertWeights
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.weights = weights
        return gate_up_proj.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, _: None) -> tuple[torch.Tensor | None, ...]:
        weights, grad_gate_up_proj, grad_down_proj = ctx.weights, None, None
        if weights.backward_pass == torch._C._current_graph_task_id():
            if ctx.needs_input_grad[0]:
                grad_gate_up_proj = _weight_gradient(
                    weights.gate_up_proj, weights.parts, _GradientPart.gate_up_factors
                )
            if ctx.needs_input_grad[1]:
                grad_down_proj = _weight_gradient(weights.down_proj, weights.parts, _GradientPart.down_factors)
        weights.parts.clear()
        return grad_gate_up_proj, grad_down_proj, None


def _weight_gradient(
    weight: torch.Tensor,
    parts: list[_GradientPart],
    factors: Callable[[_GradientPart, slice], tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Sum of the outer products of output gradient and input over all rows of all calls, (N, out, in)."""
    grad = _empty_in_huge_pages(weight.shape, weight.dtype)
    for expert in range(len(weight)):
        pairs = [factors(part, part.segments[expert]) for part in parts if expert in part.segments]
        if pairs:
            grad_output, inputs = pairs[0] if len(pairs) == 1 else map(torch.cat, zip(*pairs, strict=True))
            _mm(grad_output.t(), inputs, out=grad[expert])
        else:
            grad[expert].zero_()
    return grad


def _empty_in_huge_pages(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """`torch.empty`, in pages of 2 MiB where the system has them.

    Weight gradients are fresh memory in every training step, and touching it for the first time in pages of 4 KiB
    costs nearly as much as computing what goes in.
    """
    num_elements = math.prod(shape)
    num_bytes = num_elements * dtype.itemsize
    if num_bytes < 2 * _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return torch.empty(shape, dtype=dtype)
    address = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
    return torch.frombuffer(memory, dtype=dtype, count=num_elements, offset=-address % _HUGE_PAGE).view(shape)


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
