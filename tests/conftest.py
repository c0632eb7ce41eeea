import os


# No test may reach a hub; set before anything imports huggingface_hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import setuptools  # noqa: F401  torch's compiler imports it, which fails after somebody has imported distutils
import torch
from recipe import openmp  # noqa: F401  the examples' own, before torch
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging


# Triton reads it once, when kernels are defined; without a GPU its compiler has no use in any test.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import modeling_coe  # noqa: F401  registers the Auto classes

from .helpers import byte_tokenizer


REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "reference"

logging.disable_progress_bar()
if "PYTEST_XDIST_WORKER" in os.environ:  # one worker a core
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def own_compiler_cache(tmp_path_factory):
    """What another run compiled, in the folder that all share, may be for another processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def reference_folder() -> Path:
    if not REFERENCE.is_dir():
        pytest.skip("the official implementation's fixtures (../shared/fixtures/reference) are not there")
    return REFERENCE
