# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What a training run reports: held-out losses, problems it solves, its speed and log, and a picture of the losses."""

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from .answers import exact_match
from .corpus import Corpus, Example
from .run_folder import write_json
from .settings import JobSettings, computing
from .training import FinishedRun, TrainingData


LossTable = dict[str, dict[str, float]]  # by split: "before" and "trained", and "unigram" where it is known


def unigram_loss(train_blocks: torch.Tensor, blocks: torch.Tensor, vocab_size: int) -> float:
    """Cross-entropy of the frequencies of the training tokens, each counted once more than it occurs, on the tokens
    that the model predicts: all of a block but the first."""
    counts = train_blocks.flatten().bincount(minlength=vocab_size).double() + 1
    return -(counts / counts.sum()).log()[blocks[:, 1:]].mean().item()


def unigram_losses(data: TrainingData, vocab_size: int) -> dict[str, float]:
    """The unigram loss on every split of blocks."""
    return {
        split: unigram_loss(data.train.tokens, blocks.tokens, vocab_size) for split, blocks in data.held_out.items()
    }


def held_out_table(log: list[dict[str, float]], splits: Iterable[str], **baselines: dict[str, float]) -> LossTable:
    """Losses by split of the model before training, of baselines, and of the trained model."""
    table = {}
    for split in splits:
        losses = [entry[f"eval_{split}_loss"] for entry in log if f"eval_{split}_loss" in entry]
        others = {name: baseline[split] for name, baseline in baselines.items()}
        table[split] = {"before": losses[0], **others, "trained": losses[-1]}
    return table


def plot_losses(log: list[dict[str, float]], table: LossTable, title: str, path: Path) -> None:
    """Draws the training and held-out losses over the steps, with those before training and of baselines as lines."""
    figure = Figure(figsize=(8, 5))  # drawn by Agg, which needs no display
    axes = figure.subplots()
    training = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    axes.plot(*zip(*training, strict=True), color="0.6", linewidth=1, label="training, with balancing loss")
    for color, (split, losses) in enumerate(table.items()):
        key = f"eval_{split}_loss"
        evaluated = [(entry["step"], entry[key]) for entry in log if key in entry]
        axes.plot(*zip(*evaluated, strict=True), f"C{color}o-", markersize=3, label=f"held out: {split}")
        axes.axhline(losses["before"], color=f"C{color}", linestyle=":", label=f"before training: {split}")
        if "unigram" in losses:
            axes.axhline(losses["unigram"], color=f"C{color}", linestyle="--", label=f"unigram: {split}")
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", title=title)
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def print_report(results: dict[str, Any]) -> None:
    """Prints the losses, the speed, some solutions and the exact match."""
    columns = next(iter(results["held_out_loss"].values()))
    print(f"\n{'held-out loss':<16}" + "".join(f"{name:>12}" for name in columns) + f"{'exact match':>14}")
    for split, losses in results["held_out_loss"].items():
        match = results["exact_match"][split]
        shown = "-" if match is None else f"{match:.1%}"
        print(f"{split:<16}" + "".join(f"{loss:>12.4f}" for loss in losses.values()) + f"{shown:>14}")
    for split, samples in results["samples"].items():
        for sample in samples:
            print(f"\n[{split}] {sample['prompt']}\n--- model\n{sample['solution']}\n--- expected\n{sample['answer']}")
    speed = results["tokens_per_second"]
    print(f"\ntraining speed: {'nothing was trained' if speed is None else f'{speed:,.0f} tokens per second'}")


def report(
    settings: JobSettings,
    run: FinishedRun,
    data: TrainingData,
    corpus: Corpus,
    solver: Callable[[list[Example]], list[str]],
    *,
    title: str,
    baselines: dict[str, dict[str, float]],
    facts: dict[str, Any],
) -> None:
    """Has held-out problems solved, writes `results.json` and `loss_curve.png`, and prints the report.

    Args:
        settings (`JobSettings`): All options of the run, those of generation among them.
        run (`FinishedRun`): What training gave.
        data (`TrainingData`): What it was given.
        corpus (`Corpus`): With the problems of every held-out split.
        solver (`Callable[[list[Example]], list[str]]`): Gives the model's continuations of the prompts.
        title (`str`): Of the picture.
        baselines (`dict[str, dict[str, float]]`): By their names, other losses on every split.
        facts (`dict[str, Any]`): More for `results.json`.
    """
    table = held_out_table(run.log, data.held_out, **baselines)
    accuracy, samples = {}, {}
    for split, examples in corpus.held_out.items():
        problems = list(islice(examples, settings.num_problems))
        solutions = solver(problems)
        accuracy[split] = exact_match(problems, solutions)
        samples[split] = [
            {"prompt": problem.prompt, "solution": solution, "answer": problem.answer}
            for problem, solution in islice(zip(problems, solutions, strict=True), settings.num_samples)
        ]
    results = {
        "settings": computing(settings),
        **facts,
        **({} if data.tokens_per_step is None else {"training_tokens": settings.steps * data.tokens_per_step}),
        "held_out_loss": table,
        "exact_match": accuracy,
        "tokens_per_second": run.tokens_per_second,
        "samples": samples,
        "log_history": run.log,
    }
    write_json(settings.output_dir / "results.json", results)
    plot_losses(run.log, table, title, settings.output_dir / "loss_curve.png")
    print_report(results)
