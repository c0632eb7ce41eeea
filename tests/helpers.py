"""Tiny models that the tests share."""

import gc
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version

from modeling_coe import CoeConfig, CoeForCausalLM
from modeling_coe.releases import CHECKPOINTING


ROOT = Path(__file__).resolve().parents[1]

EXPERTS_BACKENDS = ("eager", "batched_mm", "grouped_mm", "torch_grouped_mm")

TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    # Large enough that routing differs between tokens and iterations.
    "initializer_range": 0.2,
}

requires_compiled_grouped_mm = pytest.mark.skipif(
    not hasattr(torch.ops.transformers, "grouped_mm_fallback_backward"),
    reason="before 5.23, transformers' grouped_mm cannot be compiled for training on the CPU",
)

# The beginning of a program: however this project is installed, its packages cannot be imported.
WITHOUT_PACKAGE = """
import sys

class NotInstalled:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("configuration_coe", "modeling_coe", "model_cards", "conversion"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled)
"""


def tiny_config(**overrides) -> CoeConfig:
    return CoeConfig(**{**TINY, **overrides})


def tiny_model(seed: int = 0, **overrides) -> CoeForCausalLM:
    torch.manual_seed(seed)
    return CoeForCausalLM(tiny_config(**overrides)).eval()


def save_chain(folder: Path, length: int) -> None:
    """A chain of two iterations with random weights for `length` tokens, and a tokenizer of characters."""
    tiny_model(inner_iter=2, max_position_embeddings=length, bos_token_id=1, eos_token_id=2).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def save_llama(folder: Path) -> None:
    """A dense model with random weights, and a tokenizer of characters with a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    config = LlamaConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def random_ids(*shape: int, vocab_size: int = TINY["vocab_size"]) -> torch.Tensor:
    """Token ids without the special ones (0 to 2)."""
    return torch.randint(3, vocab_size, shape)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte-level character."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {character: 3 + i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:96])}
    byte_level = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=byte_level, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def enable_checkpointing(model: torch.nn.Module, options: dict | None = None) -> None:
    """`activation_checkpointing_enable` under the name that it has in this release of transformers."""
    getattr(model, f"{CHECKPOINTING}_enable")(options)


def peft_of_transformers() -> ModuleType:
    """PEFT, for a test of what transformers itself builds on it: `model.add_adapter`, and what saves such a model.
    Skips where PEFT is not installed, or transformers refuses the installed release."""
    peft = pytest.importorskip("peft")
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(f"transformers refuses PEFT {peft.__version__}: {error}")
    return peft


def assert_equal_up_to_rounding(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Logits or gradients of one function, computed twice in float32: kernels, threads, shapes and places in memory
    may differ.

    Rounding moves a logit by some 1e-5 of the largest; another weight, token or expert moves one by 1e-2 or more.
    """
    torch.testing.assert_close(actual, expected, atol=1e-4 * max(1.0, expected.abs().max().item()), rtol=0)


def torchrun(module: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    """Runs a module of the tests in two processes of one thread each, on loopback."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *("-m", module, *map(str, arguments)),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def without_torchao(stderr: str) -> str:
    """What a process printed but for the two things that torchao 0.18 says when transformers imports it: libraries of
    its own that do not load, and enumerations that torch knows by now. Everything where it is not installed."""
    if importlib.util.find_spec("torchao") is None:
        return stderr
    its_own = re.compile(r"Failed to load \S*/torchao/|W\d{4} .*\btorch/utils/_pytree\.py:\d+\] <enum ")
    return "".join(line for line in stderr.splitlines(keepends=True) if not its_own.match(line))


def run_isolated(script: str, folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    """Runs a program outside the project, which it cannot import, with a folder of its own for remote code."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE + script, *map(str, arguments)],
        cwd=folder,
        env={**environment, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def leave_process_group() -> None:
    """Ends a worker of `torchrun`, which must have let go of its `Trainer`: a `DistributedDataParallel` that outlives
    the process group joins the group's thread with the GIL held, and hangs where that thread frees a tensor."""
    gc.collect()
    assert not any(type(thing) is DistributedDataParallel for thing in gc.get_objects())
    dist.barrier()
    dist.destroy_process_group()
