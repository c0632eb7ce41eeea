# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Linear modules with quantised weights, which on the CPU are multiplied as `quantized_weights.py` says."""

import torch
from torch import nn
from torch.autograd.function import FunctionCtx

from .cpu_memory import empty
from .quantized_weights import (
    Int4Tensor,
    Int8Tensor,
    PackedInt4Tensor,
    QuantizedMatrices,
    can_pack,
    dtype_of_products,
    is_quantized,
)


class QuantizedLinear(nn.Linear):
    """`nn.Linear` with a weight of torchao's. What is multiplied here is without gradient for the weight, and neither
    compiled nor traced; the rest is left to torchao."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """
        Args:
            inputs (`torch.Tensor`): (..., in).

        Returns:
            `torch.Tensor`: (..., out) in the dtype of `inputs`, or autocast's.
        """
        if torch.compiler.is_compiling() and isinstance(self.weight, PackedInt4Tensor):
            return torch.compiler.disable(self._multiply, reason="the order of 4 bits is the processor's")(inputs)
        if inputs.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return super().forward(inputs)
        return self._multiply(inputs)

    def _multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        dtype = dtype_of_products(inputs)
        matrix = QuantizedMatrices.of(self.weight, dtype)
        if matrix is None:
            return super().forward(inputs)
        rows = inputs.reshape(-1, inputs.shape[-1]).to(dtype)
        if torch.is_grad_enabled() and rows.requires_grad:
            output = _Product.apply(rows, matrix)
        else:
            output = _multiply(rows, matrix.mT)
        if self.bias is not None:
            output = output + self.bias.to(dtype)
        return output.view(*inputs.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """Rows (R, in) times a quantised matrix, which is widened once more for the gradient instead of being kept."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: torch.Tensor, matrix: QuantizedMatrices) -> torch.Tensor:
        ctx.matrix = matrix
        return _multiply(rows, matrix.mT)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: FunctionCtx, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _multiply(grad_output, ctx.matrix), None


def _multiply(rows: torch.Tensor, matrix: QuantizedMatrices) -> torch.Tensor:
    # Imported by the first call, so that `python -m modeling_coe.cpu_kernels` runs a module not imported before.
    from .cpu_kernels import multiply_quantized

    num_rows = rows.shape[0]
    return multiply_quantized(rows, matrix, [0], [num_rows], num_rows)


def prepare_quantized(model: nn.Module) -> None:
    """Makes linear modules whose weight is quantised [`QuantizedLinear`]s, and brings weights on the CPU into the form
    that products read: those of 4 bits packed, those of 8 in huge pages, where reading one does not wait for the
    address of every 4 KiB. The model is saved as torchao has it.

    Raises:
        ValueError: Routed experts of 4 bits are not on the CPU.
    """
    int8_weights = []
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if not is_quantized(weight):
                continue
            if weight.device.type != "cpu":
                if isinstance(weight, Int4Tensor) and weight.dim() == 3:
                    raise ValueError(
                        f"Routed experts of 4 bits are multiplied on the CPU only; `{name}` is on {weight.device}. "
                        'Load the model with `device_map="cpu"`, or quantise it with `int8_weight_only`.'
                    )
                continue
            if isinstance(weight, Int8Tensor):
                int8_weights.append(weight)
            elif isinstance(weight, Int4Tensor) and can_pack(weight):
                module.register_parameter(name, nn.Parameter(PackedInt4Tensor.pack(weight), requires_grad=False))
        if type(module) is nn.Linear and is_quantized(module.weight):
            module.__class__ = QuantizedLinear
    _move_together(int8_weights)
    model.register_state_dict_post_hook(_unpack)


def _move_together(weights: list[torch.Tensor]) -> None:
    sizes = [-(-weight.qdata.numel() // 64) * 64 for weight in weights]  # whole cache lines
    memory = empty(sum(sizes), dtype=torch.int8)
    for weight, place in zip(weights, memory.split(sizes), strict=True):
        weight.qdata = place[: weight.qdata.numel()].view(weight.qdata.shape).copy_(weight.qdata)


def _unpack(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, local_metadata: dict) -> None:
    for name, tensor in state_dict.items():
        if isinstance(tensor, PackedInt4Tensor):
            state_dict[name] = tensor.unpack()
