# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Times generation: reading a prompt (prefill), and one decode step with prompts of several lengths in the cache.

    python -m benchmarks.generate --size mid
    python -m benchmarks.generate --size paper --device cuda

As `generate` does, a forward pass computes the logits of the last position only, and decoding is greedy. A decode
figure is the mean of some consecutive steps; filling the cache is not part of it.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import DynamicCache, PreTrainedModel

from benchmarks.measure import Benchmark, BenchmarkSettings, Task, TimedCall, forward_work, parse_settings, random_ids
from modeling_coe.command_line import command, setting
from modeling_coe.releases import CACHE


PREFILL = (4, 512)  # batch, length
DECODE = {"decode_b1": (1, 128), "decode_b8": (8, 128), "decode_b1_ctx1024": (1, 1024)}  # batch, context
DECODE_STEPS = 16


def prefill_task(bench: Benchmark) -> Task:
    """A forward pass over whole prompts, into an empty cache."""
    batch, length = PREFILL
    ids = random_ids(bench.settings, batch, length)

    def start(model: PreTrainedModel) -> TimedCall:
        model.eval()

        @torch.no_grad()
        def prefill() -> None:
            model(input_ids=ids, **{CACHE: DynamicCache(config=model.config)}, use_cache=True, logits_to_keep=1)

        return lambda: bench.clock(prefill)

    return Task(
        "prefill",
        batch * length,
        lambda config: [forward_work(config, batch, length, context=0, logits=1, itemsize=bench.itemsize)],
        start,
    )


def decode_task(bench: Benchmark, name: str) -> Task:
    """Greedy steps after a prompt that is in the cache."""
    batch, context = DECODE[name]
    steps = 2 if bench.settings.quick else DECODE_STEPS
    ids = random_ids(bench.settings, batch, context)

    @torch.no_grad()
    def start(model: PreTrainedModel) -> TimedCall:
        model.eval().set_experts_implementation("grouped_mm")  # what decodes best may not be able to read a prompt
        prompt_cache = DynamicCache(config=model.config)
        logits = model(input_ids=ids, **{CACHE: prompt_cache}, use_cache=True, logits_to_keep=1).logits

        @torch.no_grad()
        def decode(cache: DynamicCache, token: torch.Tensor) -> None:
            for _ in range(steps):
                output = model(input_ids=token, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
                token = output.logits.argmax(dim=-1)

        def run() -> float:
            cache = copy.deepcopy(prompt_cache)
            return bench.clock(lambda: decode(cache, logits.argmax(dim=-1))) / steps

        return run

    mean_context = context + (steps - 1) / 2
    return Task(
        name,
        batch,
        lambda config: [forward_work(config, batch, 1, mean_context, logits=1, itemsize=bench.itemsize)],
        start,
    )


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    _argument_group_name: ClassVar[str] = "generation"
    tasks: list[str] = setting(["prefill", *DECODE], "what to measure", choices=("prefill", *DECODE))


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(GenerateOptions, BenchmarkSettings):
    pass


@command
def main(argv: list[str] | None = None) -> dict[str, Any]:
    settings = parse_settings(GenerateSettings, __doc__.splitlines()[0], argv)
    bench = Benchmark("generate", settings)
    bench.compare_models(
        [prefill_task(bench) if name == "prefill" else decode_task(bench, name) for name in settings.tasks]
    )
    return bench.write()


if __name__ == "__main__":
    main()
