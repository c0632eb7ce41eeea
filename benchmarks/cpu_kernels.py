# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Times a layer's experts on the CPU: the default against every other implementation, and its kernels one by one.

    python -m benchmarks.cpu_kernels
    python -m benchmarks.cpu_kernels --dtype bfloat16 --hidden-sizes 512 --rows 1 64 --iterations 2

The default should be the fastest of what can run, wherever it runs: ratios are its time over that of another
implementation of the same experts, on the same tokens and routing, and above 1.05 it is not. Both directions, a chain
of `--iterations` calls that share their weights; an expert is 11/8 as wide as the hidden states. Below the ratios
are the rates of the kernels that the default chooses from, see `python -m modeling_coe.cpu_kernels`.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
import transformers

from benchmarks.measure import SLOW, Clock, TimedCall, alternate, spread
from modeling_coe import CoeConfig, cpu_kernels
from modeling_coe.command_line import command, parse, setting
from modeling_coe.experts import sharing_weights
from modeling_coe.modeling_coe import CoeExperts


OTHERS = ("torch_grouped_mm", "eager", "batched_mm")
# `batched_mm` copies the weights of every choice: above this it would only exhaust the memory.
MOST_COPIED_BYTES = 2**29


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    hidden_sizes: list[int] = setting([64, 256, 512], "of the layers")
    rows: list[int] = setting([1, 8, 65, 260], "per expert")
    experts: int = setting(63, "routed experts")
    top_k: int = setting(4, "experts per token")
    iterations: int = setting(1, "calls that share their weights")
    dtype: str = setting("float32", "of weights", choices=("float32", "bfloat16"))
    threads: int = setting(1, "of torch")
    pairs: int = setting(9, "of runs, the default's and another's, for one ratio")
    seconds: float = setting(0.02, "of one sample; shorter calls are repeated")


def layer(hidden_size: int, settings: KernelSettings) -> CoeExperts:
    """Experts with random weights; `_experts_implementation` of their configuration says what computes them."""
    config = CoeConfig(
        hidden_size=hidden_size,
        moe_intermediate_size=hidden_size * 11 // 8,
        n_routed_experts=settings.experts,
        num_experts_per_tok=settings.top_k,
        inner_iter=settings.iterations,
        num_attention_heads=1,
        vocab_size=8,
    )
    config._experts_implementation = "grouped_mm"
    experts = CoeExperts(config).to(getattr(torch, settings.dtype))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return experts


def calls(experts: CoeExperts, rows: int, backward: bool, settings: KernelSettings) -> Callable[[str], None]:
    """What calls the experts by the implementation of a name, with `rows` rows per expert on average."""
    tokens, dtype = max(1, rows * settings.experts // settings.top_k), experts.down_proj.dtype
    hidden_states, gradient = (torch.randn(tokens, experts.hidden_dim).to(dtype) for _ in range(2))
    hidden_states.requires_grad_(backward)
    routings = []
    for _ in range(settings.iterations):
        weights, indices = torch.randn(tokens, settings.experts).softmax(dim=-1).topk(settings.top_k, dim=-1)
        routings.append((indices, weights))

    def call(name: str) -> None:
        experts.config._experts_implementation = name
        with torch.set_grad_enabled(backward), sharing_weights(experts):
            x = hidden_states
            for routing in routings:
                x = x + experts(x, *routing)
        if backward:
            x.backward(gradient)
            experts.zero_grad(set_to_none=True)
            hidden_states.grad = None

    return call


def ratios(experts: CoeExperts, rows: int, backward: bool, settings: KernelSettings) -> Iterator[tuple[str, float]]:
    """Other implementations and the median ratio of the default's time to theirs."""
    clock, call = Clock("cpu", settings.threads), calls(experts, rows, backward, settings)
    copied = rows * settings.experts * sum(parameter[0].nbytes for parameter in experts.parameters())

    def start(name: str) -> tuple[float, TimedCall]:
        first = clock(lambda: call(name))
        if first < 1.0:  # or else what only the first call does is a small part of it
            first = clock(lambda: call(name))
        repeats = max(1, math.ceil(settings.seconds / max(first, 1e-6)))
        return first, lambda: clock(lambda: [call(name) for _ in range(repeats)]) / repeats

    least, default = start("grouped_mm")
    for name in OTHERS:
        if name == "batched_mm" and copied > MOST_COPIED_BYTES:
            continue
        first, other = start(name)
        if first > SLOW * least:
            yield name, least / first  # as exact as need be
            continue
        samples = alternate({"grouped_mm": default, name: other}, settings.pairs)
        yield name, spread([ours / theirs for ours, theirs in zip(*samples.values(), strict=True)]).median


def rates(hidden_size: int, rows: int, settings: KernelSettings) -> Iterator[str]:
    """Lines of a table: GFLOP/s of every kernel in each product of a layer."""
    width, dtype = hidden_size * 11 // 8, getattr(torch, settings.dtype)
    for each in dict.fromkeys(cpu_kernels.layer_products(hidden_size, width, rows, dtype)):
        flops = cpu_kernels.example_flops(each)
        cells = [
            f"{flops / s / 1e9:.0f}" if isinstance(s, float) and s else "" for s in cpu_kernels.measure(each).values()
        ]
        yield f"| {each} | {' | '.join(cells)} | {cpu_kernels.kernel_for(each)} |"


@command
def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Prints both tables; returns the ratios by implementation of every row of the first."""
    settings = parse(KernelSettings, __doc__.splitlines()[0], argv)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    print(
        f"{cpu_kernels.processor()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {settings.dtype}, threads {settings.threads}, "
        f"experts {settings.experts}, iterations {settings.iterations}, "
        f"{cpu_kernels.VARIABLE} {os.environ.get(cpu_kernels.VARIABLE, 'auto')}\n"
    )
    print(f"| hidden size | rows per expert | direction | {' | '.join(OTHERS)} |")
    print("| ---: | ---: | --- |" + " ---: |" * len(OTHERS))
    results = []
    for hidden_size in settings.hidden_sizes:
        experts = layer(hidden_size, settings)
        for rows, backward in product(settings.rows, (False, True)):
            result = dict(ratios(experts, rows, backward, settings))
            results.append(result)
            cells = " | ".join(f"{result[name]:.2f}" if name in result else "" for name in OTHERS)
            direction = "forward and backward" if backward else "forward"
            print(f"| {hidden_size} | {rows} | {direction} | {cells} |", flush=True)
    print(f"\n| product, GFLOP/s | {' | '.join(cpu_kernels.KERNELS)} | chosen |")
    print("| --- |" + " ---: |" * len(cpu_kernels.KERNELS) + " --- |")
    for hidden_size, rows in product(settings.hidden_sizes, settings.rows):
        print("\n".join(rates(hidden_size, rows, settings)), flush=True)
    return results


if __name__ == "__main__":
    main()
