# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Block-sparse experts on MegaBlocks' kernels: `experts_implementation="megablocks"` (arXiv 2211.15841).

No token is dropped and no expert has a capacity. In one call, with T tokens, K experts a token and N experts:

    1. sort the T * K rows by expert, and pad each expert's bin to whole blocks of 128 rows: R rows in all;
    2. gate and up together:  (R, H) x (N, 2I, H) -> (R, 2I), of which only the blocks on the experts' diagonal exist;
    3. the experts' own gated activation on (R, 2I) -> (R, I);
    4. down:  (R, I) x (N, H, I) -> (R, H), the same way;
    5. back to the tokens' order, times the routing weights, summed over K in fp32.

Steps 2 and 4 are one autograd function over stk's Triton kernels SDD and DSD. A stored weight (N, out, in), seen as a
matrix (N * out, in), is already the operand that they want, so weights are not copied; only widths that the kernels
cannot address (see `prepare_weight`) are padded with zeros. There are no atomics: two runs give the same bits.

The kernels come from the first of three sources that works here, see [`megablocks_backend`]; `python -m
modeling_coe.megablocks` tells which one and why not the others. The default experts use them too where torch has no
kernel of its own, see [`is_preferred`].

Environment variables:

- `COE_MEGABLOCKS_MIN_ROWS_PER_EXPERT` (default 64): see `MIN_ROWS_PER_EXPERT`.
- `LOCAL_KERNELS` (read by the `kernels` library): `kernels-community/megablocks=/path/of/a/build`, where there is no
  network.
- `TRITON_INTERPRET=1` (read by Triton when it is imported): runs the kernels on the CPU, for tests.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.integrations.moe import batched_mm_experts_forward
from transformers.utils import logging

from .experts import ALTERNATIVES, for_torchs_products, is_autocasting, torch_experts_forward
from .grouped_experts import Projection


logger = logging.get_logger(__name__)

BLOCK = 128  # rows and columns of a block, fixed by stk
BLOCK_K = 32  # depth of one step of stk's matrix products
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # what stk accumulates in fp32
# stk computes element offsets in 32 bits.
MAX_ELEMENTS = 2**31 - 1

# Below this many rows (T * K) per expert on average the call is handed over to transformers. Padding adds half a block
# an expert on average, so at 64 rows half of the rows are padding, and below it most are. It follows from the block
# size, not from a measurement; set it to what the machine shows, or to 0 for block-sparse products always.
MIN_ROWS_PER_EXPERT = int(os.environ.get("COE_MEGABLOCKS_MIN_ROWS_PER_EXPERT", "64"))

# Compute capabilities for which torch has a grouped kernel, of bfloat16; elsewhere its `grouped_mm` is a loop over
# experts, which waits for their counts of rows.
TORCH_GROUPED_MAJORS = (9, 10)
MIN_CAPABILITY = (8, 0)  # from here on Triton has matrix instructions for both halves
# Triton's float32 products without TF32 do not fit into registers: torch's loop is no worse.
PREFERRED_DTYPES = (torch.bfloat16, torch.float16)


def megablocks_experts_forward(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts function that `experts_implementation="megablocks"` selects.

    Too few rows to fill blocks go to transformers' `batched_mm` (no more rows than experts) or `grouped_mm` instead,
    see `MIN_ROWS_PER_EXPERT`. The conditions of the kernels are checked first, whatever the number of rows.

    Args:
        self (`torch.nn.Module`): gated experts without bias, weights (N, 2I, H) and (N, H, I), in bf16, fp16 or fp32.
        hidden_states (`torch.Tensor`): (T, H).
        top_k_index (`torch.Tensor`): (T, K) experts; ids of N and more are computed by another rank and add nothing.
        top_k_weights (`torch.Tensor`): (T, K) routing weights.

    Returns:
        `torch.Tensor`: (T, H) in the dtype of `hidden_states`. Computed in the weights' dtype, or autocast's where
        that is enabled; the sum over K is in fp32.

    Raises:
        ImportError: no source of kernels works here, or the tensors are on a device that Triton does not serve.
        ValueError: experts of another layout, or a dtype that the kernels do not compute in.
        RuntimeError: a matrix has more elements than the kernels' 32-bit offsets reach.
    """
    unsupported = {
        "transposed weights": self.is_transposed,
        "biases": self.has_bias,
        "no gate": not self.has_gate,
        "interleaved gate and up": not self.is_concatenated,
        "a norm after each expert": getattr(self, "has_post_expert_norm", False),  # transformers from 5.20 on
    }
    for layout, present in unsupported.items():
        if present:
            raise ValueError(f"`megablocks` does not support experts with {layout}. {ALTERNATIVES}")
    if (obstacle := _obstacle(hidden_states.device.type)) is not None:
        raise ImportError(f"`megablocks` cannot run: {obstacle} {ALTERNATIVES}")
    dtype = _dtype_of_products(next(self.parameters()))
    if dtype not in DTYPES:
        raise ValueError(f"`megablocks` computes in bfloat16, float16 or float32, not in {dtype}. {ALTERNATIVES}")

    num_rows = top_k_index.shape[0] * top_k_index.shape[1]
    if num_rows >= MIN_ROWS_PER_EXPERT * self.num_experts:
        return _block_sparse_experts(self, hidden_states, top_k_index, top_k_weights, dtype)
    # One weight matrix a row is gathered by batched_mm: with more rows than experts that is more than all the weights.
    if num_rows <= self.num_experts:
        return batched_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    gate_up, down = Projection(self.gate_up_proj).to(dtype), Projection(self.down_proj).to(dtype)
    projections = for_torchs_products(gate_up, down)
    return torch_experts_forward(self, hidden_states, top_k_index, top_k_weights, *projections)


def _dtype_of_products(weight: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(weight.device.type) if is_autocasting(weight) else weight.dtype


@torch.compiler.disable(reason="the routing decides the number of row blocks, and stk launches its kernels itself")
def _block_sparse_experts(
    experts: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    num_tokens, num_top_k = top_k_index.shape
    # Read once: under a parametrization every read computes the weight anew.
    gate_up_proj, down_proj = experts.gate_up_proj, experts.down_proj
    _, gate_up_dim, hidden_dim = gate_up_proj.shape
    gate_up_proj, down_proj = prepare_weight(gate_up_proj, dtype), prepare_weight(down_proj, dtype)
    bins = _sort_into_bins(top_k_index, experts.num_experts)

    x = _pad_columns(hidden_states.to(dtype), gate_up_proj.shape[2])  # (T, H)
    rows = _Gather.apply(x, bins.source // num_top_k, bins.position.view(num_tokens, num_top_k))  # (R, H)
    gate_up = _BlockSparseLinear.apply(rows, gate_up_proj, bins)  # (R, 2I)
    # Sliced to the stored widths, so that any activation sees what it would see in a dense layer.
    inner = experts._apply_gate(gate_up[:, :gate_up_dim]).to(dtype)  # (R, I)
    rows = _BlockSparseLinear.apply(_pad_columns(inner, down_proj.shape[2]), down_proj, bins)  # (R, H)
    choices = _Gather.apply(rows[:, :hidden_dim], bins.position, bins.source.unsqueeze(1))  # (T * K, H)

    # Weighted and summed over K as one reduction: no atomics, and fp32 whatever the compute dtype.
    weights = top_k_weights.to(torch.promote_types(top_k_weights.dtype, torch.float32))
    output = (choices.view(num_tokens, num_top_k, hidden_dim) * weights.unsqueeze(-1)).sum(dim=1)  # (T, H)
    return output.to(hidden_states.dtype)


def prepare_weight(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight (N, out, in) as the kernels can address it: the same tensor unless dtype, layout or widths forbid.

    `out` has to be whole blocks, `in` whole steps of 32 and at least one block; anything else is padded with zeros.
    Connected to autograd. Nothing is kept between calls: a training step, an adapter or an edit changes the weight.
    """
    _, out_features, in_features = weight.shape
    missing_out = -out_features % BLOCK
    missing_in = max(-in_features % BLOCK_K, BLOCK - in_features)
    weight = weight.to(dtype)
    if missing_out or missing_in:
        weight = F.pad(weight, (0, missing_in, 0, missing_out))
    return weight.contiguous()


def _pad_columns(x: torch.Tensor, width: int) -> torch.Tensor:
    return F.pad(x, (0, width - x.shape[1])) if x.shape[1] < width else x


class _Bins(NamedTuple):
    """Where the rows of T tokens times K slots go: into N bins of whole row blocks, one bin an expert."""

    num_blocks: int  # R / 128
    block_expert: torch.Tensor  # (R / 128,) the expert of a row block
    first_block: torch.Tensor  # (N,) the first row block of an expert
    blocks_per_expert: torch.Tensor  # (N,)
    source: torch.Tensor  # (R,) the flat (token, slot) that a row holds, -1 in padding
    position: torch.Tensor  # (T * K,) the row that holds a flat (token, slot), -1 for experts of another rank


@torch.no_grad()
def _sort_into_bins(top_k_index: torch.Tensor, num_experts: int) -> _Bins:
    expert_ids, order = top_k_index.flatten().sort(stable=True)
    experts = torch.arange(num_experts + 1, dtype=expert_ids.dtype, device=expert_ids.device)
    bounds = torch.searchsorted(expert_ids, experts)  # ids of N and more lie behind the last bound
    tokens_per_expert = bounds.diff()
    blocks_per_expert = (tokens_per_expert + BLOCK - 1) // BLOCK
    last_block = blocks_per_expert.cumsum(0)
    first_block = last_block - blocks_per_expert
    num_blocks = int(last_block[-1])  # the one synchronisation with the host

    row = torch.arange(num_blocks * BLOCK, device=expert_ids.device)
    block_expert = torch.searchsorted(last_block, row[::BLOCK] // BLOCK, right=True)
    row_expert = block_expert.repeat_interleave(BLOCK)
    rank = row - first_block[row_expert] * BLOCK
    sorted_row = (bounds[row_expert] + rank).clamp(max=max(len(order) - 1, 0))
    source = torch.where(rank < tokens_per_expert[row_expert], order[sorted_row], -1)

    local = expert_ids < num_experts
    expert = expert_ids.clamp(max=num_experts - 1)
    rank = torch.arange(len(order), device=expert_ids.device) - bounds[expert]
    position = torch.empty_like(order)
    position[order] = torch.where(local, first_block[expert] * BLOCK + rank, -1)
    return _Bins(num_blocks, block_expert, first_block, blocks_per_expert, source, position)


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of x (n, width) by index (m,); zeros where it is -1."""
    if len(x) == 0:
        return x.new_zeros(len(index), x.shape[1])
    return x.index_select(0, index.clamp(min=0)).masked_fill_((index < 0).unsqueeze(1), 0)


class _Gather(torch.autograd.Function):
    """Copies rows, and sums their gradients by a second gather: the index_add of plain indexing would be atomic.

    `source` (m,) is the row of x (n, width) that each output row copies, `copies` (n, j) the output rows that each row
    of x went to. Negative entries stand for a row of zeros and for no copy.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, source: torch.Tensor, copies: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(copies)
        return _take(x, source)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        (copies,) = ctx.saved_tensors
        return _take(grad, copies.flatten()).view(*copies.shape, grad.shape[1]).sum(dim=1), None, None


class _BlockSparseLinear(torch.autograd.Function):
    """y[r] = weight[expert of r] @ x[r] for rows in bins: x (R, in), weight (N, out, in) -> (R, out).

    Of the (R, N * out) matrix x @ weight.view(N * out, in).T, a row of expert e needs the columns e * out to
    (e + 1) * out. SDD computes just these blocks, and they are, block by block, the dense (R, out) result.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bins: _Bins) -> torch.Tensor:
        num_experts, out_features, in_features = weight.shape
        num_rows, num_columns = len(x), num_experts * out_features
        largest = max(num_rows * max(out_features, in_features), weight.numel())
        if largest > MAX_ELEMENTS:
            raise RuntimeError(
                f"`megablocks` addresses matrices of up to {MAX_ELEMENTS} elements; {num_rows} rows of experts with "
                f"weights {tuple(weight.shape)} need {largest}. Fewer tokens a step help if the rows are the larger "
                f"part. {ALTERNATIVES}"
            )
        need_x, need_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        ctx.bins, ctx.num_columns, ctx.in_features = bins, num_columns, in_features
        if num_rows == 0:
            return x.new_empty(0, out_features)
        topology = _topology(bins, out_features // BLOCK)
        values = x.new_empty(len(topology.row_indices), BLOCK, BLOCK)
        with _launch(x, weight.view(num_columns, in_features), values) as (kernels, x, matrix, out):
            # offsets, row_indices, column_indices
            kernels.sdd(x, matrix.t(), (num_rows, num_columns), out, *topology[:3])
        return values.view(bins.num_blocks, -1, BLOCK, BLOCK).transpose(1, 2).reshape(num_rows, out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        x, weight = ctx.saved_tensors
        bins, num_columns, in_features = ctx.bins, ctx.num_columns, ctx.in_features
        (num_rows, out_features), (need_x, need_weight, _) = grad.shape, ctx.needs_input_grad
        grad_x = grad.new_empty(num_rows, in_features) if need_x else None
        grad_weight = grad.new_zeros(num_columns, in_features) if need_weight else None
        if num_rows:
            topology = _topology(bins, out_features // BLOCK)
            blocks = grad.reshape(bins.num_blocks, BLOCK, -1, BLOCK).transpose(1, 2)
            values = blocks.reshape(-1, BLOCK, BLOCK).contiguous()
            for columns in _column_ranges(in_features):
                if need_x:
                    matrix = weight.view(num_columns, in_features)[:, columns]
                    with _launch(values, matrix, grad_x[:, columns]) as (kernels, sparse, dense, out):
                        kernels.dsd((num_rows, num_columns), sparse, *topology, False, dense, out)
                if need_weight:
                    with _launch(values, x[:, columns], grad_weight[:, columns]) as (kernels, sparse, dense, out):
                        kernels.dsd((num_columns, num_rows), sparse, *topology, True, dense, out)
        return grad_x, grad_weight.view(-1, out_features, in_features) if need_weight else None, None


def _column_ranges(width: int) -> Iterator[slice]:
    """Columns 0 to width in ranges of whole blocks; where they do not fit, the second range overlaps the first."""
    whole = width // BLOCK * BLOCK
    yield slice(0, whole)
    if whole < width:
        yield slice(width - BLOCK, width)


class _Topology(NamedTuple):
    """Which blocks of an (R, N * out) matrix exist, as stk's block compressed sparse rows, and transposed.

    int32 throughout: Triton multiplies an index by the block size in the index's own type, and the int16 that
    MegaBlocks uses wraps around from block 256 on.
    """

    offsets: torch.Tensor
    row_indices: torch.Tensor
    column_indices: torch.Tensor
    offsets_t: torch.Tensor
    column_indices_t: torch.Tensor
    block_offsets_t: torch.Tensor


def _topology(bins: _Bins, columns_per_expert: int) -> _Topology:
    block = torch.arange(bins.num_blocks * columns_per_expert, device=bins.block_expert.device)
    row, column = block // columns_per_expert, block % columns_per_expert
    expert = bins.block_expert[row]

    # Transposed, the blocks of one expert take the same places, its columns before its rows.
    first, rows = bins.first_block[expert], bins.blocks_per_expert[expert]
    rank = block - first * columns_per_expert
    row_t, column_t = first + rank % rows, rank // rows
    experts = torch.arange(columns_per_expert, device=block.device)
    starts_t = bins.first_block.unsqueeze(1) * columns_per_expert + bins.blocks_per_expert.unsqueeze(1) * experts
    topology = _Topology(
        offsets=torch.arange(bins.num_blocks + 1, device=block.device) * columns_per_expert,
        row_indices=row,
        column_indices=expert * columns_per_expert + column,
        offsets_t=F.pad(starts_t.flatten(), (0, 1), value=len(block)),
        column_indices_t=row_t,
        block_offsets_t=row_t * columns_per_expert + column_t,
    )
    return _Topology(*(indices.int() for indices in topology))


@contextmanager
def _launch(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> Iterator[tuple]:
    """The kernels, with the operands and the result to launch them on, for products as precise as torch's own."""
    backend = megablocks_backend()
    if backend.interpreted and out.dtype == torch.bfloat16:
        # Triton's interpreter multiplies the bit patterns of bf16. The rounding is the GPU's: once, of an fp32 sum.
        wide = out.float()
        yield backend.kernels, left.float(), right.float(), wide
        out.copy_(wide)
        return
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" or "TRITON_F32_DEFAULT" in os.environ
    full_precision = out.dtype == torch.float32 and not tf32 and not backend.interpreted
    # Triton launches on the current device, which under a device map need not be that of the tensors.
    with torch.cuda.device_of(out), _full_precision(backend.kernels) if full_precision else nullcontext():
        yield backend.kernels, left, right, out


_configuration_lock = threading.Lock()


@contextmanager
def _full_precision(kernels: ModuleType) -> Iterator[None]:
    """Launches fp32 products without TF32, which is Triton's default where it is not torch's.

    stk's functions take no option, so this one travels with the kernels' launch configuration. Triton keys compiled
    kernels by it, so neither setting ever meets a kernel compiled under the other.
    """
    configs = [config.kwargs for kernel in (kernels._sdd_kernel, kernels._dsd_kernel) for config in kernel.configs]
    with _configuration_lock:
        for options in configs:
            options["allowed_dot_input_precisions"] = ("ieee",)
        try:
            yield
        finally:
            for options in configs:
                del options["allowed_dot_input_precisions"]


@dataclass(frozen=True)
class MegablocksBackend:
    """Which source of stk's kernels is in use, and why each of the others is not."""

    source: str | None = None
    version: str | None = None
    rejected: dict[str, str] = field(default_factory=dict)
    # Has `sdd` and `dsd`, which launch, and `_sdd_kernel` and `_dsd_kernel`, which they launch.
    kernels: ModuleType | None = None

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs the kernels, on the CPU."""
        return self.kernels is not None and type(self.kernels._sdd_kernel.fn).__name__ == "InterpretedFunction"


def _megablocks_package() -> tuple[str, ModuleType]:
    importlib.import_module("megablocks.ops")  # fails where its CUDA extension was not compiled
    stk_version, kernels = _stanford_stk()
    return f"{_version('megablocks')} (stk {stk_version})", kernels


def _kernels_community() -> tuple[str, ModuleType]:
    if not torch.cuda.is_available():
        raise RuntimeError("its builds of these kernels need a CUDA device")
    kernel = importlib.import_module("kernels").get_kernel(KERNEL_REPOSITORY, version=KERNEL_VERSION)
    # The library names the module after the build, so that a relative import cannot reach its stk.
    return f"version {KERNEL_VERSION}", importlib.import_module(f"{kernel.__name__}.stk.backend.triton_kernels")


def _stanford_stk() -> tuple[str, ModuleType]:
    kernels = importlib.import_module("stk.backend.triton_kernels")
    return _version("stanford-stk"), kernels


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


KERNEL_REPOSITORY, KERNEL_VERSION = "kernels-community/megablocks", 1

# Source -> (module that it needs, what loads its version and its kernels), the preferred one first.
SOURCES: dict[str, tuple[str, Callable[[], tuple[str, ModuleType]]]] = {
    "megablocks": ("megablocks", _megablocks_package),
    KERNEL_REPOSITORY: ("kernels", _kernels_community),
    "stanford-stk": ("stk", _stanford_stk),
}
REQUIRED = ("sdd", "dsd", "_sdd_kernel", "_dsd_kernel")

_backend: MegablocksBackend | None = None


def megablocks_backend() -> MegablocksBackend:
    """The first source of kernels that works here: the compiled `megablocks` package, the build of
    `kernels-community/megablocks` that the `kernels` library finds or downloads, or `stanford-stk`.

    All three hold stk's Triton kernels, and only these are taken: MegaBlocks' own gather and scatter have no rows of
    other ranks, and its topology indexes blocks in int16.

    A success is kept for the process, a failure is looked at again by the next call.

    Returns:
        [`MegablocksBackend`]: with `source=None` where none works; `rejected` then has a reason for each.
    """
    global _backend
    if _backend is not None:
        return _backend
    rejected = {}
    for source, (module, load) in SOURCES.items():
        if importlib.util.find_spec(module) is None:
            rejected[source] = f"the package `{module}` is not installed"
            continue
        try:
            version, kernels = load()
        # A half-installed package raises anything: OSError for a missing library, AttributeError, SyntaxError.
        except Exception as error:
            rejected[source] = f"{type(error).__name__}: {error}"
            continue
        if missing := [name for name in REQUIRED if not hasattr(kernels, name)]:
            rejected[source] = f"it lacks {', '.join(missing)}"
            continue
        for later in list(SOURCES)[len(rejected) + 1 :]:
            rejected[later] = f"not needed, {source} comes first"
        _backend = MegablocksBackend(source, version, rejected, kernels)
        logger.info(f"Block-sparse experts use the kernels of {source} {version}.")
        return _backend
    return MegablocksBackend(rejected=rejected)


@torch.compiler.assume_constant_result
def _obstacle(device_type: str) -> str | None:
    """Why the kernels cannot run on tensors of this device type, or `None`; the same throughout a process."""
    interpreter = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if device_type != "cuda" and not (device_type == "cpu" and interpreter):
        return (
            f"MegaBlocks' Triton kernels need a CUDA device, and the tensors are on {device_type} (on a CPU, "
            "`TRITON_INTERPRET=1` runs them in Triton's interpreter, for tests only)."
        )
    backend = megablocks_backend()
    if backend.kernels is None:
        reasons = "; ".join(f"{source}: {reason}" for source, reason in backend.rejected.items())
        return f"no source of MegaBlocks' kernels works here ({reasons}). `pip install stanford-stk triton` is enough."
    if device_type == "cpu" and not backend.interpreted:
        return "Triton's kernels were loaded before `TRITON_INTERPRET=1` was set; set it before the program starts."
    return None


def is_preferred(weight: torch.Tensor) -> bool:
    """Whether the default experts multiply such weights with these kernels rather than with torch's `grouped_mm`.

    That is so on a CUDA device where torch has no grouped kernel for the dtype, and the package `stanford-stk` is
    installed. Before their first use on a device, in a dtype, the kernels have to get products and gradients right;
    where they do not, or do not compile, a warning says so once, and torch computes.
    """
    capability = torch.cuda.get_device_capability(weight.device)
    dtype = _dtype_of_products(weight)
    has_torchs = dtype == torch.bfloat16 and capability[0] in TORCH_GROUPED_MAJORS
    if has_torchs or capability < MIN_CAPABILITY or dtype not in PREFERRED_DTYPES:
        return False
    return _is_proven(weight.device, dtype)


_proven: dict[tuple[torch.device, torch.dtype], bool] = {}


def _is_proven(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels are right on a device, found out once in a process; warns where they are not."""
    if (device, dtype) not in _proven and importlib.util.find_spec("stk") is None:
        _proven[device, dtype] = False
    if (device, dtype) not in _proven:
        obstacle = _obstacle(device.type)
        try:
            if obstacle is None and not products_are_exact(device, dtype):
                obstacle = "their products are wrong on this machine."
        # Triton and the driver raise errors of many types where a kernel cannot be compiled or launched.
        except Exception as error:
            obstacle = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        _proven[device, dtype] = obstacle is None
        if obstacle is not None:
            logger.warning(
                f"MegaBlocks' kernels are installed and not used on {device} in {dtype}: {obstacle} torch computes "
                "one expert after the other. `python -m modeling_coe.megablocks` tells more."
            )
    return _proven[device, dtype]


def products_are_exact(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the kernels get a product and its gradients right, of integers that no order of summation rounds."""
    device, generator = torch.device(device), torch.Generator().manual_seed(0)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator).to(device, dtype).requires_grad_()

    # Whatever the caller computes in: a model that generates has no gradients, one that trains may cast products.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        x, weight = integers(2 * BLOCK, 160), integers(2, BLOCK, 160)
        output = _BlockSparseLinear.apply(x, weight, _sort_into_bins(torch.tensor([[1], [0]], device=device), 2))
        actual = output, *torch.autograd.grad(output, (x, weight), output)
        per_expert, wide = x.detach().float().view(2, BLOCK, 160), weight.detach().float()
        grad = output.detach().float().view(2, BLOCK, BLOCK)
        expected = per_expert @ wide.mT, grad @ wide, grad.mT @ per_expert
        return all(torch.equal(a, e.to(a.dtype).view_as(a)) for a, e in zip(actual, expected, strict=True))


def _doctor() -> int:
    """Prints what `experts_implementation="megablocks"` would use on this machine, and why; 0 if it can be used."""
    for distribution in ("torch", "triton", "stanford-stk", "megablocks", "kernels"):
        print(f"{distribution}: {_version(distribution) or 'not installed'}")
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        print(f"device: {torch.cuda.get_device_name()}, compute capability {major}.{minor}")
    else:
        print("device: cpu")
    obstacle = _obstacle(device_type)
    backend = megablocks_backend()
    print(f"Triton: {'interpreter' if backend.interpreted else 'compiler'}")
    for source in SOURCES:
        verdict = f"in use, {backend.version}" if source == backend.source else f"no: {backend.rejected[source]}"
        print(f"source {source}: {verdict}")
    print(
        f"rows per expert from which blocks are used: {MIN_ROWS_PER_EXPERT} "
        "(COE_MEGABLOCKS_MIN_ROWS_PER_EXPERT; tokens x experts per token / experts)"
    )
    if obstacle is None and not products_are_exact(device_type):
        obstacle = "the kernels' products are wrong on this machine."
    print("usable: yes, products checked" if obstacle is None else f"usable: no. {obstacle} {ALTERNATIVES}")
    return 0 if obstacle is None else 1


if __name__ == "__main__":
    sys.exit(_doctor())
