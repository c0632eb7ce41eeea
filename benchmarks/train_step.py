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
"""Times a training step, with and without the optimizer, and measures its peak memory.

    python benchmarks/train_step.py --size mid
    python benchmarks/train_step.py --size paper --device cuda

Both models are in training mode with their default configuration: Chain-of-Experts then adds its load-balancing loss
to the cross-entropy, and the native model has none to add, so the time of that loss is part of our figures.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch
from measure import (
    CHAIN,
    SIZES,
    Benchmark,
    Comparison,
    Run,
    Task,
    adamw_work,
    backward_and_forward,
    build,
    coe_config,
    forward_work,
    native_config,
    parse_arguments,
    random_ids,
    reason,
)
from transformers import PreTrainedModel


TASKS = ("train_step", "forward_backward", "peak_memory")


def training_step(model: PreTrainedModel, ids: torch.Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """Forward, loss and backward, and with an optimizer its step."""
    model(input_ids=ids, labels=ids).loss.backward()
    if optimizer is not None:
        optimizer.step()
    model.zero_grad(set_to_none=True)


def adamw(model: PreTrainedModel) -> torch.optim.AdamW:
    """The `Trainer`'s default optimizer."""
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def time_tasks(bench: Benchmark) -> None:
    """Times a step with the optimizer, and without."""
    batch, length = SIZES[bench.args.size].train
    ids = random_ids(bench.args, batch, length)

    def start(model: PreTrainedModel, optimizer: torch.optim.Optimizer | None) -> Run:
        model.train()
        return lambda: bench.clock(lambda: training_step(model, ids, optimizer))

    def work(config) -> list:
        return [backward_and_forward(forward_work(config, batch, length, 0, length, bench.itemsize))]

    tasks = [
        Task(
            "train_step",
            batch * length,
            lambda config: [*work(config), adamw_work(config, bench.itemsize)],
            lambda model: start(model, adamw(model)),
            training=True,
        ),
        Task("forward_backward", batch * length, work, lambda model: start(model, None), training=True),
    ]
    bench.compare_models([task for task in tasks if task.name in bench.args.tasks])


# ---- Peak memory ----------------------------------------------------------------------------------------------------


def status_bytes(field: str) -> int:
    """A memory field of this process, in bytes: `VmRSS`, resident now, or `VmHWM`, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field!r}.")


def peak_memory(args: argparse.Namespace, implementation: str, native: bool) -> tuple[int, int]:
    """Runs in a fresh process: the peak of a second training step, in bytes, above the memory before the model was
    built (weights, gradients, moments, activations) and above the memory with the model (all but the weights)."""
    torch.set_num_threads(args.threads)
    cuda = args.device.startswith("cuda")

    def resident() -> int:
        return torch.cuda.memory_allocated() if cuda else status_bytes("VmRSS")

    # What the first step of a process loads and sets up, libraries and their workspaces, is no part of a model.
    tiny = argparse.Namespace(**vars(args) | {"size": "tiny"})
    model = build(coe_config("tiny") if not native else native_config("tiny"), tiny).train()
    training_step(model, random_ids(tiny, 1, 8), adamw(model))
    del model

    before = resident()
    model = build(native_config(args.size) if native else coe_config(args.size), args).train()
    model.set_experts_implementation(implementation)
    built, optimizer, ids = resident(), adamw(model), random_ids(args, *SIZES[args.size].train)
    training_step(model, ids, optimizer)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    training_step(model, ids, optimizer)
    peak = torch.cuda.max_memory_allocated() if cuda else status_bytes("VmHWM")
    return peak - before, peak - built


def measure_memory(bench: Benchmark) -> None:
    """Compares peaks, with a fresh process for every sample, ours and native's in turn."""
    if not bench.args.device.startswith("cuda") and not os.access("/proc/self/clear_refs", os.W_OK):
        bench.skipped["peak_memory"] = "needs Linux's /proc, or a CUDA device"
        return
    if bench.args.device.startswith("cuda"):
        torch.cuda.empty_cache()
    # Every freed block above 64 KiB goes back at once, so that resident memory is what is in use, and not what
    # malloc keeps for later. It is read when a process starts.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"

    def sample(implementation: str, native: bool) -> tuple[int, int]:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            return process.submit(peak_memory, bench.args, implementation, native).result()

    timed = bench.native_samples.get("train_step", {"grouped_mm": [0.0]})
    best = min(timed, key=lambda name: sorted(timed[name])[len(timed[name]) // 2])
    batch, length = SIZES[bench.args.size].train
    for name in bench.implementations:
        why = bench.refusal(name, coe_config(bench.args.size), batch * length, training=True)
        if why is None:
            try:
                samples = [(sample(name, False), sample(best, True)) for _ in range(1 if bench.args.quick else 3)]
            except (RuntimeError, BrokenProcessPool) as error:
                why = reason(error)
        if why is not None:
            bench.skipped[f"peak_memory, {CHAIN}, {name}"] = why
            continue
        for index, task in enumerate(("peak_memory", "peak_memory_above_weights")):
            ours, native = ([float(pair[side][index]) for pair in samples] for side in (0, 1))
            bench.add(Comparison(task, CHAIN, name, best, ours, native, "bytes"))


def main(argv: list[str] | None = None) -> dict:
    tasks = {"nargs": "+", "choices": TASKS, "default": TASKS, "help": "what to measure"}
    args = parse_arguments(__doc__.splitlines()[0], argv, tasks=tasks)
    bench = Benchmark("train_step", args)
    if set(args.tasks) - {"peak_memory"}:
        time_tasks(bench)
    if "peak_memory" in args.tasks:
        measure_memory(bench)
    return bench.write()


if __name__ == "__main__":
    main()
