# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Weights of 8 and of 4 bits, as torchao's tensors hold them, and products of rows with them on the CPU.

torchao widens a whole weight whenever it is used on the CPU, or has no kernel there. Here rows are multiplied by the
numbers as they are stored, or by one widened matrix at a time: `cpu_kernels.py` chooses. A weight of 4 bits is kept in
the order that torch's kernel reads, see [`PackedInt4Tensor`], and saved in torchao's.

Shapes: N matrices, out and in their features, R rows.
"""

import copy
import functools
from collections.abc import Sequence

import torch
from torch.nn import functional as F


try:
    from torchao.quantization import Int4Tensor, Int8Tensor
    from torchao.utils import TorchAOBaseTensor
except ImportError:  # then no weight is an instance of these

    class TorchAOBaseTensor(torch.Tensor):
        pass

    class Int4Tensor(TorchAOBaseTensor):
        pass

    class Int8Tensor(TorchAOBaseTensor):
        pass


GROUP_SIZE = 32  # weights of 4 bits that share a scale and a zero
ALIGNMENT = 32  # bytes: the kernel for 8 bits may load whole vectors
PACKED, BFLOAT16_MM = "packed", "bfloat16_mm"  # kernels, see `cpu_kernels.py`


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether a weight is one of torchao's tensors."""
    return isinstance(weight, TorchAOBaseTensor)


def dtype_of_products(inputs: torch.Tensor) -> torch.dtype:
    """What rows on the CPU are multiplied in: their dtype, or autocast's where that is enabled."""
    if torch.is_autocast_enabled("cpu") and inputs.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return inputs.dtype


class QuantizedMatrices:
    """N quantised matrices (out, in), or a single one, or their transposes, which multiply rows of one dtype.

    Args:
        data (`torch.Tensor`): (N, out, in) int8, or (N, out, in / 2) uint8. Without N it is a single matrix.
        scale (`torch.Tensor`): (N, out) float32, or (N, in / group, out, 2) bfloat16: scales and zeros.
        dtype (`torch.dtype`): Of rows and products.
        is_packed (`bool`): 4 bits in the order of torch's kernel, and not two neighbours in a byte.
    """

    def __init__(self, data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, is_packed: bool = False):
        self.data, self.scale, self.dtype, self.is_packed = data, scale, dtype, is_packed
        self.is_transposed = False
        self.bits = 8 if data.dtype == torch.int8 else 4
        *leading, out_features, in_features = data.shape
        self.shape = (leading[0] if leading else 1, out_features, in_features * (1 if self.bits == 8 else 2))
        # Views are made once, since making one costs as much as adding up a row.
        self.matrices = list(zip(data.unbind(), scale.unbind(), strict=True)) if leading else [(data, scale)]
        self.is_readable = is_packed if self.bits == 4 else data.data_ptr() % ALIGNMENT == 0

    @classmethod
    def of(cls, weight: torch.Tensor, dtype: torch.dtype) -> "QuantizedMatrices | None":
        """The matrices of a weight (N, out, in) or (out, in), which keeps them, or `None` where it is not one of
        torchao's tensors that are known here."""
        known = weight.__dict__.get("coe_matrices")
        if known is None or known.dtype != dtype:
            known = weight.coe_matrices = cls._read(weight, dtype)
        return known

    @classmethod
    def _read(cls, weight: torch.Tensor, dtype: torch.dtype) -> "QuantizedMatrices | None":
        if isinstance(weight, PackedInt4Tensor):
            return cls(weight.qdata, weight.scale_and_zero, dtype, is_packed=True)
        if isinstance(weight, Int4Tensor) and weight.act_pre_scale is None:
            return cls(weight.qdata, torch.stack((weight.scale, weight.zero_point), dim=-1), dtype)
        if isinstance(weight, Int8Tensor):
            has_row_scales = weight.scale.shape == (*weight.qdata.shape[:-1], 1)
            if has_row_scales and weight.act_quant_kwargs is None and weight.act_pre_scale is None:
                return cls(weight.qdata, weight.scale.squeeze(-1), dtype)
        return None

    @property
    def itemsize(self) -> int:
        """Bytes of an element of a row."""
        return self.dtype.itemsize

    @functools.cached_property
    def mT(self) -> "QuantizedMatrices":
        """The transposed matrices."""
        other = copy.copy(self)
        num_matrices, height, width = self.shape
        other.shape, other.is_transposed, other.mT = (num_matrices, width, height), not self.is_transposed, self
        return other

    def __getitem__(self, matrices: slice) -> "QuantizedMatrices":
        if matrices == slice(0, len(self.matrices)):
            return self
        other = copy.copy(self)
        other.__dict__.pop("mT", None)
        other.matrices = self.matrices[matrices]
        other.shape = (len(other.matrices), *self.shape[1:])
        other.data, other.scale = self.data[matrices], self.scale[matrices]
        return other

    def multiply(self, rows: torch.Tensor, matrices: list[int], sizes: list[int], kernel: str) -> torch.Tensor:
        """Rows times some of the matrices.

        Args:
            rows (`torch.Tensor`): (R, in) where the matrices are transposed, (R, out) where they are not.
            matrices (`list[int]`): Which of the matrices.
            sizes (`list[int]`): How many rows each of these multiplies, R in all.
            kernel (`str`): Of `cpu_kernels.py`. `mm` replaces what cannot multiply.

        Returns:
            `torch.Tensor`: (R, out) or (R, in).
        """
        if kernel == PACKED and self.is_transposed and self.is_readable and matrices:
            return self._multiply_packed(rows, matrices, sizes)
        dtype = torch.bfloat16 if kernel == BFLOAT16_MM else self.dtype
        output = rows.new_empty(rows.shape[0], self.shape[2])
        for index, part, out in zip(matrices, rows.split(sizes), output.split(sizes), strict=True):
            data, scale = self.matrices[index]
            if self.bits == 4:
                matrix = widen_int4(data, scale, self.is_packed, dtype)  # (in, out)
                out.copy_(part.to(dtype) @ (matrix if self.is_transposed else matrix.t()))
            elif self.is_transposed:
                torch.mul(part.to(dtype) @ data.to(dtype).t(), scale, out=out)
            else:
                out.copy_((part * scale).to(dtype) @ data.to(dtype))
        return output

    def _multiply_packed(self, rows: torch.Tensor, matrices: list[int], sizes: list[int]) -> torch.Tensor:
        rows = rows.to(torch.bfloat16).contiguous()
        if rows.data_ptr() % ALIGNMENT:
            rows = rows.clone()
        parts = _split(rows, sizes)
        if self.bits == 8:
            ones, product = _ones(self.shape[2]), torch._weight_int8pack_mm
            products = [product(part, self.matrices[i][0], ones) for part, i in zip(parts, matrices, strict=True)]
            if len(matrices) == 1:
                scale = self.matrices[matrices[0]][1]
            else:
                matrix_of_row = [index for index, size in zip(matrices, sizes, strict=True) for _ in range(size)]
                scale = self.scale[torch.tensor(matrix_of_row)]
            return (_join(products) * scale).to(self.dtype)  # here, where scales need no rounding
        group_size, product = self.shape[1] // self.scale.shape[-3], torch.ops.aten._weight_int4pack_mm_for_cpu
        products = []
        for part, index in zip(parts, matrices, strict=True):
            data, scale = self.matrices[index]
            products.append(product(part, data, group_size, scale))
        return _join(products).to(self.dtype)


def _split(rows: torch.Tensor, sizes: list[int]) -> Sequence[torch.Tensor]:
    return rows.split(sizes) if len(sizes) > 1 else (rows,)


def _join(products: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(products) if len(products) > 1 else products[0]


def packed_obstacle(bits: int, in_features: int, out_features: int) -> str | None:
    """Why rows cannot be multiplied by matrices (out, in) as they are stored, or `None`."""
    if bits == 8:
        if not hasattr(torch, "_weight_int8pack_mm"):
            return f"torch {torch.__version__} has no `torch._weight_int8pack_mm`"
        return None if in_features % 16 == 0 else "rows of 8-bit weights need a multiple of 16 features"
    names = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
    if not all(hasattr(torch.ops.aten, name) for name in names):
        return f"torch {torch.__version__} has no `torch.ops.aten.{names[1]}`"
    if out_features % 16 or in_features % GROUP_SIZE:
        return f"4-bit weights need outputs in sixteens and inputs in groups of {GROUP_SIZE}"
    return None


def can_pack(weight: torch.Tensor) -> bool:
    """Whether torch's kernel can multiply with an `Int4Tensor`."""
    *_, out_features, in_features = weight.shape
    return weight.scale.dtype == torch.bfloat16 and packed_obstacle(4, in_features, out_features) is None


@functools.lru_cache(64)
def _ones(size: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.ones(size, dtype=torch.bfloat16)


# ---- 4 bits ---------------------------------------------------------------------------------------------------------


class PackedInt4Tensor(TorchAOBaseTensor):
    """A weight (out, in) or (N, out, in) of 4 bits on the CPU, in the order that torch's kernel reads.

    The order depends on the processor, so it is made when a model is loaded and undone when it is saved: [`pack`] and
    [`unpack`] go from torchao's `Int4Tensor` and back, bit for bit.

    Args:
        qdata (`torch.Tensor`): (..., out, in / 2) uint8.
        scale_and_zero (`torch.Tensor`): (..., in / group, out, 2) bfloat16. A weight is `scale * q + zero` with q from
            -8 to 7.
    """

    tensor_data_names = ["qdata", "scale_and_zero"]
    tensor_attribute_names: list[str] = []

    def __new__(cls, qdata: torch.Tensor, scale_and_zero: torch.Tensor):
        shape = (*qdata.shape[:-1], 2 * qdata.shape[-1])
        options = {"device": qdata.device, "dtype": scale_and_zero.dtype, "requires_grad": False}
        return torch.Tensor._make_wrapper_subclass(cls, shape, **options)

    def __init__(self, qdata: torch.Tensor, scale_and_zero: torch.Tensor):
        super().__init__()
        self.qdata, self.scale_and_zero = qdata, scale_and_zero

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        # One expert's weight, and products with it: what `experts_implementation="eager"` needs.
        if func is torch.Tensor.__getitem__ and isinstance(args[1], int):
            return cls(args[0].qdata[args[1]], args[0].scale_and_zero[args[1]])
        if func is F.linear:
            inputs, weight, *bias = args
            return F.linear(inputs, weight.dequantize(inputs.dtype), *bias, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def pack(cls, weight: torch.Tensor) -> "PackedInt4Tensor":
        """From an `Int4Tensor` on the CPU that [`can_pack`] says yes to."""
        packed = torch.empty_like(weight.qdata)
        for plain, target in zip(_by_matrix(weight.qdata), _by_matrix(packed), strict=True):
            target.copy_(_in_order_of_kernel(_signed_neighbours(plain) + 8))
        return cls(packed, torch.stack((weight.scale, weight.zero_point), dim=-1))

    def unpack(self) -> torch.Tensor:
        """The `Int4Tensor` of the same weight."""
        plain = torch.empty_like(self.qdata)
        for packed, target in zip(_by_matrix(self.qdata), _by_matrix(plain), strict=True):
            target.copy_(_as_neighbours(_signed_in_order(packed).t()))
        scale, zero = (tensor.contiguous() for tensor in self.scale_and_zero.unbind(-1))
        group_size = self.shape[-1] // scale.shape[-2]
        return Int4Tensor(plain, scale, zero, [*(1 for _ in self.shape[:-1]), group_size], self.shape)

    def dequantize(self, output_dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight in a dtype, float32 by default."""
        dtype = output_dtype or torch.float32
        scales = self.scale_and_zero.view(-1, *self.scale_and_zero.shape[-3:])
        matrices = [
            widen_int4(data, scale, True, dtype).t()
            for data, scale in zip(_by_matrix(self.qdata), scales, strict=True)
        ]
        return torch.stack(matrices).view(self.shape)


def quantize_int4(weight: torch.Tensor) -> torch.Tensor:
    """torchao's `Int4Tensor` of a weight (..., out, in), whose groups of `GROUP_SIZE` inputs have a scale and a zero
    each, in bfloat16. torchao's own function needs a library for GPUs."""
    groups = weight.detach().float().unflatten(-1, (-1, GROUP_SIZE))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    # Rounded before they are used, so that what is stored is what the weights are nearest to.
    scale = ((high - low) / 15).clamp(min=1e-6).to(torch.bfloat16)
    zero = (low + 8 * scale.float()).to(torch.bfloat16)
    q = ((groups - zero.float()) / scale.float()).round().clamp(-8, 7).to(torch.int8).flatten(-2)
    scale, zero = (tensor.squeeze(-1).transpose(-1, -2).contiguous() for tensor in (scale, zero))
    return Int4Tensor(_as_neighbours(q), scale, zero, [*(1 for _ in q.shape[:-1]), GROUP_SIZE], q.shape)


def widen_int4(data: torch.Tensor, scale_and_zero: torch.Tensor, is_packed: bool, dtype: torch.dtype) -> torch.Tensor:
    """A matrix (in, out), the transpose of what `data` (out, in / 2) uint8 and `scale_and_zero` (in / group, out, 2)
    stand for."""
    q = _signed_in_order(data) if is_packed else _signed_neighbours(data).t()
    scale, zero = scale_and_zero.to(dtype).unsqueeze(1).unbind(-1)  # (in / group, 1, out)
    groups = q.to(dtype, memory_format=torch.contiguous_format).unflatten(0, (len(scale), -1))
    return groups.mul_(scale.contiguous()).add_(zero.contiguous()).flatten(0, 1)


def _by_matrix(data: torch.Tensor) -> torch.Tensor:
    return data.view(-1, *data.shape[-2:])


def _signed_neighbours(data: torch.Tensor) -> torch.Tensor:
    """(..., in) int8, from -8 to 7, of two's complements in `data` (..., in / 2): even inputs in the lower half."""
    return torch.stack(((data << 4).view(torch.int8) >> 4, data.view(torch.int8) >> 4), dim=-1).flatten(-2)


def _as_neighbours(q: torch.Tensor) -> torch.Tensor:
    """The inverse of [`_signed_neighbours`]."""
    even, odd = q.contiguous().view(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return (even & 15) | (odd << 4)


def _in_order_of_kernel(q: torch.Tensor) -> torch.Tensor:
    """(out, in / 2) uint8 of numbers (out, in) from 0 to 15."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1)


def _signed_in_order(packed: torch.Tensor) -> torch.Tensor:
    """(in, out) int8, from -8 to 7, of a matrix (out, in / 2) in the order of the kernel."""
    out_features, in_features = packed.shape[0], 2 * packed.shape[1]
    block = _block_size(out_features, in_features)
    if block is None:
        halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten()
        q = halves[_places(out_features, in_features)].view(in_features, out_features)
    else:
        blocks = packed.view(-1, in_features, block // 2)
        q = torch.cat((blocks & 15, blocks >> 4), dim=-1).transpose(0, 1).reshape(in_features, out_features)
    return q.view(torch.int8).sub_(8)


@functools.lru_cache(64)
def _block_size(out_features: int, in_features: int) -> int | None:
    """How many outputs the kernel keeps together, input after input, the second half of them in the upper halves of
    bytes, or `None` where it has another order on this processor. Then [`_places`] finds every weight."""
    places = _places(out_features, in_features).view(in_features, out_features)
    for block in (64, 32):
        if out_features % block == 0:
            shape = (out_features // block, in_features, block // 2, 2)
            blocks = torch.arange(places.numel()).view(shape).permute(1, 0, 3, 2)
            if torch.equal(blocks.reshape(in_features, out_features), places):
                return block
    return None


@functools.lru_cache(8)
def _places(out_features: int, in_features: int) -> torch.Tensor:
    """(in * out,) int64: which half of a byte holds a weight of the transposed matrix, the lower half first. Found by
    packing the digits of each weight's number."""
    number = torch.arange(in_features * out_features).view(in_features, out_features).t()
    found, shift = torch.zeros(number.numel(), dtype=torch.int64), 0
    while number.numel() >> shift:
        packed = _in_order_of_kernel((number >> shift) & 15)
        found += torch.stack((packed & 15, packed >> 4), dim=-1).flatten().to(torch.int64) << shift
        shift += 4
    return found.argsort()
