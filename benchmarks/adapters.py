# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Training low-rank adapters next to training all weights: time and peak memory of a step, and a decode step.

    python -m benchmarks.adapters --size mid

All models are alive in one process and run in turn; ratios are those of neighbouring runs, to full fine-tuning in
training and to a model without adapters in decoding. Peak memory is that of a second step above the weights, of each
model in a fresh process (see `train_step.py`). "added to weights" is what PEFT itself does, once a layer.
"""

import functools
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

from peft import get_peft_model
from transformers import PreTrainedModel

from benchmarks.dense_sources import decoder
from benchmarks.markdown import table
from benchmarks.measure import (
    DEFAULT_IMPLEMENTATION,
    BenchmarkSettings,
    Clock,
    TimedCall,
    alternate,
    build,
    coe_config,
    describe_machine,
    draw_ratios,
    parse_settings,
    quantity,
    random_ids,
    spread,
    write_results,
)
from benchmarks.train_step import adamw, in_fresh_process, memory_obstacle, peak_memory, training_step
from modeling_coe.command_line import command, setting
from modeling_coe.lora import lora_config


ALL, EXPERTS, ADDED, ATTENTION = (
    "all weights",
    "adapters of experts and attention",
    "adapters of experts and attention, added to weights",
    "adapters of attention",
)
MODELS = (ALL, EXPERTS, ADDED, ATTENTION)
TASKS = ("train_step", "decode", "peak_memory_above_weights")
TARGETS = {"train_step": 0.60, "peak_memory_above_weights": 0.30}  # of adapters of experts and attention, at size mid


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    _argument_group_name: ClassVar[str] = "adapters"
    rank: int = setting(8, "of the adapters")
    tasks: list[str] = setting(list(TASKS), "what to measure", choices=TASKS)


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(AdapterOptions, BenchmarkSettings):
    pass


@contextmanager
def applied_as(name: str) -> Iterator[None]:
    """Adds adapters to weights where the name of a model says so."""
    if name != ADDED:
        yield
        return
    with mock.patch("modeling_coe.experts.obstacle", return_value="this is measured"):
        yield


def new_model(settings: AdapterSettings, name: str, size: str) -> PreTrainedModel:
    """What is trained, of a size."""
    model = build(coe_config(size), settings).train()
    model.set_experts_implementation((settings.implementations or [DEFAULT_IMPLEMENTATION])[0])
    if name == ALL:
        return model
    options = {"experts": name != ATTENTION, "shared_experts": False, "r": settings.rank}
    return get_peft_model(model, lora_config(model, **options))


def run_as(name: str, run: TimedCall) -> TimedCall:
    def run_in_its_way() -> float:
        with applied_as(name):
            return run()

    return run_in_its_way


def measure_steps(settings: AdapterSettings) -> dict[str, list[float]]:
    """Seconds of a training step with its optimizer, by model."""
    clock, ids = Clock(settings.device, settings.threads), random_ids(settings, *settings.train_shape)

    def start(name: str) -> TimedCall:
        model = new_model(settings, name, settings.size)
        optimizer = adamw(model)
        return run_as(name, lambda: clock(lambda: training_step(model, ids, optimizer)))

    runs = {name: start(name) for name in MODELS}
    alternate(runs, 1, "warm-up")
    return alternate(runs, settings.pairs, "train_step")


def measure_decoding(settings: AdapterSettings) -> dict[str, list[float]]:
    """Seconds of a token with 64 before it, by model; the first is without adapters."""
    clock = Clock(settings.device, settings.threads)
    runs = {name: run_as(name, decoder(new_model(settings, name, settings.size).eval(), clock)) for name in MODELS}
    alternate(runs, 1, "warm-up")
    return alternate(runs, settings.pairs, "decode")


def peak_above_weights(settings: AdapterSettings, name: str) -> int:
    with applied_as(name):
        return peak_memory(settings, functools.partial(new_model, settings, name))[1]


def measure_memory(settings: AdapterSettings) -> dict[str, list[float]]:
    """Bytes at the peak of a training step above those of the weights, by model."""
    repeats = 1 if settings.quick else 3
    samples = {name: [] for name in MODELS}
    for _ in range(repeats):
        for name in MODELS:
            samples[name].append(float(in_fresh_process(peak_above_weights, settings, name)))
    return samples


def rows_of(task: str, samples: dict[str, list[float]], settings: AdapterSettings) -> Iterator[dict[str, Any]]:
    """The figures of each model, with the ratio to the first one."""
    has_target = settings.size == "mid" and settings.device == "cpu" and settings.dtype == "float32"
    for name, values in samples.items():
        ratio = spread([value / first for value, first in zip(values, samples[ALL], strict=True)])
        row = {"task": task, "model": name, "samples": values, "ratio": ratio._asdict()}
        if name == EXPERTS and task in TARGETS and has_target:
            row |= {"target": TARGETS[task], "met": ratio.median <= TARGETS[task]}
        yield row


def cells(row: dict[str, Any]) -> list[str]:
    ratio, unit = row["ratio"], "bytes" if row["task"].startswith("peak_memory") else "s"
    return [
        row["task"],
        row["model"],
        quantity(statistics.median(row["samples"]), unit),
        f"{ratio['median']:.3f}",
        f"{ratio['q1']:.3f} to {ratio['q3']:.3f}",
        f"{ratio['min']:.3f} to {ratio['max']:.3f}",
        f"<= {row['target']:.2f}: {'met' if row['met'] else 'not met'}" if "target" in row else "",
    ]


def markdown(results: dict[str, Any]) -> str:
    machine, settings = results["machine"], results["settings"]
    lines = [
        f"# adapters, size {settings['size']}, {settings['dtype']}, rank {settings['rank']}",
        "",
        f"{machine['device']}, {machine['threads']} of {machine['cores']} CPU cores, {machine['clock']} time, torch "
        f"{machine['torch']}, transformers {machine['transformers']}, {machine['date']}.",
        "",
        "Ratio: to all weights trained, and in decoding to the model without adapters, median over "
        f"{settings['pairs']} pairs of runs. Below 1 is better.",
        "",
    ]
    header = ("task", "what is trained", "median", "ratio", "quartiles", "range", "target")
    lines += table(header, map(cells, results["rows"]), "llrrlll")
    if results["skipped"]:
        lines += ["", *(f"- Not measured: {task}, {why}" for task, why in results["skipped"].items())]
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws every task of every model, relative to full fine-tuning; in decoding to the model without adapters."""
    ratios: dict[str, dict[str, float]] = {name: {} for name in MODELS}
    for row in results["rows"]:
        ratios[row["model"]][row["task"]] = row["ratio"]["median"]
    title = f"adapters, size {results['settings']['size']}, {results['machine']['device']}"
    draw_ratios(ratios, ALL, title, path)


@command
def main(argv: list[str] | None = None) -> dict[str, Any]:
    settings = parse_settings(AdapterSettings, __doc__.splitlines()[0], argv)
    measures = {"train_step": measure_steps, "decode": measure_decoding, "peak_memory_above_weights": measure_memory}
    rows, skipped = [], {}
    for task in settings.tasks:
        if task.startswith("peak_memory") and (obstacle := memory_obstacle(settings)) is not None:
            skipped[task] = obstacle
        else:
            rows += rows_of(task, measures[task](settings), settings)
    results = {
        "benchmark": "adapters",
        "machine": describe_machine(settings.device, settings.threads, settings.date),
        "settings": {name: value for name, value in asdict(settings).items() if name != "output"},
        "rows": rows,
        "skipped": skipped,
    }
    return write_results(results, settings.output / f"adapters-{settings.size}", markdown, plot)


if __name__ == "__main__":
    main()
