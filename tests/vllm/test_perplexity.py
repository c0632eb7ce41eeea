"""Perplexity of trained weights in bfloat16, by vLLM and by transformers."""

import json
import math
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..helpers import ROOT
from .helpers import engine


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A chain that has learnt something of arithmetic, in less than a minute."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = "--steps 200 --eval-steps 200 --save-steps 200 --num-samples 0"
    command = [sys.executable, "examples/pretrain.py", "--output-dir", str(folder), *options.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return folder / "model"


def losses_of_transformers(folder: Path, texts: list[list[int]]) -> list[float]:
    """Negative log-likelihood of every token but the first."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    losses = []
    with torch.no_grad():
        for text in texts:
            logprobs = model(torch.tensor([text])).logits[0, :-1].float().log_softmax(dim=-1)
            losses += (-logprobs[range(len(text) - 1), text[1:]]).tolist()
    return losses


def losses_of_vllm(folder: Path, texts: list[list[int]]) -> list[float]:
    """The same of all texts in batches."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    with engine(folder, dtype="bfloat16") as llm:
        requests = llm.generate([{"prompt_token_ids": text} for text in texts], sampling, use_tqdm=False)
    return [
        -step[token].logprob
        for request, text in zip(requests, texts, strict=True)
        for step, token in zip(request.prompt_logprobs[1:], text[1:], strict=True)
    ]


def test_perplexity_in_bfloat16(trained):
    from recipe.arithmetic import Problems

    tokenizer = AutoTokenizer.from_pretrained(trained)
    problems = islice(Problems(0, "numbers"), 64)
    texts = [tokenizer(f"{each.question}\n{each.answer}")["input_ids"] for each in problems]
    expected, actual = (
        math.exp(sum(losses) / len(losses))
        for losses in (losses_of_transformers(trained, texts), losses_of_vllm(trained, texts))
    )
    uniform = json.loads((trained / "config.json").read_text())["vocab_size"]
    assert expected < uniform / 10
    assert actual == pytest.approx(expected, rel=5e-3)
