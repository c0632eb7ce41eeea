# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Compiles MegaBlocks' kernels for GPUs that need not be there: registers, local and shared memory of every launch.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --capabilities 9.0 --dtypes bfloat16

`modeling_coe/megablocks.py` computes a product and both its gradients on the CPU. Where stk would launch a kernel,
Triton compiles it, with the arguments that a GPU would get: the types, constants, strides and alignments that a kernel
is specialised for are those of a launch. Nothing runs, and no result means anything.

A kernel that does not compile, or needs more shared memory than a block of the GPU has, ends in the exit code 1. Local
memory is what does not fit into the registers of a thread: a kernel that has some is slow.
"""

import datetime
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks.markdown import table
from modeling_coe import megablocks
from modeling_coe.command_line import InputError, check_folder, command, parse, setting


KIB = 1024
# Compute capability -> bytes of shared memory that a block can have, from the CUDA C++ Programming Guide.
SHARED_MEMORY = {"8.0": 163 * KIB, "8.6": 99 * KIB, "8.9": 99 * KIB, "9.0": 227 * KIB, "10.0": 227 * KIB}
DTYPES = ("bfloat16", "float16", "float32", "tf32")
# (experts, out, in) of weights: whole blocks in both widths, and the paper's down projection, whose 704 columns are
# taken in two ranges that overlap. Every width is a multiple of 32, and launches of other sizes are these again.
WEIGHTS = ((2, 256, 128), (2, 128, 704))
# What a matrix product of a kernel became in PTX, the newest first.
INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "fma.rn.f32")


@dataclass(frozen=True)
class Launch:
    """A kernel as it is compiled for one target.

    Attributes:
        kernel (`str`): stk's name of it.
        product (`str`): Forward, or the gradient that it computes.
        dtype (`str`): Of the operands; "tf32" is float32 where torch allows TF32.
        capability (`str`): Compute capability of the target.
        instruction (`str`): That multiplies matrices.
        warps (`int`): Of a block.
        buffers (`int`): Steps of the product whose operands shared memory holds; with several, it computes while it
            reads.
        asynchronous (`bool`): Whether it copies to shared memory asynchronously.
        registers (`int`): Of a thread.
        local_bytes (`int`): Of a thread: what is spilled.
        shared_bytes (`int`): Of a block.
    """

    kernel: str
    product: str
    dtype: str
    capability: str
    instruction: str
    warps: int
    buffers: int
    asynchronous: bool
    registers: int
    local_bytes: int
    shared_bytes: int

    @property
    def fits(self) -> bool:
        return self.shared_bytes <= SHARED_MEMORY[self.capability]


def set_target(capability: str) -> None:
    """Lets Triton compile for a compute capability from now on, as if a device of it were the current one."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    arch = int(capability.replace(".", ""))
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
            get_current_device=lambda: arch,  # kernels are cached by device
            get_current_stream=lambda device: 0,
        )
    )


@contextmanager
def compiling_only(launched: Callable[[str, Any], None]) -> Iterator[None]:
    """Hands what stk would launch to `launched`, compiled: the kernel's name and Triton's compiled kernel."""

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = kernel.warmup(*args, grid=grid, **options)
        for each in compiled if isinstance(compiled, list) else [compiled]:  # one of each configuration
            launched(kernel.base_fn.__name__, each)

    kernels = megablocks.megablocks_backend().kernels
    with ExitStack() as stack:
        for kernel in (kernels._sdd_kernel, kernels._dsd_kernel):
            stack.enter_context(mock.patch.object(kernel, "run", functools.partial(compile_only, kernel)))
        yield


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread, as cuobjdump reads them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command_line = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command_line, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def compile_launches(capability: str, dtype: str) -> list[Launch]:
    """Every kernel that a training step launches on experts in a dtype, compiled for a compute capability."""
    launches = {}

    def launched(product: str, kernel: str, compiled: Any) -> None:
        ptx, metadata = compiled.asm["ptx"], compiled.metadata
        if (product, metadata.hash) in launches:
            return
        registers, local_bytes = resources(compiled.asm["cubin"])
        launches[product, metadata.hash] = Launch(
            kernel.strip("_"),
            product,
            dtype,
            capability,
            next(name for name in INSTRUCTIONS if name in ptx),
            metadata.num_warps,
            metadata.shared // (2 * megablocks.BLOCK * megablocks.BLOCK_K * weight.itemsize),
            "cp.async" in ptx,
            registers,
            local_bytes,
            metadata.shared,
        )

    set_target(capability)
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    for shape in WEIGHTS:
        weight = torch.zeros(shape, dtype=torch.float32 if dtype == "tf32" else getattr(torch, dtype))
        rows = weight.new_zeros(2 * megablocks.BLOCK, shape[2])
        bins = megablocks._sort_into_bins(torch.tensor([[0], [1]]), len(weight))
        for product, operand in (("input gradient", rows), ("weight gradient", weight)):
            operand.requires_grad_()
            with compiling_only(functools.partial(launched, "forward")):
                output = megablocks._BlockSparseLinear.apply(rows, weight, bins)
            with compiling_only(functools.partial(launched, product)):
                output.sum().backward()
            operand.requires_grad_(False)
    return list(launches.values())


def markdown(results: dict[str, Any]) -> str:
    versions = results["versions"]
    lines = [
        "# Kernels of `megablocks`, compiled",
        "",
        f"torch {versions['torch']}, Triton {versions['triton']}, {results['source']}, {results['date']}. "
        "Buffers are steps of a product whose operands shared memory holds; registers and local memory (bytes) are of "
        "a thread, shared memory (KiB) of a block.",
        "",
    ]
    rows = [
        (
            *(launch["capability"], launch["dtype"], launch["product"], launch["kernel"], launch["instruction"]),
            *(str(launch["buffers"]), str(launch["registers"]), str(launch["local_bytes"])),
            f"{launch['shared_bytes'] / KIB:.1f} of {SHARED_MEMORY[launch['capability']] // KIB}",
        )
        for launch in results["launches"]
    ]
    header = (
        "for",
        "dtype",
        "product",
        "kernel",
        "instruction",
        "buffers",
        "registers",
        "local memory",
        "shared memory",
    )
    lines += table(header, rows, "lllllrrrr")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    capabilities: list[str] = setting(["8.0", "9.0", "10.0"], "compute capabilities", choices=tuple(SHARED_MEMORY))
    dtypes: list[str] = setting(list(DTYPES), "of the products", choices=DTYPES)
    date: str = setting(datetime.date.today().isoformat(), "to write into the results")
    output: Path = setting(Path("runs/benchmarks"), "folder of results")


@command
def main(argv: list[str] | None = None) -> dict[str, Any]:
    settings = parse(KernelSettings, __doc__.splitlines()[0], argv)
    check_folder("output", settings.output)
    backend = megablocks.megablocks_backend()
    if backend.kernels is None:
        raise InputError("No source of MegaBlocks' kernels works here. `pip install stanford-stk triton` is enough.")
    if backend.interpreted:
        raise InputError("TRITON_INTERPRET is set, and Triton's interpreter compiles nothing. Unset it.")
    launches = []
    for capability in settings.capabilities:
        for dtype in settings.dtypes:
            launches += compile_launches(capability, dtype)
            print(f"{capability} {dtype}: compiled")
    results = {
        "benchmark": "kernels",
        "date": settings.date,
        "source": f"{backend.source} {backend.version}",
        "versions": {"torch": torch.__version__, "triton": sys.modules["triton"].__version__},
        "launches": [asdict(launch) for launch in launches],
    }
    settings.output.mkdir(parents=True, exist_ok=True)
    (settings.output / "kernels.json").write_text(json.dumps(results, indent=1) + "\n")
    (settings.output / "kernels.md").write_text(markdown(results))
    print(f"\n{markdown(results)}")
    if too_large := [launch for launch in launches if not launch.fits]:
        sys.exit("\n".join(f"does not fit into shared memory: {launch}" for launch in too_large))
    return results


if __name__ == "__main__":
    main()
