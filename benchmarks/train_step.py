# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Times a training step, with and without the optimizer, and measures its peak memory.

    python -m benchmarks.train_step --size mid
    python -m benchmarks.train_step --size paper --device cuda

Both models are in training mode with their default configuration: Chain-of-Experts then adds its load-balancing loss
to the cross-entropy, and the native model has none to add, so the time of that loss is part of our figures.
"""

import functools
import gc
import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from transformers import PreTrainedModel

from benchmarks.measure import (
    CHAIN,
    Benchmark,
    BenchmarkSettings,
    Comparison,
    Task,
    TimedCall,
    Work,
    adamw_work,
    build,
    coe_config,
    fastest,
    forward_and_backward,
    forward_work,
    native_config,
    parse_settings,
    random_ids,
    reason,
    refusal,
)
from modeling_coe import CoeConfig
from modeling_coe.command_line import command, setting


Measured = TypeVar("Measured")

TASKS = ("train_step", "forward_backward", "peak_memory")
COMPILED = "forward_backward_compiled"


def training_step(model: PreTrainedModel, ids: torch.Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """Forward, loss and backward, and with an optimizer its step."""
    model(input_ids=ids, labels=ids).loss.backward()
    if optimizer is not None:
        optimizer.step()
    model.zero_grad(set_to_none=True)


def adamw(model: PreTrainedModel) -> torch.optim.AdamW:
    """The `Trainer`'s default optimizer."""
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def compiled(model: PreTrainedModel) -> torch.nn.Module:
    """The model compiled by torch; on the CPU without generating code, which only tries whether it can be compiled."""
    return torch.compile(model, backend="inductor" if model.device.type == "cuda" else "aot_eager")


def time_tasks(bench: Benchmark) -> None:
    """Times a step with the optimizer, without, and compiled."""
    batch, length = bench.settings.train_shape
    ids = random_ids(bench.settings, batch, length)

    def start(model: PreTrainedModel, optimizer: torch.optim.Optimizer | None) -> TimedCall:
        model.train()
        return lambda: bench.clock(lambda: training_step(model, ids, optimizer))

    def gradients(config: CoeConfig) -> Work:
        return forward_and_backward(forward_work(config, batch, length, 0, length, bench.itemsize))

    tasks = [
        Task(
            "train_step",
            batch * length,
            lambda config: [gradients(config), adamw_work(config, bench.itemsize)],
            lambda model: start(model, adamw(model)),
            training=True,
        ),
        Task(
            "forward_backward",
            batch * length,
            lambda config: [gradients(config)],
            lambda model: start(model, None),
            training=True,
        ),
        Task(
            COMPILED,
            batch * length,
            lambda config: [gradients(config)],
            lambda model: start(compiled(model), None),
            training=True,
        ),
    ]
    if chosen := [task for task in tasks if task.name in bench.settings.tasks]:
        bench.compare_models(chosen)


# ---- Peak memory ----------------------------------------------------------------------------------------------------


def status_bytes(field: str) -> int:
    """A memory field of this process, in bytes: `VmRSS`, resident now, or `VmHWM`, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field!r}.")


def peak_memory(settings: BenchmarkSettings, new_model: Callable[[str], PreTrainedModel]) -> tuple[int, int]:
    """Bytes at the peak of a training step that is not the first, to be called in a fresh process.

    Args:
        settings (`BenchmarkSettings`): Of the run.
        new_model (`Callable`): Makes a model of a size, to be trained.

    Returns:
        What the peak is above the memory before the model was built (weights, gradients, moments, activations) and
        above the memory with the model (all that but the weights).
    """
    torch.set_num_threads(settings.threads)
    cuda = settings.device.startswith("cuda")

    def resident() -> int:
        gc.collect()
        return torch.cuda.memory_allocated(settings.device) if cuda else status_bytes("VmRSS")

    # What the first step of a process loads and sets up, libraries and their workspaces, is no part of a model.
    ids = random_ids(settings, *settings.train_shape)
    tiny = new_model("tiny")
    training_step(tiny, ids[:1, :8] % tiny.config.vocab_size, adamw(tiny))
    del tiny

    before = resident()
    model = new_model(settings.size)
    built = resident()
    optimizer = adamw(model)
    training_step(model, ids, optimizer)
    if cuda:
        torch.cuda.reset_peak_memory_stats(settings.device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    training_step(model, ids, optimizer)
    peak = torch.cuda.max_memory_allocated(settings.device) if cuda else status_bytes("VmHWM")
    return peak - before, peak - built


def in_fresh_process(function: Callable[..., Measured], *args: Any) -> Measured:
    """What a function returns in a process of its own, whose resident memory is what is in use: malloc gives every
    freed block above 64 KiB back at once."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # read when a process starts
    gc.collect()
    torch.cuda.empty_cache()  # the processes share the device with this one
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *args).result()


def memory_obstacle(settings: BenchmarkSettings) -> str | None:
    """Why [`peak_memory`] cannot be measured here, or `None`."""
    if settings.device == "cpu" and not os.access("/proc/self/clear_refs", os.W_OK):
        return "on the CPU it needs Linux's /proc/self/clear_refs"
    return None


def compared_model(settings: BenchmarkSettings, implementation: str, native: bool, size: str) -> PreTrainedModel:
    """A chain or the native model of a size, in training mode."""
    model = build(native_config(size) if native else coe_config(size), settings).train()
    model.set_experts_implementation(implementation)
    return model


def measure_memory(bench: Benchmark, native_implementation: str, repeats: int) -> None:
    """Compares peaks, with a fresh process for every sample, ours and native's in turn."""
    settings, config = bench.settings, coe_config(bench.settings.size)
    if (obstacle := memory_obstacle(settings)) is not None:
        bench.skipped["peak_memory"] = obstacle
        return

    def sample(implementation: str, native: bool) -> tuple[int, int]:
        new_model = functools.partial(compared_model, settings, implementation, native)
        return in_fresh_process(peak_memory, settings, new_model)

    tokens = math.prod(settings.train_shape)
    for name in bench.implementations:
        why = refusal(name, config, tokens, training=True, itemsize=bench.itemsize)
        try:
            pairs = [] if why else [(sample(name, False), sample(native_implementation, True)) for _ in range(repeats)]
        except RuntimeError as error:  # out of memory; a killed process is a `RuntimeError` too
            why = reason(error)
        if why is None and min(size for pair in pairs for sizes in pair for size in sizes) <= 0:
            why = "too small: Linux counts the pages of a process only roughly, the more so the more cores there are"
        if why is not None:
            bench.skipped[f"peak_memory, {CHAIN}, {name}"] = why
            continue
        for index, task in enumerate(("peak_memory", "peak_memory_above_weights")):
            ours, native = ([float(pair[side][index]) for pair in pairs] for side in (0, 1))
            bench.add(Comparison(task, CHAIN, name, native_implementation, ours, native, "bytes"))


@dataclass(frozen=True, kw_only=True)
class TrainStepOptions:
    _argument_group_name: ClassVar[str] = "training step"
    tasks: list[str] = setting(list(TASKS), "what to measure", choices=(*TASKS, COMPILED))


@dataclass(frozen=True, kw_only=True)
class TrainStepSettings(TrainStepOptions, BenchmarkSettings):
    pass


@command
def main(argv: list[str] | None = None) -> dict[str, Any]:
    settings = parse_settings(TrainStepSettings, __doc__.splitlines()[0], argv)
    bench = Benchmark("train_step", settings)
    time_tasks(bench)
    if "peak_memory" in settings.tasks:
        timed = bench.native_samples.get("train_step")
        measure_memory(bench, fastest(timed) if timed else "grouped_mm", repeats=1 if settings.quick else 3)
    return bench.write()


if __name__ == "__main__":
    main()
