# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Times the routed experts of one layer, over numbers of tokens, numbers of experts and expert widths.

    python -m benchmarks.experts --size mid
    python -m benchmarks.experts --size mid --tokens 1 1024 --experts 64 --widths 352 704 1408
    python -m benchmarks.experts --size paper --device cuda --rows-per-expert 8 64 512

A chain calls one set of experts C times, each time on the sum of the last input and output and with a routing of its
own; the native experts are called once with C times as many experts per token. The hidden size is that of `--size`.
Routers are no part of it: which experts a token meets is random, and every choice is equally likely. Repeated calls
meet the same experts, whose weights may then come from the caches.
"""

import math
import statistics
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from benchmarks.measure import (
    CHAIN,
    SIZES,
    VARIANTS,
    Benchmark,
    BenchmarkSettings,
    Comparison,
    Task,
    TimedCall,
    Work,
    distinct_experts,
    forward_and_backward,
    parse_settings,
)
from modeling_coe import CoeConfig
from modeling_coe.command_line import command, setting
from modeling_coe.experts import sharing_weights


LEAST_SECONDS = 0.05  # of one sample; shorter calls are repeated
DIRECTIONS = ("forward", "forward_backward")


def experts_work(config: CoeConfig, tokens: int, itemsize: int) -> Work:
    """Work of the routed experts of one layer, over all iterations."""
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    flops = 2 * tokens * config.inner_iter * config.num_experts_per_tok * expert
    return Work(flops, distinct_experts(config, tokens) * expert * itemsize)


def start(bench: Benchmark, model: PreTrainedModel, tokens: int, backward: bool) -> TimedCall:
    """A run of the experts in the only layer of a model."""
    config, experts = model.config, model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(bench.settings.seed)
    hidden_states, gradient = (
        torch.randn(tokens, config.hidden_size, generator=generator).to(model.device, model.dtype) for _ in range(2)
    )
    hidden_states.requires_grad_(backward)
    routings = []
    for _ in range(getattr(config, "inner_iter", 1)):
        scores = torch.randn(tokens, config.n_routed_experts, generator=generator).softmax(dim=-1)
        weights, indices = scores.topk(config.num_experts_per_tok, dim=-1, sorted=False)
        routings.append((indices.to(model.device), weights.to(model.device)))

    def call() -> None:
        with torch.set_grad_enabled(backward), sharing_weights(experts):
            x = hidden_states
            for indices, weights in routings:
                x = x + experts(x, indices, weights)
        if backward:
            x.backward(gradient)
            experts.zero_grad(set_to_none=True)
            hidden_states.grad = None

    def run() -> float:
        first = bench.clock(call)
        repeats = 1 if bench.settings.quick else math.ceil(LEAST_SECONDS / max(first, 1e-6))
        return bench.clock(lambda: [call() for _ in range(repeats)]) / repeats

    return run


def experts_task(bench: Benchmark, direction: str, tokens: int, num_experts: int, width: int) -> Task:
    """One point of the grid, forward, or forward with backward."""
    training = direction != "forward"

    def work(config: CoeConfig) -> list[Work]:
        forward = experts_work(config, tokens, bench.itemsize)
        return [forward_and_backward(forward) if training else forward]

    name = f"{direction} T={tokens} N={num_experts} I={width}"
    return Task(name, tokens, work, lambda model: start(bench, model, tokens, training), training)


def tokens_for(rows_per_expert: int, num_experts: int) -> int:
    """Tokens of a call of the chain that give every expert so many rows on average."""
    return math.ceil(rows_per_expert * num_experts / VARIANTS[CHAIN]["num_experts_per_tok"])


def least_rows(comparisons: list[Comparison], tasks: dict[int, str]) -> int | None:
    """The least number of rows per expert from which `megablocks` is the fastest implementation in all that were
    measured, or `None`; `tasks` are the names of the tasks by rows per expert."""
    least = None
    for rows, task in sorted(tasks.items(), reverse=True):
        times = {each.implementation: statistics.median(each.ours) for each in comparisons if each.task == task}
        if min(times, key=times.get, default=None) != "megablocks":
            break
        least = rows
    return least


@dataclass(frozen=True, kw_only=True)
class ExpertsOptions:
    _argument_group_name: ClassVar[str] = "experts"
    tokens: list[int] = setting([1, 16, 1024], "in a call")
    rows_per_expert: list[int] = setting(
        [], "in a call, instead of tokens; then tells from how many on blocks are faster"
    )
    experts: list[int] = setting([16, 64], "routed experts")
    widths: list[int] = setting([], "of one expert; that of the size if not given")
    directions: list[str] = setting(list(DIRECTIONS), "what to measure", choices=DIRECTIONS)


@dataclass(frozen=True, kw_only=True)
class ExpertsSettings(ExpertsOptions, BenchmarkSettings):
    pass


@command
def main(argv: list[str] | None = None) -> dict[str, Any]:
    settings = parse_settings(ExpertsSettings, __doc__.splitlines()[0], argv)
    settings = replace(settings, widths=settings.widths or [SIZES[settings.size].fields["moe_intermediate_size"]])
    bench = Benchmark("experts", settings)
    for num_experts, width in product(settings.experts, settings.widths):
        rows = {each: tokens_for(each, num_experts) for each in settings.rows_per_expert}
        tasks = {
            (direction, tokens): experts_task(bench, direction, tokens, num_experts, width)
            for direction, tokens in product(settings.directions, rows.values() or settings.tokens)
        }
        overrides = {"n_routed_experts": num_experts, "moe_intermediate_size": width}
        bench.compare_models(list(tasks.values()), variants=[CHAIN], num_hidden_layers=1, vocab_size=64, **overrides)
        for direction in settings.directions if rows else ():
            names = {each: tasks[direction, tokens].name for each, tokens in rows.items()}
            bench.notes.append(
                f"{direction}, {num_experts} experts of width {width}: `megablocks` is the fastest from "
                f"{least_rows(bench.comparisons, names)} rows per expert on."
            )
    return bench.write()


if __name__ == "__main__":
    main()
