# Copyright 2026 The CoE Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Lets a model solve problems, and counts how many of its final answers are right."""

import torch
from corpus import Example
from tasks.question_answer import final_answer
from transformers import PreTrainedTokenizerBase

from modeling_coe import CoeForCausalLM


@torch.no_grad()
def solve(
    model: CoeForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> list[str]:
    """Greedy continuations of tokenised prompts, padded on the left, in batches."""
    solutions = []
    for start in range(0, len(prompts), 64):
        batch = tokenizer.pad({"input_ids": prompts[start : start + 64]}, return_tensors="pt").to(model.device)
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
