"""What tests with vLLM share. They skip where it is not installed."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from ..helpers import save_chain


# Read when an engine starts. On a CPU threads are those of the environment, caches are small, and the engine runs in
# the tests' own process unless a test asks for several.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.fixture(scope="session", autouse=True)
def needs_vllm():
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")


@pytest.fixture(scope="session")
def chain_folder(tmp_path_factory) -> Path:
    """A chain of two iterations with random weights, and a tokenizer of characters."""
    folder = tmp_path_factory.mktemp("chain")
    save_chain(folder, 256)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            # vLLM looks at all that the imported modules hold, deprecated names of torch among it.
            item.add_marker(pytest.mark.filterwarnings("ignore::FutureWarning"))
