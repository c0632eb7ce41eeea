"""Tiny chains, what transformers generates with them, and engines of vLLM."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from modeling_coe import CoeConfig, CoeForCausalLM

from ..helpers import ROOT


CONTEXT = 256
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 32}
PROMPT_LENGTHS = (1, 3, 7, 12, 20, 33, 48, 90)
NEW_TOKENS = 32


@dataclass
class Generation:
    """Greedy tokens of one prompt, the log-probability of each, and those of all tokens at every step."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    all_logprobs: torch.Tensor


def build_model(seed: int = 0, **fields) -> CoeForCausalLM:
    """A small chain whose routing, biases, norms and scales all matter. Sizes are those that vLLM's kernels take."""
    base = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.15,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    sizes = GROUPED if fields.get("backbone", "deepseek_v2") not in ("deepseek_v2", "deepseek_v3") else LATENT
    model = CoeForCausalLM(CoeConfig(**base | sizes | fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name or "iteration_scale" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.normal_(std=0.1)
    return model


def build_prompts(
    vocab_size: int = 512, lengths: tuple[int, ...] = PROMPT_LENGTHS, prefix: int = 0
) -> list[list[int]]:
    """Prompts of different lengths, which begin with the same `prefix` tokens."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(1, vocab_size, (prefix,), generator=generator).tolist()
    return [start + torch.randint(1, vocab_size, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def generate(model: CoeForCausalLM, prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[Generation]:
    """What transformers generates greedily, one prompt at a time."""
    generations = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = output.sequences[0, len(prompt) :].tolist()
        all_logprobs = torch.cat(output.logits).float().log_softmax(dim=-1)
        logprobs = all_logprobs[range(len(tokens)), tokens].tolist()
        generations.append(Generation(prompt, tokens, logprobs, all_logprobs))
    return generations


@contextmanager
def engine(folder: str | Path, **options) -> Iterator["LLM"]:  # noqa: F821
    """An engine of vLLM that takes tokens and not text."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": CONTEXT, "disable_log_stats": False}
    llm = None
    try:
        llm = LLM(str(folder), skip_tokenizer_init=True, **defaults | options)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def serve(llm: "LLM", prompts: list[list[int]], **options) -> list[tuple[list[int], list[float]]]:  # noqa: F821
    """Greedy tokens of each prompt and their log-probabilities, all prompts in one batch."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0, detokenize=False)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    results = []
    for request in llm.generate(requests, sampling, use_tqdm=False, **options):
        (output,) = request.outputs
        tokens = list(output.token_ids)
        results.append((tokens, [step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True)]))
    return results


def count(llm: "LLM", name: str) -> float:  # noqa: F821
    """Value of a counter of vLLM's metrics."""
    return next(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


def assert_same_generations(results: list[tuple[list[int], list[float]]], expected: list[Generation]) -> None:
    """Asserts equal tokens, and log-probabilities within 1e-2, on average within 1e-3. Only a draw may be decided
    otherwise: two tokens that transformers gives the same probability up to rounding. There the comparison ends."""
    differences, draws = [], 0
    for (tokens, logprobs), generation in zip(results, expected, strict=True):
        assert len(tokens) == len(generation.tokens)
        for step, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            choices = generation.all_logprobs[step]
            differences.append(abs(logprob - choices[token].item()))
            if token != generation.tokens[step]:
                assert choices.max() - choices[token] < 1e-4, (
                    f"Token {step} after a prompt of {len(generation.prompt)} is {token}, not "
                    f"{generation.tokens[step]}, which is more probable by {choices.max() - choices[token]} (log)."
                )
                draws += 1
                break
    assert draws <= 1, f"{draws} of {len(expected)} prompts were draws"
    assert max(differences) <= 1e-2 and sum(differences) / len(differences) <= 1e-3


def assert_served_apart(
    fields: dict, folder: Path, saving: dict | None = None, several: bool = False, **options
) -> None:
    """Asserts the same of an engine in a process of its own: one with `several` workers, or one that compiles, whose
    hooks would outlive it.

    Args:
        fields: Of the model.
        folder: Where it is saved, with the options `saving`.
        several: Whether the engine has workers in further processes.
        options: Of the engine.
    """
    arguments = map(json.dumps, (fields, options, saving or {}))
    environment = {
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(several)),
        "PYTHONPATH": str(ROOT),
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.vllm.engine_worker", str(folder), *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0 and "The tokens are equal." in run.stdout, run.stdout[-2000:] + run.stderr[-4000:]
