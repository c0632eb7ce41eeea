# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Grouped expert computation on the CPU, built for a chain that calls the same experts C times.

Rows (one for each token and chosen expert) are sorted by expert, and every expert multiplies its rows in one go,
straight from the stored weights, by the kernel that `cpu_kernels.py` chooses. What the C calls of a layer share is
[`ExpertWeights`]: their weight gradients are computed together, after the backward of all of them, so that a chain
holds one gradient per weight where separate calls would hold, and add up, C of them. Low-rank adapters multiply
the rows too (`W x + b (a x)`, see [`Projection`]), so that adapted weights and their gradients are never made.

Shapes: T tokens, H hidden, N experts, K chosen per token, I expert width, R rows, r rank of an adapter.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from transformers.utils.generic import maybe_autocast

from .cpu_memory import LARGE_BYTES, empty
from .quantized_weights import QuantizedMatrices


_CACHED_BYTES = 2**21  # what a core's caches hold on most processors


def compute_experts(
    tokens: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weights: "ExpertWeights",
    act_fn: Callable,
) -> torch.Tensor:
    """Weighted sum of each token's experts.

    Args:
        tokens (`torch.Tensor`): (T, H), in the dtype of the expert weights.
        top_k_index (`torch.Tensor`): (T, K) experts; ids of N and more are computed by another rank.
        top_k_weights (`torch.Tensor`): (T, K) routing weights.
        weights (`ExpertWeights`): Of the layer, shared by the calls of a chain.
        act_fn (`Callable`): Activation of the gate.

    Returns:
        `torch.Tensor`: (T, H), float32 or the wider dtype of the routing weights.
    """
    if torch.is_grad_enabled():
        factors = *weights.gate_up[1:], *weights.down[1:]
        return _GroupedExperts.apply(tokens, top_k_weights, weights.anchor, *factors, top_k_index, weights, act_fn)
    compute = _one_token if len(tokens) == 1 else _without_gradient
    if not weights.are_adapted and not weights.are_quantized and _are_all(top_k_index, weights.num_experts):
        compute = _all_experts
    return compute(tokens, top_k_index, top_k_weights, weights, act_fn)


class Rows(NamedTuple):
    """The rows, sorted by expert: one for each token and expert chosen for it."""

    choice: torch.Tensor  # (R,) which of the T * K choices a row is
    token: torch.Tensor  # (R,) whose
    slot: torch.Tensor  # (T, K) the row of a choice; R where another rank computes it
    counts: torch.Tensor  # (N,) rows of each expert

    @classmethod
    def sort(cls, top_k_index: torch.Tensor, num_experts: int) -> "Rows":
        sorted_index, choice = top_k_index.reshape(-1).sort(stable=True)
        counts = torch.bincount(sorted_index, minlength=num_experts)
        slot = torch.empty_like(choice)
        if len(counts) > num_experts:  # another rank's, sorted to the end
            counts = counts[:num_experts]
            num_rows = int(counts.sum())
            slot.fill_(num_rows)
            choice = choice[:num_rows]
        slot[choice] = torch.arange(len(choice), device=choice.device)
        return cls(choice, choice // top_k_index.shape[1], slot.view_as(top_k_index), counts)

    @property
    def load(self) -> float:
        """Rows per expert, of the shape and not of the routing."""
        return self.slot.numel() / self.counts.shape[0]

    def blocks(self, gate_up_proj: torch.Tensor) -> Iterator[tuple[slice, slice]]:
        """Ranges of experts, and of their rows, so few that what lies between two products stays in the cache."""
        return _blocks(self.counts, gate_up_proj.shape[1] * gate_up_proj.itemsize)


def grouped_product(*args) -> torch.Tensor:
    """[`cpu_kernels.grouped_product`]."""
    return _kernels()[0](*args)


def grouped_outer_product(*args) -> torch.Tensor:
    """[`cpu_kernels.grouped_outer_product`]."""
    return _kernels()[1](*args)


def add_grouped_product(*args) -> None:
    """[`cpu_kernels.add_grouped_product`]."""
    _kernels()[2](*args)


def multiply_quantized(*args) -> torch.Tensor:
    """[`cpu_kernels.multiply_quantized`]."""
    return _kernels()[3](*args)


class Projection(NamedTuple):
    """The matrices of one projection: `weight + b @ a` for each expert, or `weight` where no adapter is active.

    The sum is never made: rows are multiplied by what it is made of.
    """

    weight: torch.Tensor | QuantizedMatrices  # (N, out, in)
    a: torch.Tensor | None = None  # (N, r, in), contiguous, an adapter's scaling in it
    b: torch.Tensor | None = None  # (N, out, r), contiguous where gradients are wanted

    @property
    def mT(self) -> "Projection":
        """The transposed matrices."""
        if self.a is None:
            return Projection(self.weight.mT)
        return Projection(self.weight.mT, self.b.mT, self.a.mT)

    def to(self, dtype: torch.dtype) -> "Projection":
        """The matrices in another dtype."""
        return Projection(*(None if factor is None else factor.to(dtype) for factor in self))

    def pad(self, out_features: int, in_features: int, parts: int = 1) -> "Projection":
        """The matrices with more rows, at the end of each of `parts` equal ones, and columns, all of them zeros."""
        weight, a, b = self

        def pad_rows(matrices: torch.Tensor, columns: int) -> torch.Tensor:
            padded = F.pad(matrices.unflatten(1, (parts, -1)), (0, columns, 0, out_features))
            return padded.flatten(1, 2)

        if a is None:
            return Projection(pad_rows(weight, in_features))
        return Projection(pad_rows(weight, in_features), F.pad(a, (0, in_features)), pad_rows(b, 0))

    def of(self, experts: slice) -> "Projection":
        """The matrices of a range of experts."""
        if self.a is None:
            return Projection(self.weight[experts])
        return Projection(self.weight[experts], self.a[experts], self.b[experts])

    def multiply(
        self, inputs: torch.Tensor, counts: torch.Tensor, load: float, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows (R, in) times the matrices of their experts, (R, out), written to `out` if that is given."""
        output = grouped_product(inputs, self.weight.mT, counts, load, out)
        if self.a is not None:
            reduced = grouped_product(inputs, self.a.mT, counts, load)
            add_grouped_product(output, reduced, self.b.mT, counts)
        return output

    def multiply_each(self, rows: torch.Tensor, experts: list[int]) -> torch.Tensor:
        """Rows (R, in) times the matrices of R experts, (R, out): reads these, and nothing else."""
        if isinstance(self.weight, QuantizedMatrices):
            return multiply_quantized(rows, self.weight.mT, experts, [1] * len(experts), 1)
        output = rows.new_empty(len(experts), self.weight.shape[1])
        for expert, row, out in zip(experts, rows.unbind(), output.unbind(), strict=True):
            out.addmv_(self.weight[expert], row, beta=0)  # what is multiplied by `beta=0` is not read
            if self.a is not None:
                reduced = row.new_empty(self.a.shape[1]).addmv_(self.a[expert], row, beta=0)
                out.addmv_(self.b[expert], reduced)
        return output

    def adapter_gradient(
        self, inputs: torch.Tensor, grad_outputs: torch.Tensor, counts: torch.Tensor, load: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of `a` and `b` from those of the rows that [`multiply`] returned; zeros for an expert without."""
        grad_reduced = grouped_product(grad_outputs, self.b, counts, load)
        reduced = grouped_product(inputs, self.a.mT, counts, load)
        return (
            grouped_outer_product(grad_reduced, inputs, counts, load),
            grouped_outer_product(grad_outputs, reduced, counts, load),
        )


@functools.cache
def _kernels() -> tuple[Callable, ...]:
    # Imported by the first call, so that `python -m modeling_coe.cpu_kernels` runs a module not imported before.
    from .cpu_kernels import add_grouped_product, grouped_outer_product, grouped_product, multiply_quantized

    return grouped_product, grouped_outer_product, add_grouped_product, multiply_quantized


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
    """Weighted sum (T, H) of each token's experts. The weights' gradients are left to [`ExpertWeights`].

    `anchor` and the factors of adapters are those of `weights`, taken so that autograd asks for their gradients.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        tokens: torch.Tensor,
        top_k_weights: torch.Tensor,
        anchor: torch.Tensor | None,
        gate_up_a: torch.Tensor | None,
        gate_up_b: torch.Tensor | None,
        down_a: torch.Tensor | None,
        down_b: torch.Tensor | None,
        top_k_index: torch.Tensor,
        weights: "ExpertWeights",
        act_fn: Callable,
    ) -> torch.Tensor:
        rows = Rows.sort(top_k_index, weights.num_experts)
        blocks, outputs = _mlp(tokens, rows, weights, act_fn)
        if any(ctx.needs_input_grad):
            ctx.quantized = (weights.gate_up, weights.down) if weights.are_quantized else None
            factors = (None,) * 6 if weights.are_quantized else (*weights.gate_up, *weights.down)
            ctx.save_for_backward(tokens, top_k_weights, *factors, *rows, *blocks)
            ctx.gradients, ctx.act_fn = weights.gradients, act_fn
        return sum_rows(outputs, rows.slot, top_k_weights)

    @staticmethod
    @_first_order
    def backward(ctx: FunctionCtx, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens, top_k_weights, *saved = ctx.saved_tensors
        gate_up_proj, down_proj = ctx.quantized or (Projection(*saved[:3]), Projection(*saved[3:6]))
        rows, blocks = Rows(*saved[6 : 6 + len(Rows._fields)]), saved[6 + len(Rows._fields) :]
        is_gate_up_adapter_trained = any(ctx.needs_input_grad[3:5])
        is_down_adapter_trained = any(ctx.needs_input_grad[5:7])
        grad_gate_up_factors, grad_down_factors = [], []  # of `a` and `b`, of each block

        grad_output = grad_output.to(tokens.dtype)
        row_weights = top_k_weights.reshape(-1, 1)[rows.choice]  # (R, 1)
        grad_row_weights = torch.empty_like(row_weights)
        num_rows = len(row_weights)
        grad_gate_up = tokens.new_empty(num_rows, gate_up_proj.weight.shape[1])  # (R, 2I)
        inner = tokens.new_empty(num_rows, down_proj.weight.shape[2])  # (R, I), input of the down projection
        for (experts, block), gate_up in zip(rows.blocks(gate_up_proj.weight), blocks, strict=True):
            counts = rows.counts[experts]
            gate, up = gate_up.chunk(2, dim=-1)
            with torch.enable_grad():
                gate = gate.detach().contiguous().requires_grad_()
                act = ctx.act_fn(gate)
            torch.mul(act.detach(), up, out=inner[block])

            # With w the weight of a row, its share of the output is w * down(inner).
            inputs = grad_output.index_select(0, rows.token[block])  # (rows, H)
            down = down_proj.of(experts)
            grad_inner = down.mT.multiply(inputs, counts, rows.load)
            if ctx.needs_input_grad[1]:
                factors = (tensor.to(row_weights.dtype) for tensor in (grad_inner, inner[block]))
                grad_row_weights[block, 0] = torch.linalg.vecdot(*factors)
            block_weights = row_weights[block].to(inner.dtype)
            grad_inner.mul_(block_weights)
            inner[block].mul_(block_weights)
            if is_down_adapter_trained:
                grad_down_factors.append(down.adapter_gradient(inner[block], inputs, counts, rows.load))

            grad_gate, grad_up = grad_gate_up[block].chunk(2, dim=-1)
            torch.mul(grad_inner, act.detach(), out=grad_up)
            grad_gate.copy_(torch.autograd.grad(act, gate, grad_inner.mul_(up))[0])
            if is_gate_up_adapter_trained:
                inputs = tokens.index_select(0, rows.token[block])
                grad_gate_up_factors.append(
                    gate_up_proj.of(experts).adapter_gradient(inputs, grad_gate_up[block], counts, rows.load)
                )
        if ctx.needs_input_grad[2]:
            ctx.gradients.add(gate_up=_Factors(rows, grad_gate_up, tokens), down=_Factors(rows, inner, grad_output))
        grad_tokens = grad_top_k_weights = None
        if ctx.needs_input_grad[0]:
            grad_rows = tokens.new_empty(num_rows, tokens.shape[1])  # (R, H)
            gate_up_proj.mT.multiply(grad_gate_up, rows.counts, rows.load, out=grad_rows)
            grad_tokens = sum_rows(grad_rows, rows.slot).to(tokens.dtype)
        if ctx.needs_input_grad[1]:
            grad_top_k_weights = torch.zeros_like(top_k_weights, memory_format=torch.contiguous_format)
            grad_top_k_weights.view(-1)[rows.choice] = grad_row_weights[:, 0]
        grad_factors = *_join(grad_gate_up_factors), *_join(grad_down_factors)
        return grad_tokens, grad_top_k_weights, None, *grad_factors, None, None, None


def _join(
    blocks: list[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """The gradients of both factors of an adapter from those of each block's experts, if there are any."""
    if not blocks:
        return None, None
    grad_a, grad_b = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*blocks, strict=True))
    return grad_a, grad_b


def _mlp(
    tokens: torch.Tensor, rows: Rows, weights: "ExpertWeights", act_fn: Callable
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Gate and up (rows, 2I) of each block, and the output (R, H) of each row's expert."""
    blocks, gate_up = list(rows.blocks(weights.gate_up.weight)), []
    outputs = tokens.new_empty(len(rows.token), tokens.shape[1]) if len(blocks) > 1 else None
    for experts, block in blocks:
        inputs, counts = tokens.index_select(0, rows.token[block]), rows.counts[experts]
        gate_up.append(weights.gate_up.of(experts).multiply(inputs, counts, rows.load))
        gate, up = gate_up[-1].chunk(2, dim=-1)
        # Rows with gaps between them would cost an activation more than this copy.
        inner = act_fn(gate.contiguous()) * up
        out = None if outputs is None else outputs[block]
        output = weights.down.of(experts).multiply(inner, counts, rows.load, out)
    return gate_up, output if outputs is None else outputs


def _without_gradient(
    tokens: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weights: "ExpertWeights",
    act_fn: Callable,
) -> torch.Tensor:
    rows = Rows.sort(top_k_index, weights.num_experts)
    return sum_rows(_mlp(tokens, rows, weights, act_fn)[1], rows.slot, top_k_weights)


def sum_rows(values: torch.Tensor, slot: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Sums the rows (R, H) of each token's choices, `slot` (T, K), with their `weights` (T, K): (T, H), in float32 or
    the wider dtype of the two."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    if weights is not None:
        dtype = torch.promote_types(dtype, weights.dtype)
        weights = weights.to(dtype)
    values = values.to(dtype)
    if slot.numel() > len(values):  # choices that another rank computes
        if weights is not None:
            weights = weights.masked_fill(slot == len(values), 0)
        values = torch.cat((values, values.new_zeros(1, values.shape[1])))
    return F.embedding_bag(slot, values, mode="sum", per_sample_weights=weights)


def _one_token(
    token: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weights: "ExpertWeights",
    act_fn: Callable,
) -> torch.Tensor:
    """A single token (1, H) without gradient: reads the weights of its experts once, and nothing else."""
    experts = top_k_index[0].tolist()
    if max(experts) >= weights.num_experts:
        here = [slot for slot, expert in enumerate(experts) if expert < weights.num_experts]
        experts, top_k_weights = [experts[slot] for slot in here], top_k_weights[:, here]
    if not experts:
        return top_k_weights.new_zeros(token.shape)
    gate, up = weights.gate_up.multiply_each(token.expand(len(experts), -1), experts).chunk(2, dim=-1)
    outputs = weights.down.multiply_each(act_fn(gate) * up, experts)
    return (outputs * top_k_weights.mT).sum(dim=0, keepdim=True)


def _are_all(top_k_index: torch.Tensor, num_experts: int) -> bool:
    """Whether every token uses each of the experts once, and no other rank's."""
    if top_k_index.shape[1] != num_experts or len(top_k_index) == 0:
        return False
    experts = torch.arange(num_experts, device=top_k_index.device)
    return torch.equal(top_k_index.sort(dim=-1).values, experts.expand_as(top_k_index))


def _all_experts(
    tokens: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weights: "ExpertWeights",
    act_fn: Callable,
) -> torch.Tensor:
    """Tokens that use every expert, without gradient: all matrices are multiplied as one, and no rows are gathered."""
    gate_up_proj, down_proj = weights.gate_up.weight, weights.down.weight
    with maybe_autocast("cpu", enabled=False):
        matrix = gate_up_proj.flatten(0, 1)  # (2NI, H)
        gate_up = torch.mv(matrix, tokens[0]) if len(tokens) == 1 else F.linear(tokens, matrix)
        gate, up = gate_up.view(len(tokens), len(gate_up_proj), -1).chunk(2, dim=-1)  # (T, N, I) each
        outputs = torch.bmm((act_fn(gate) * up).transpose(0, 1), down_proj.mT)  # (N, T, H)
        dtype = torch.promote_types(torch.promote_types(outputs.dtype, torch.float32), top_k_weights.dtype)
        by_expert = torch.empty_like(top_k_weights).scatter_(1, top_k_index, top_k_weights)
        return torch.bmm(by_expert.to(dtype).unsqueeze(1), outputs.to(dtype).transpose(0, 1)).squeeze(1)


class _Factors(NamedTuple):
    """What one call leaves for the gradient of a weight: the two sides of an outer product for each of its rows."""

    rows: Rows
    by_row: torch.Tensor  # (R, width)
    by_token: torch.Tensor  # (T, width)

    def block(self, experts: slice) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Both sides for a range of experts, (rows, width) each, and how many rows each expert has."""
        counts = self.rows.counts.tolist()
        start, sizes = sum(counts[: experts.start]), counts[experts]
        block = slice(start, start + sum(sizes))
        return self.by_row[block], self.by_token.index_select(0, self.rows.token[block]), sizes


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
    once, after the backward of all calls. The gradients of adapters, which are small, come from each call.
    """

    def __init__(self, gate_up: Projection, down: Projection):
        self.gate_up, self.down = gate_up, down
        self.gradients = _PendingGradients()
        self.anchor = None
        if torch.is_grad_enabled() and not self.are_quantized:
            self.anchor = _WeightGradients.apply(gate_up.weight, down.weight, self.gradients)

    @property
    def num_experts(self) -> int:
        return self.gate_up.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.gate_up.weight.dtype

    @property
    def are_adapted(self) -> bool:
        return self.gate_up.a is not None or self.down.a is not None

    @property
    def are_quantized(self) -> bool:
        return isinstance(self.gate_up.weight, QuantizedMatrices)


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
                grad_gate_up_proj = _weight_gradient(gradients.gate_up, ctx.like[0], rows_first=True)
            gradients.gate_up.clear()  # frees them before the other gradient takes memory
            if ctx.needs_input_grad[1]:
                grad_down_proj = _weight_gradient(gradients.down, ctx.like[1], rows_first=False)
        gradients.clear()
        return grad_gate_up_proj, grad_down_proj, None


def _weight_gradient(calls: list[_Factors], like: torch.Tensor, rows_first: bool) -> torch.Tensor:
    """Sum over the rows of all calls, by row times by token, or the other way round, for each expert.

    Args:
        calls (`list[_Factors]`): What the calls have left, one or more.
        like (`torch.Tensor`): Of the shape (N, by row, by token), or (N, by token, by row), and dtype of the result.
        rows_first (`bool`): Which of the two.
    """
    row_width, matrix_size = sum(like.shape[1:]), math.prod(like.shape[1:])
    load = sum(call.rows.load for call in calls)
    # To add a call's product to a matrix in the cache moves the matrix, to join the calls' rows moves these.
    groups = [calls] if load * row_width <= (len(calls) - 1) * matrix_size else [[call] for call in calls]

    def both_sides(group: list[_Factors], experts: slice) -> tuple[torch.Tensor, torch.Tensor]:
        *sides, sizes = zip(*(call.block(experts) for call in group), strict=True)
        by_row, by_token = (side[0] if len(side) == 1 else _interleave(side, sizes) for side in sides)
        return (by_row, by_token) if rows_first else (by_token, by_row)

    counts = sum(call.rows.counts for call in calls)
    row_bytes = row_width * like.itemsize
    if len(groups) == 1 and like.nbytes + load * len(counts) * row_bytes < LARGE_BYTES:
        return grouped_outer_product(*both_sides(calls, slice(0, len(counts))), counts, load)
    out = empty(*like.shape, dtype=like.dtype)
    for experts, _ in _blocks(counts, row_bytes):
        for index, group in enumerate(groups):
            counts_of_group = sum(call.rows.counts[experts] for call in group)
            sides, load_of_group = both_sides(group, experts), sum(call.rows.load for call in group)
            grouped_outer_product(*sides, counts_of_group, load_of_group, out[experts], index > 0)
    return out


def _interleave(parts: Sequence[torch.Tensor], sizes: Sequence[list[int]]) -> torch.Tensor:
    """The rows of all parts by expert: of each part those of expert 0, then those of expert 1."""
    split = [part.split(counts) for part, counts in zip(parts, sizes, strict=True)]
    return torch.cat([rows for expert in zip(*split, strict=True) for rows in expert])


def _blocks(counts: torch.Tensor, row_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of experts, and of their rows: as many rows as stay in the cache, or those of one expert."""
    sizes, first, start, end = counts.tolist(), 0, 0, 0
    if sum(sizes) * row_bytes <= _CACHED_BYTES:
        yield slice(0, len(sizes)), slice(0, sum(sizes))
        return
    for expert, count in enumerate(sizes):
        if count and end > start and (end + count - start) * row_bytes > _CACHED_BYTES:
            yield slice(first, expert), slice(start, end)
            first, start = expert, end
        end += count
    yield slice(first, len(sizes)), slice(start, end)
