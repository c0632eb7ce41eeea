"""`benchmarks/kernels.py`: what Triton makes of MegaBlocks' kernels for GPUs that are not there."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.kernels import DTYPES, SHARED_MEMORY, Launch, markdown

from .helpers import ROOT, without_torchao


pytest.importorskip("stk", reason="stanford-stk is not installed")

CAPABILITIES = ("8.0", "9.0", "10.0")
INSTRUCTIONS = {"8.0": "mma.sync", "9.0": "wgmma.mma_async", "10.0": "tcgen05.mma"}
PRODUCTS = {"forward": "sdd_kernel", "input gradient": "dsd_kernel", "weight gradient": "dsd_kernel"}


def run(tmp_path, *options: str) -> subprocess.CompletedProcess:
    """In a process without Triton's interpreter."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", "--output", str(tmp_path), *options],
        cwd=ROOT,
        env=inherited | {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_every_kernel_compiles_for_every_gpu(tmp_path):
    result = run(tmp_path, "--capabilities", *CAPABILITIES)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "kernels.json").read_text())
    assert (tmp_path / "kernels.md").read_text() == markdown(results)
    launches = [Launch(**launch) for launch in results["launches"]]
    # One of each: launches do not depend on the shapes, or there would be more to compile and to look at.
    expected = [(c, dtype, product) for c in CAPABILITIES for dtype in DTYPES for product in PRODUCTS]
    assert sorted((each.capability, each.dtype, each.product) for each in launches) == sorted(expected)
    for each in launches:
        assert each.fits and each.kernel == PRODUCTS[each.product], each
        assert each.asynchronous and 0 < each.registers <= 255, each
        if each.dtype == "float32":
            assert each.instruction == "fma.rn.f32", f"rounds to TF32: {each}"
            continue
        assert each.instruction == INSTRUCTIONS[each.capability], f"no tensor cores: {each}"
        if each.dtype != "tf32":
            assert each.local_bytes == 0, f"spills: {each}"
        if each.kernel == "sdd_kernel":
            assert each.buffers >= 3, f"does not read ahead: {each}"


def test_too_much_shared_memory_is_told():
    launch = Launch("sdd_kernel", "forward", "bfloat16", "8.0", "mma.sync", 4, 4, True, 246, 0, 163 * 1024)
    assert launch.fits and SHARED_MEMORY["8.0"] == 163 * 1024
    assert not Launch(**vars(launch) | {"shared_bytes": 163 * 1024 + 1}).fits
    assert Launch(**vars(launch) | {"capability": "9.0", "shared_bytes": 227 * 1024}).fits


def test_the_interpreter_compiles_nothing(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", "--output", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1
    assert without_torchao(result.stderr).startswith("error: TRITON_INTERPRET is set")
