import os


# No test may reach a hub; set before anything imports huggingface_hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import setuptools  # noqa: F401  torch's compiler imports it, which fails after somebody has imported distutils
import torch
from recipe import openmp  # noqa: F401  the examples' own, before torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging


# Triton reads it once, when kernels are defined; without a GPU its compiler has no use in any test.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import modeling_coe  # noqa: F401  registers the Auto classes


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
    """One token per byte-level character."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {character: 3 + i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:96])}
    byte_level = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=byte_level, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def reference_folder() -> Path:
    if not REFERENCE.is_dir():
        pytest.skip("the official implementation's fixtures (../shared/fixtures/reference) are not there")
    return REFERENCE
