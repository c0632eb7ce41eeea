# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Lets a model solve problems, and counts how many of its final answers are right."""

import torch
from tasks.question_answer import final_answer
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .corpus import Example


BATCH_SIZE = 64


@torch.no_grad()
def solve(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> list[str]:
    """Greedy continuations of tokenised prompts, padded on the left, in batches."""
    solutions = []
    for start in tqdm(range(0, len(prompts), BATCH_SIZE), desc="Solving", disable=None):
        part = prompts[start : start + BATCH_SIZE]
        batch = tokenizer.pad({"input_ids": part}, return_tensors="pt").to(model.device)
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        solutions += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return solutions


def exact_match(examples: list[Example], solutions: list[str]) -> float | None:
    """Share of the solutions with the right final answer, or `None` where the data mark no final answers."""
    expected = [final_answer(example.answer) for example in examples]
    if None in expected:
        return None
    return sum(final_answer(text) == answer for text, answer in zip(solutions, expected, strict=True)) / len(expected)
