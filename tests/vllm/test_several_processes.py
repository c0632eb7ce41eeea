"""Two processes of vLLM generate what one does. Every iteration routes by sums over both: by partial ones it would
choose other experts."""

import pytest

from .helpers import assert_served_apart
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
    assert_served_apart(MODELS[name], tmp_path, several=True, **options)
