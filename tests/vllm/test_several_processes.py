"""Two processes of vLLM generate what one does. Every iteration routes by sums over both: by partial ones it would
choose other experts."""

import json
import os
import subprocess
import sys

import pytest

from ..helpers import ROOT
from .test_generation import MODELS


TENSORS = {"tensor_parallel_size": 2}
CASES = {
    "tensors": ("inner", TENSORS),
    "tensors, shared experts apart": ("qwen2_moe, split", TENSORS),
    "experts": ("deepseek_v3, groups", TENSORS | {"enable_expert_parallel": True}),
    # Without compilation vLLM's CPU workers have no buffers for what the first stage sends.
    "stages": ("init, tied, other eps", {"pipeline_parallel_size": 2, "enforce_eager": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_generate_what_one_does(case, tmp_path):
    name, options = CASES[case]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    run = subprocess.run(
        [
            *(sys.executable, "-m", "tests.vllm.parallel_worker", str(tmp_path)),
            *(json.dumps(MODELS[name]), json.dumps(options)),
        ],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0 and "The tokens are equal." in run.stdout, run.stdout[-2000:] + run.stderr[-4000:]
