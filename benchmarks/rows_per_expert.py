# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""From which batch on a chain's training step costs no more than that of the native model of equal routed FLOPs.

    python -m benchmarks.rows_per_expert --size mid

The paper's chains took longer per step than its mixtures, though both compute as much: an iteration has half of the
rows, each expert's matrix is multiplied with fewer of them, and small products are slow ones. So the ratio is shown
against the rows that an expert has in one iteration, on average: `tokens * K / N`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from transformers import PreTrainedModel

from benchmarks.measure import (
    CHAIN,
    DEFAULT_IMPLEMENTATION,
    Benchmark,
    BenchmarkSettings,
    Task,
    TimedCall,
    adamw_work,
    coe_config,
    forward_and_backward,
    forward_work,
    parse_settings,
    random_ids,
)
from benchmarks.train_step import adamw, training_step
from modeling_coe.command_line import InputError, command, setting


LENGTH = 256


@dataclass(frozen=True, kw_only=True)
class RowsOptions:
    _argument_group_name: ClassVar[str] = "rows per expert"
    batches: list[int] = setting([1, 4, 16, 64], f"sequences of {LENGTH} tokens in a step")


@dataclass(frozen=True, kw_only=True)
class RowsSettings(RowsOptions, BenchmarkSettings):
    implementations: list[str] = setting([DEFAULT_IMPLEMENTATION], "of CoE's experts")


def tasks(bench: Benchmark) -> list[Task]:
    """A training step with its optimizer for every batch."""
    optimizers = {}  # one a model, whose moments would not fit several times

    def task(batch: int) -> Task:
        ids = random_ids(bench.settings, batch, LENGTH)

        def start(model: PreTrainedModel) -> TimedCall:
            optimizer = optimizers.setdefault(model, adamw(model.train()))
            return lambda: bench.clock(lambda: training_step(model, ids, optimizer))

        return Task(
            f"train_step, {batch * LENGTH} tokens",
            batch * LENGTH,
            lambda config: [
                forward_and_backward(forward_work(config, batch, LENGTH, 0, LENGTH, bench.itemsize)),
                adamw_work(config, bench.itemsize),
            ],
            start,
            training=True,
        )

    return [task(batch) for batch in bench.settings.batches]


def rows_per_expert(size: str, tokens: int) -> float:
    """Of the chain in one iteration, on average."""
    config = coe_config(size)
    return tokens * config.num_experts_per_tok / config.n_routed_experts


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws the ratio against the rows per expert, a curve for each implementation, with quartiles."""
    figure = Figure(figsize=(7, 4.5))  # drawn by Agg, which needs no display
    axes = figure.subplots()
    rows = results["comparisons"]
    size = results["settings"]["size"]
    for name in dict.fromkeys(row["implementation"] for row in rows):
        curve = sorted((row for row in rows if row["implementation"] == name), key=lambda row: row["tokens"])
        ratios = [row["ratio"] for row in curve]
        error = [[r["median"] - r["q1"] for r in ratios], [r["q3"] - r["median"] for r in ratios]]
        x = [rows_per_expert(size, row["tokens"]) for row in curve]
        axes.errorbar(x, [r["median"] for r in ratios], yerr=error, marker="o", capsize=3, label=name)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(sorted({rows_per_expert(size, row["tokens"]) for row in rows}))
    axes.set(
        xlabel="rows per expert and iteration of the chain",
        ylabel="training step, CoE-2(4/64) over native MoE(8/64)",
        title=f"{size}, {results['settings']['dtype']}, {results['machine']['device']}",
    )
    axes.grid(alpha=0.3)
    axes.legend(title="experts of the chain")
    figure.savefig(path, dpi=150, bbox_inches="tight")


@command
def main(argv: list[str] | None = None) -> dict[str, Any]:
    settings = parse_settings(RowsSettings, __doc__.splitlines()[0], argv)
    if min(settings.batches, default=0) < 1:
        raise InputError(f"--batches is {settings.batches}; it needs numbers of sequences, 1 or more each.")
    bench = Benchmark("rows_per_expert", settings)
    bench.compare_models(tasks(bench), variants=[CHAIN])
    return bench.write(draw=plot)


if __name__ == "__main__":
    main()
