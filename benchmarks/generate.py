# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Times generation: reading a prompt (prefill), and one decode step with prompts of several lengths in the cache.

    python -m benchmarks.generate --size mid
    python -m benchmarks.generate --size paper --device cuda
    python -m benchmarks.generate --size paper --device cuda --tasks decode_b1_compiled --label compiled

As `generate` does, a forward pass computes the logits of the last position only, and decoding is greedy. A decode
figure is the mean of some consecutive steps; filling the cache is not part of it.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from benchmarks.measure import (
    CHAIN,
    Benchmark,
    BenchmarkSettings,
    Task,
    TimedCall,
    Work,
    forward_work,
    parse_settings,
    random_ids,
)
from modeling_coe import CoeConfig, int8_weight_only
from modeling_coe.command_line import command, setting
from modeling_coe.releases import CACHE


PREFILL = (4, 512)  # batch, length
DECODE = {"decode_b1": (1, 128), "decode_b8": (8, 128), "decode_b1_ctx1024": (1, 1024)}  # batch, context
DECODE_STEPS = 16
# As above, in CUDA graphs over a cache of fixed length.
COMPILED = {"decode_b1_compiled": DECODE["decode_b1"], "decode_b8_compiled": DECODE["decode_b8"]}


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


def step_work(bench: Benchmark, batch: int, context: int, steps: int) -> Callable[[CoeConfig], list[Work]]:
    """The work of one of the greedy steps after `context` tokens, with a cache of its average length."""
    mean_context = context + (steps - 1) / 2
    return lambda config: [forward_work(config, batch, 1, mean_context, logits=1, itemsize=bench.itemsize)]


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

    return Task(name, batch, step_work(bench, batch, context, steps), start)


def compiled_decode_task(bench: Benchmark, name: str) -> Task:
    """Greedy steps with a cache of fixed length and a compiled forward pass: on a GPU, one CUDA graph a step. On the
    CPU nothing is captured, nor generated: that only tries the code."""
    batch, context = COMPILED[name]
    steps = 2 if bench.settings.quick else DECODE_STEPS
    ids = random_ids(bench.settings, batch, context)
    on_gpu = bench.settings.device.startswith("cuda")
    options = {"mode": "reduce-overhead"} if on_gpu else {"backend": "aot_eager"}

    @torch.no_grad()
    def start(model: PreTrainedModel) -> TimedCall:
        model.eval().set_experts_implementation("grouped_mm")
        cache = StaticCache(config=model.config, max_cache_len=context + steps)
        prompt = model(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits
        forward = torch.compile(model.forward, fullgraph=True, **options)

        @torch.no_grad()
        def decode() -> None:
            token = prompt.argmax(dim=-1)
            for _ in range(steps):
                torch.compiler.cudagraph_mark_step_begin()
                output = forward(input_ids=token, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
                token = output.logits.argmax(dim=-1)

        def run() -> float:
            for layer in cache.layers:  # graphs read and write one place: it cannot be a copy
                layer.cumulative_length.fill_(context)
            return bench.clock(decode) / steps

        return run

    return Task(name, batch, step_work(bench, batch, context, steps), start)


def in_int8(model: PreTrainedModel) -> PreTrainedModel:
    """The model with 8-bit weights, see `modeling_coe.int8_weight_only`."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = int8_weight_only()
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=model.dtype, device_map=model.device
        )


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    _argument_group_name: ClassVar[str] = "generation"
    tasks: list[str] = setting(["prefill", *DECODE], "what to measure", choices=("prefill", *DECODE, *COMPILED))
    int8: bool = setting(False, "8-bit weights in our model")


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(GenerateOptions, BenchmarkSettings):
    pass


@command
def main(argv: list[str] | None = None) -> dict[str, Any]:
    settings = parse_settings(GenerateSettings, __doc__.splitlines()[0], argv)
    bench = Benchmark("generate", settings)
    tasks = []
    for name in settings.tasks:
        if name == "prefill":
            tasks.append(prefill_task(bench))
        else:
            tasks.append((compiled_decode_task if name in COMPILED else decode_task)(bench, name))
    if settings.int8:
        bench.compare_models(tasks, variants=[CHAIN], prepare=in_int8)
    else:
        bench.compare_models(tasks)
    return bench.write()


if __name__ == "__main__":
    main()
