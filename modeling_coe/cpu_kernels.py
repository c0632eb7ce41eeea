# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Products of sorted rows with their experts' matrices on the CPU, each by the library that is fastest at it here.

Which one that is depends on processor, library, dtype and shape, so it is measured: once a process for every class of
shapes ([`Product`]), on a small product of its own, in a few milliseconds. The class follows from the shape of the
batch and not from the routing, and what was chosen stays: the same inputs give the same bits. Two processes may
measure differently. To have one choice throughout, hand it on (`choices`, `use`), or set

    COE_CPU_KERNEL    `auto` (default) or a kernel, used wherever it can compute the product, and `mm` elsewhere

    python -m modeling_coe.cpu_kernels --hidden-size 512 --expert-width 352

measures a layer's products and tells what is chosen, and why a kernel cannot run.

Kernels, the preferred one first:

- `grouped_mm`: torch's own, a loop of `mm` in C++ (float32, bfloat16, float16; rows of whole 16 bytes)
- `mm`: a loop of `torch.mm`, for every dtype
- `onednn`: a loop of oneDNN's products, for float32 only: torch takes oneDNN for the narrow dtypes itself, and MKL for
  float32, which leaves its fastest kernels unused on some processors

With quantised weights, `mm` widens one matrix after another to the dtype of the rows, and there are two more:

- `packed`: torch's products with weights of 8 and 4 bits as they are stored, rows in bfloat16
- `bfloat16_mm`: `mm` in bfloat16 where rows are float32

oneDNN compiles a kernel for every shape, which takes longer than the product. Routing decides how many rows an expert
has, so these come in steps of 16 wherever oneDNN computes, and `grouped_mm`, which knows no steps, computes in the
narrow dtypes only where rows are few.

Shapes: N experts, R rows sorted by expert.
"""

import argparse
import functools
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import AutoConfig

from .quantized_weights import BFLOAT16_MM, GROUP_SIZE, PACKED, QuantizedMatrices, packed_obstacle


VARIABLE = "COE_CPU_KERNEL"
MARGIN = 1.05  # what a kernel may take, relative to the fastest, and still be preferred
ROUNDS, LEAST_ROUNDS = 9, 3  # of all kernels in turn
SECONDS = 2e-3  # after these no further round begins
ONEDNN_ROWS = 16
NARROW_DTYPES = (torch.bfloat16, torch.float16)


def grouped_product(
    inputs: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, load: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows times the matrix of their expert.

    Args:
        inputs (`torch.Tensor`): (R, in), contiguous.
        weight (`torch.Tensor` or `QuantizedMatrices`): (N, in, out), in the dtype of `inputs`; itself contiguous, or
            its transpose is.
        counts (`torch.Tensor`): (N,) rows of each expert, int64.
        load (`float`): Rows per expert, as the shape of the batch has it.
        out (`torch.Tensor`, *optional*): Where to write the result; contiguous.

    Returns:
        `torch.Tensor`: (R, out), `out` if that is given. The matrices of experts without a row are not read.
    """
    if isinstance(weight, QuantizedMatrices):
        output = multiply_quantized(inputs, weight, *_with_rows(counts), load)
        return output if out is None else out.copy_(output)
    kind = "input gradient" if weight.is_contiguous() else "output"
    kernel = kernel_for(Product.of(kind, inputs.dtype, *weight.shape[1:], load))
    return _grouped_product(kernel, inputs, weight, counts, out)


def multiply_quantized(
    inputs: torch.Tensor, weight: QuantizedMatrices, matrices: list[int], sizes: list[int], load: float
) -> torch.Tensor:
    """Rows times some of quantised matrices, see [`QuantizedMatrices.multiply`].

    Args:
        load (`float`): Rows per matrix, as the shape of the batch has it.
    """
    kernel = "mm"
    if weight.is_transposed:  # or else it is the gradient of the rows
        kernel = kernel_for(Product.of(QUANTIZED_KINDS[weight.bits], weight.dtype, *weight.shape[1:], load))
    return weight.multiply(inputs, matrices, sizes, kernel)


def _grouped_product(
    kernel: str,
    inputs: torch.Tensor,
    weight: torch.Tensor,
    counts: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    # It writes to memory of its own: with `out`, its loop of `mm` is made here.
    if kernel == "grouped_mm" and out is None and _is_aligned(inputs, weight):
        return F.grouped_mm(inputs, weight, offs=counts.cumsum(0, dtype=torch.int32))
    output = inputs.new_empty(len(inputs), weight.shape[2]) if out is None else out
    experts, sizes = _with_rows(counts)
    product = _product(kernel, inputs.dtype)
    for expert, rows, expert_out in zip(experts, inputs.split(sizes), output.split(sizes), strict=True):
        product(rows, weight[expert], out=expert_out)
    return output


def _with_rows(counts: torch.Tensor) -> tuple[list[int], list[int]]:
    """The experts that have rows, few of them in decoding, and how many each has."""
    pairs = [(expert, count) for expert, count in enumerate(counts.tolist()) if count]
    return [expert for expert, _ in pairs], [count for _, count in pairs]


def add_grouped_product(
    output: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor
) -> None:
    """Adds rows times the matrix of their expert to `output`, in place: the products of low-rank matrices, which are
    so small that another pass over the output would cost as much.

    Args:
        output (`torch.Tensor`): (R, out), contiguous.
        inputs (`torch.Tensor`): (R, in), in the dtype of `output`, contiguous.
        weight (`torch.Tensor`): (N, in, out), in the dtype of `output`.
        counts (`torch.Tensor`): (N,) rows of each expert, int64.
    """
    sizes = counts.tolist()
    for out, rows, matrix in zip(output.split(sizes), inputs.split(sizes), weight.unbind(), strict=True):
        if len(rows):
            _add_product("mm", rows, matrix, out)


def grouped_outer_product(
    left: torch.Tensor,
    right: torch.Tensor,
    counts: torch.Tensor,
    load: float,
    out: torch.Tensor | None = None,
    add: bool = False,
) -> torch.Tensor:
    """Sum of the outer products of each expert's rows, zeros for an expert without.

    Args:
        left (`torch.Tensor`): (R, a), contiguous.
        right (`torch.Tensor`): (R, b), in the dtype of `left`, contiguous.
        counts (`torch.Tensor`): (N,) rows of each expert, int64.
        load (`float`): Rows per expert, as the shape of the batch has it.
        out (`torch.Tensor`, *optional*): Where to write the result.
        add (`bool`, defaults to `False`): Adds the result to what is in `out` instead.

    Returns:
        `torch.Tensor`: (N, a, b), `out` if that is given.
    """
    kind = "weight gradient" if out is None else "weight gradient in place"
    kernel = kernel_for(Product.of(kind, left.dtype, left.shape[1], right.shape[1], load))
    return _grouped_outer_product(kernel, left, right, counts, out, add)


def _grouped_outer_product(
    kernel: str,
    left: torch.Tensor,
    right: torch.Tensor,
    counts: torch.Tensor,
    out: torch.Tensor | None = None,
    add: bool = False,
) -> torch.Tensor:
    if kernel == "grouped_mm" and _is_aligned(left, right):
        return F.grouped_mm(left.t(), right, offs=counts.cumsum(0, dtype=torch.int32))
    if out is None:
        out = left.new_empty(len(counts), left.shape[1], right.shape[1])
    product, counts = _product(kernel, left.dtype), counts.tolist()
    for a, b, expert_out in zip(left.split(counts), right.split(counts), out.unbind(), strict=True):
        if add and len(a):
            _add_product(kernel, a.t(), b, expert_out)
        elif len(a):
            product(a.t(), b, out=expert_out)
        elif not add:
            expert_out.zero_()
    return out


def _is_aligned(left: torch.Tensor, right: torch.Tensor) -> bool:
    # Up to torch 2.10 `grouped_mm` refuses other addresses. `mm`, which then replaces it, is what it calls.
    return (left.data_ptr() | right.data_ptr()) % 16 == 0


def _product(kernel: str, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """What computes one product of a loop: `(a, b, out)`."""
    if kernel == "onednn":
        return functools.partial(_mm_in_steps, _onednn_mm)
    return functools.partial(_mm_in_steps, torch.mm) if dtype in NARROW_DTYPES else torch.mm


def _add_product(kernel: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Adds a product to `out`."""
    product = _product(kernel, a.dtype)
    if product is torch.mm:
        out.addmm_(a, b)
    else:
        out += product(a, b, out=torch.empty_like(out))


def _mm_in_steps(
    mm: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], a: torch.Tensor, b: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """A product whose sizes, those that routing decides, are padded to whole steps."""
    padding = -len(a) % ONEDNN_ROWS if len(a) > ONEDNN_ROWS else 0  # fewer are few shapes
    inner_padding = -a.shape[1] % ONEDNN_ROWS
    if padding or inner_padding:
        a = F.pad(a, (0, inner_padding, 0, padding))
    if inner_padding:
        b = F.pad(b, (0, 0, 0, inner_padding))
    return out.copy_(mm(a, b)[: len(out)])


def _onednn_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`torch.mm` by oneDNN. `F.linear` of `a.to_mkldnn()` is the public way to it, and copies what is transposed."""
    if len(a) < ONEDNN_ROWS:
        return torch.mm(a, b)
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


# ---- Which kernel ---------------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """A class of products that are computed by one kernel."""

    kind: str  # of `KINDS` or `QUANTIZED_KINDS`
    dtype: torch.dtype
    shape: tuple[int, int]  # (in, out), or (a, b) of an outer product; wide ones share a class
    rows: int  # per expert on average, in steps of powers of 2
    threads: int

    @classmethod
    def of(cls, kind: str, dtype: torch.dtype, height: int, width: int, load: float) -> "Product":
        return cls._of(kind, dtype, height, width, load, torch.get_num_threads())

    @classmethod
    @functools.lru_cache(1024)
    def _of(cls, kind: str, dtype: torch.dtype, height: int, width: int, load: float, threads: int) -> "Product":
        # Beyond 1,024 the rate hardly changes. The remainder decides what a kernel can compute.
        shape = min(height, 1024 + height % 16), min(width, 1024 + width % 16)
        most_rows = min(256, max(ONEDNN_ROWS, 2**26 // (shape[0] * shape[1])))
        rows = 1
        while rows < load and 2 * rows <= most_rows:
            rows *= 2
        return cls(kind, dtype, shape, rows, threads)

    def __str__(self) -> str:
        dtype, (height, width) = str(self.dtype).removeprefix("torch."), self.shape
        return f"{self.kind}, {dtype}, {height} x {width}, rows {self.rows}, threads {self.threads}"


KINDS = ("output", "input gradient", "weight gradient", "weight gradient in place")
QUANTIZED_KINDS = {8: "output of 8-bit weights", 4: "output of 4-bit weights"}


def _bits(product: Product) -> int | None:
    return next((bits for bits, kind in QUANTIZED_KINDS.items() if kind == product.kind), None)


def _grouped_mm_obstacle(product: Product) -> str | None:
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no `torch.nn.functional.grouped_mm`"
    if product.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it does not compute {product.dtype}"
    if product.dtype in NARROW_DTYPES and product.rows >= ONEDNN_ROWS:
        return f"its products in {product.dtype} do not come in steps of rows"
    if any(size * product.dtype.itemsize % 16 for size in product.shape):
        return "it needs rows of whole 16 bytes"
    if product.kind == "weight gradient in place":
        return "it writes to memory of its own"
    return None


def _onednn_obstacle(product: Product) -> str | None:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this build of torch has no oneDNN, or does not call it by `torch.ops.mkldnn._linear_pointwise`"
    if product.dtype != torch.float32:
        return f"torch itself takes oneDNN for {product.dtype}, or does not have it"
    return None


def _packed_obstacle(product: Product) -> str | None:
    if product.dtype not in (torch.float32, torch.bfloat16):
        return f"it rounds rows to bfloat16, which {product.dtype} is not meant to be"
    return packed_obstacle(_bits(product), *product.shape)


def _bfloat16_mm_obstacle(product: Product) -> str | None:
    if product.dtype != torch.float32:
        return f"it is there for float32, and `mm` for {product.dtype}"
    return None


# Kernel -> why it cannot compute a product, or None. The preferred one comes first.
KERNELS: dict[str, Callable[[Product], str | None]] = {
    "grouped_mm": _grouped_mm_obstacle,
    "mm": lambda product: None,
    "onednn": _onednn_obstacle,
}
QUANTIZED_KERNELS: dict[str, Callable[[Product], str | None]] = {
    "mm": lambda product: None,
    PACKED: _packed_obstacle,
    BFLOAT16_MM: _bfloat16_mm_obstacle,
}

_chosen: dict[Product, str] = {}
_given: dict[str, str] = {}
_lock = threading.Lock()


def kernel_for(product: Product) -> str:
    """The kernel of a class of products: that of `COE_CPU_KERNEL`, or else the one that was given or measured.

    Raises:
        ValueError: `COE_CPU_KERNEL` is neither `auto` nor a kernel.
    """
    kernel = os.environ.get(VARIABLE, "auto")
    if kernel != "auto":
        if kernel not in (names := _names()):
            raise ValueError(f"{VARIABLE} is {kernel!r}; choose one of {', '.join(['auto', *names])}.")
        return _possible(kernel, product)
    if product not in _chosen:
        with _lock:  # backward may come from several threads
            if product not in _chosen:
                given = _given.get(str(product))
                _chosen[product] = _possible(given, product) if given else _fastest(measure(product))
    return _chosen[product]


def _possible(kernel: str, product: Product) -> str:
    obstacle = _kernels_of(product).get(kernel)
    return "mm" if obstacle is None or obstacle(product) is not None else kernel


def _kernels_of(product: Product) -> dict[str, Callable[[Product], str | None]]:
    return KERNELS if _bits(product) is None else QUANTIZED_KERNELS


def _names() -> list[str]:
    return list(KERNELS | QUANTIZED_KERNELS)


def choices() -> dict[str, str]:
    """The kernel of each class of products, by name, that this process was given or has chosen so far."""
    with _lock:
        return _given | {str(product): kernel for product, kernel in _chosen.items()}


def use(choices: dict[str, str]) -> None:
    """Computes these classes of products by the kernels that another process, or this one before, had for them.

    Args:
        choices (`dict[str, str]`): What [`choices`] returned. `mm` replaces a kernel that cannot run here.

    Raises:
        ValueError: One of the kernels is unknown.
    """
    for name, kernel in choices.items():
        if kernel not in _names():
            raise ValueError(f"{name!r} has the unknown CPU kernel {kernel!r}; choose one of {', '.join(_names())}.")
    with _lock:
        _given.update(choices)
        for product in _chosen:
            if (kernel := choices.get(str(product))) is not None:
                _chosen[product] = _possible(kernel, product)


# ---- Measuring ------------------------------------------------------------------------------------------------------


def measure(product: Product) -> dict[str, float | str]:
    """Seconds that each kernel takes for a small product of a class, or why it cannot compute it.

    Where no two kernels can, nothing is measured, and the seconds of the one that can are 0.
    """
    outcome: dict[str, float | str] = {
        kernel: obstacle(product) or 0.0 for kernel, obstacle in _kernels_of(product).items()
    }
    able = [kernel for kernel, result in outcome.items() if result == 0.0]
    if len(able) > 1:
        # A thread of its own has none of the caller's modes: autograd, autocast, dispatch, default device.
        with ThreadPoolExecutor(1) as executor:
            outcome |= executor.submit(_time, product, able).result()
    return outcome


def _fastest(outcome: dict[str, float | str]) -> str:
    times = {kernel: result for kernel, result in outcome.items() if isinstance(result, float)}
    limit = MARGIN * min(times.values(), default=0.0)
    return next((kernel for kernel, seconds in times.items() if seconds <= limit), "mm")


@torch.no_grad()
def _time(product: Product, kernels: list[str]) -> dict[str, float | str]:
    torch.get_num_threads()  # gives this thread as many as the others have
    clock = _clock(product.threads)
    compute, outcome = _example(product), {}
    for kernel in kernels:
        try:
            compute(kernel)  # oneDNN compiles its own
            outcome[kernel] = float("inf")
        except RuntimeError as error:
            outcome[kernel] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    running = [kernel for kernel in kernels if outcome[kernel] == float("inf")]
    begin = clock()
    for turn in range(ROUNDS):
        if turn >= LEAST_ROUNDS:
            if clock() - begin > SECONDS:
                break
            slow = 1.5 * min((outcome[kernel] for kernel in running), default=0.0)
            running = [kernel for kernel in running if outcome[kernel] <= slow]
        for kernel in running:
            start = clock()
            compute(kernel)
            outcome[kernel] = min(outcome[kernel], clock() - start)
    return outcome


def _clock(threads: int) -> Callable[[], float]:
    # The time of this thread alone does not count what other processes do.
    if threads == 1 and time.get_clock_info("thread_time").resolution <= 1e-6:
        return time.thread_time
    return time.perf_counter


def _example_experts(product: Product) -> int:
    # As many as make 16 MFLOP, and not more than 4 MiB of their matrices.
    (height, width), rows = product.shape, product.rows
    most = min(2**23 // (rows * height * width), 2**22 // (height * width * product.dtype.itemsize), 32)
    return max(most - most % 2, 1)


def example_flops(product: Product) -> int:
    """Floating-point operations of what [`measure`] computes."""
    return 2 * _example_experts(product) * product.rows * math.prod(product.shape)


def _example(product: Product) -> Callable[[str], torch.Tensor]:
    """What computes a product of the class, with fewer experts, by a given kernel."""
    (height, width), rows, num_experts = product.shape, product.rows, _example_experts(product)
    uneven = rows // 4 if num_experts > 1 else 0
    counts = torch.tensor([rows + (uneven if expert % 2 else -uneven) for expert in range(num_experts)])

    def tensor(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=product.dtype)

    left = tensor(int(counts.sum()), height)
    if (bits := _bits(product)) is not None:
        weight = _example_weight(bits, num_experts, height, width, product.dtype)
        return lambda kernel: weight.multiply(left, *_with_rows(counts), kernel)
    if product.kind in ("output", "input gradient"):
        transposed = product.kind == "output"
        weight = tensor(num_experts, width, height).mT if transposed else tensor(num_experts, height, width)
        return lambda kernel: _grouped_product(kernel, left, weight, counts)
    right = tensor(len(left), width)
    out = tensor(num_experts, height, width) if product.kind == "weight gradient in place" else None
    return lambda kernel: _grouped_outer_product(kernel, left, right, counts, out)


def _example_weight(bits: int, num_experts: int, height: int, width: int, dtype: torch.dtype) -> QuantizedMatrices:
    if bits == 8:
        data, scale = torch.ones(num_experts, width, height, dtype=torch.int8), torch.ones(num_experts, width)
    else:
        data = torch.zeros(num_experts, width, height // 2, dtype=torch.uint8)
        scale = torch.ones(num_experts, height // GROUP_SIZE, width, 2, dtype=torch.bfloat16)
    return QuantizedMatrices(data, scale, dtype, is_packed=bits == 4).mT


# ---- Doctor ---------------------------------------------------------------------------------------------------------


def processor() -> str:
    """Name of the processor, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def layer_products(
    hidden_size: int, expert_width: int, load: float, dtype: torch.dtype, bits: int | None = None
) -> Iterator[Product]:
    """The products of a layer's experts, forward and backward, with `load` rows per expert, or those with weights of
    8 or 4 bits."""
    gate_up, down = (hidden_size, 2 * expert_width), (expert_width, hidden_size)
    if bits is not None:
        for height, width in (gate_up, down):
            yield Product.of(QUANTIZED_KINDS[bits], dtype, height, width, load)
        return
    for height, width in (gate_up, down):
        yield Product.of("output", dtype, height, width, load)
    for height, width in (gate_up, down):
        yield Product.of("input gradient", dtype, width, height, load)
    for kind in KINDS[2:]:
        for height, width in (gate_up, down):
            yield Product.of(kind, dtype, width, height, load)


def _doctor(argv: list[str] | None = None) -> int:
    """Measures the products of a layer, and prints what each kernel takes, which one is chosen and why others cannot
    run."""
    parser = argparse.ArgumentParser(prog="python -m modeling_coe.cpu_kernels", description=_doctor.__doc__)
    parser.add_argument("model", nargs="?", help="folder of a model whose widths and dtype are taken")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--expert-width", type=int, default=352, help="moe_intermediate_size")
    parser.add_argument("--rows", type=float, nargs="+", default=[1, 16, 64], help="per expert, on average")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--bits", type=int, choices=QUANTIZED_KINDS, help="of quantised weights")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    hidden_size, expert_width, dtype = args.hidden_size, args.expert_width, getattr(torch, args.dtype)
    if args.model is not None:
        config = AutoConfig.from_pretrained(args.model)
        hidden_size, expert_width = config.hidden_size, config.moe_intermediate_size
        dtype = config.dtype or dtype
    if min(hidden_size, expert_width, *args.rows, args.threads) <= 0:
        parser.error("widths, rows and threads must be more than 0.")
    torch.set_num_threads(args.threads)
    print(f"processor: {processor()}")
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, threads: {args.threads}")
    print(f"{VARIABLE}: {os.environ.get(VARIABLE, 'auto')}")
    print(f"hidden size {hidden_size}, expert width {expert_width}\n")
    layer = functools.partial(layer_products, hidden_size, expert_width, dtype=dtype, bits=args.bits)
    products = [product for load in args.rows for product in layer(load=load)]
    kernels = _kernels_of(products[0])
    print(f"{'microseconds of a small product':64}" + "".join(f"{kernel:>12}" for kernel in kernels) + "  chosen")
    reasons = {}
    for product in dict.fromkeys(products):
        outcome = measure(product)
        if os.environ.get(VARIABLE, "auto") == "auto":
            use({str(product): _fastest(outcome)})
        # The time is 0 where there is no other kernel to compare with.
        cells = (f"{1e6 * result:.0f}" if isinstance(result, float) and result else "-" for result in outcome.values())
        print(f"{product!s:64}" + "".join(f"{cell:>12}" for cell in cells) + f"  {kernel_for(product)}")
        for kernel, result in outcome.items():
            if isinstance(result, str):
                reasons.setdefault(f"{kernel}: {result}", []).append(product.kind)
    for why, kinds in reasons.items():
        print(f"- {why} ({', '.join(dict.fromkeys(kinds))})")
    return 0


if __name__ == "__main__":
    sys.exit(_doctor())
