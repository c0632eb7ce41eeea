# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Does a trained mixture of experts learn more when it goes on as a chain, at the same FLOPs?

    python -m benchmarks.upcycling --work runs/upcycling --output benchmarks/results/upcycling

A DeepSeek-V2 mixture of experts is trained on the arithmetic problems, or on the files of `--data`, until it improves
slowly. It is then converted twice, with `identity` (the mixture as it was) and with `split` (the same experts and the
same FLOPs as a chain of two iterations), and both go on with the same new data in the same order, the same optimizer,
and learning rates that were not tuned for either. Every seed gives one pair.

Runs are those of `examples/pretrain.py`, each in a folder named by a hash of its options and of the folder of the
model that it goes on with. What is finished is not run again, what was interrupted goes on.
"""

import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy import stats
from tqdm import tqdm
from transformers import AutoConfig

import modeling_coe  # noqa: F401  registers the Auto classes
from modeling_coe.command_line import check_folder, check_positive, command, parse, setting


ROOT = Path(__file__).resolve().parents[1]
MODES = ("identity", "split")


@dataclass(frozen=True, kw_only=True)
class UpcyclingSettings:
    work: Path = setting(Path("runs/upcycling"), "folder for models and runs")
    output: Path = setting(Path("runs/benchmarks"), "folder for the results")
    seeds: list[int] = setting([1, 2, 3], "one pair of runs each")
    source_steps: int = setting(3000, "steps of the mixture before conversion")
    steps: int = setting(1000, "steps of each model after it")
    source_lr: float = setting(3e-3, "highest learning rate before conversion")
    lr: float = setting(1e-3, "highest learning rate after conversion")
    eval_steps: int = setting(100, "steps between two evaluations")
    jobs: int = setting(os.cpu_count() or 1, "runs at a time, one thread each")
    data: list[str] = setting([], "options of examples/pretrain.py that choose the data")
    shape: list[str] = setting(
        ["--hidden-size=128", "--num-layers=3", "--num-experts=32", "--expert-width=32", "--top-k=8"],
        "options of examples/pretrain.py that give the mixture its shape",
    )


def parse_settings(argv: list[str] | None = None) -> UpcyclingSettings:
    """Reads the command line."""
    settings = parse(UpcyclingSettings, __doc__.splitlines()[0], argv)
    check_positive(settings, "source_steps", "steps", "eval_steps", "jobs")
    check_folder("work", settings.work)
    check_folder("output", settings.output)
    return settings


def run(*command: str | Path) -> None:
    """Runs a Python program of this project on one thread.

    Raises:
        RuntimeError: It failed; the message holds the end of its output.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, check=False
    )
    if process.returncode:
        output = (process.stdout + process.stderr)[-3000:]
        raise RuntimeError(f"{' '.join(map(str, command))} failed with status {process.returncode}:\n{output}")


def pretrain(settings: UpcyclingSettings, name: str, *options: str | Path) -> tuple[dict[str, Any], Path]:
    """Results of a run of `examples/pretrain.py`, made now if they are not there, and its folder."""
    shared = ("--eval-steps", settings.eval_steps, "--save-steps", settings.eval_steps, "--num-problems", 1)
    command = [*map(str, (*settings.data, *shared, *options))]
    folder = settings.work / f"{name}-{hashlib.sha256(json.dumps(command).encode()).hexdigest()[:12]}"
    results = folder / "results.json"
    if not results.exists():
        resume = ["--resume"] if (folder / "run.json").exists() else []
        run(ROOT / "examples" / "pretrain.py", "--output-dir", folder, *resume, *command)
    return json.loads(results.read_text()), folder


def convert(source: Path, target: Path, *options: str | Path) -> Path:
    if not target.exists():
        run("-m", "conversion", source, target, *options)
    return target


def train_and_convert(settings: UpcyclingSettings) -> tuple[dict[str, Any], dict[str, Path]]:
    """Trains the mixture and converts it in every mode. It is trained as a chain of one iteration, which is the same
    model, and taken back to DeepSeek-V2 before."""
    options = ("--residual=prenorm", "--iterations=1", "--schedule=constant_with_warmup", *settings.shape)
    source, folder = pretrain(
        settings, "source", "--steps", settings.source_steps, "--lr", settings.source_lr, *options
    )
    mixture = convert(folder / "model", folder / "deepseek_v2", "--to", "source")
    converted = {mode: convert(mixture, folder / mode, "--mode", mode) for mode in MODES}
    flops = {mode: AutoConfig.from_pretrained(folder).expert_flops_per_token for mode, folder in converted.items()}
    if len(set(flops.values())) != 1:
        raise ValueError(f"The modes differ in expert FLOPs per token, {flops}. Choose a top-k that two divides.")
    return source, converted


def curves(results: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Held-out losses over the steps, by split."""
    return {
        split: [(entry["step"], entry[f"eval_{split}_loss"]) for entry in results["log_history"]
                if f"eval_{split}_loss" in entry]
        for split in results["held_out_loss"]
    }  # fmt: skip


def interval(differences: list[float]) -> float:
    """Half the width of the 95 % confidence interval of a mean, by Student's t; infinite for a single value."""
    if len(differences) < 2:
        return math.inf
    return float(stats.t.ppf(0.975, df=len(differences) - 1) * stats.sem(differences))


def summarize(runs: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """Losses by split: before, after in every mode, and the paired differences of split and identity."""
    seeds = list(runs[MODES[0]])
    splits = list(runs[MODES[0]][seeds[0]]["held_out_loss"])
    summary = {}
    for split in splits:
        losses = {mode: [runs[mode][seed]["held_out_loss"][split] for seed in seeds] for mode in MODES}
        after = {mode: [loss["trained"] for loss in losses[mode]] for mode in MODES}
        differences = [chain - mixture for chain, mixture in zip(after["split"], after["identity"], strict=True)]
        summary[split] = {
            "before": {mode: [loss["before"] for loss in losses[mode]] for mode in MODES},
            "after": after,
            "differences": differences,
            "mean_difference": statistics.mean(differences),
            "interval_95": interval(differences),
        }
    return summary


def conclusion(row: dict[str, Any]) -> str:
    if row["interval_95"] >= abs(row["mean_difference"]):
        return "cannot tell"
    return "the chain is better" if row["mean_difference"] < 0 else "the chain is worse"


def markdown(results: dict[str, Any]) -> str:
    lines = [
        "# Going on from a trained mixture of experts, as it is and as a chain",
        "",
        f"A DeepSeek-V2 mixture of {results['parameters']['total']:,} parameters, trained for "
        f"{results['source_tokens']:,} tokens and converted with `identity` and with `split` (C=2): the same weights, "
        f"the same logits, {results['expert_flops_per_token']:,} expert FLOPs per token both. Each then trained on "
        f"{results['tokens']:,} new tokens, in the same order within a pair. Held-out cross-entropy in nats per "
        "token; difference of split and identity, mean over seeds with the 95 % interval.",
        "",
        "| held-out data | before | identity after | split after | split - identity | |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for split, row in results["summary"].items():
        before, identity, chain = (
            statistics.mean(values)
            for values in (row["before"]["split"], row["after"]["identity"], row["after"]["split"])
        )
        lines.append(
            f"| {split} | {before:.4f} | {identity:.4f} | {chain:.4f} | "
            f"{row['mean_difference']:+.4f} ± {row['interval_95']:.4f} | {conclusion(row)} |"
        )
    lines += ["", "| seed | held-out data | identity | split | difference |", "| ---: | --- | ---: | ---: | ---: |"]
    for split, row in results["summary"].items():
        for seed, *values in zip(
            results["seeds"], row["after"]["identity"], row["after"]["split"], row["differences"], strict=True
        ):
            lines.append(f"| {seed} | {split} | {values[0]:.4f} | {values[1]:.4f} | {values[2]:+.4f} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Held-out losses of the mixture before conversion, and of every run after it. Every seed holds out problems of
    its own, so that curves of two seeds begin at different heights."""
    splits = list(results["summary"])
    figure = Figure(figsize=(5.5 * len(splits), 4.2), layout="constrained")
    for axes, split in zip(figure.subplots(1, len(splits), squeeze=False)[0], splits, strict=True):
        source = results["curves"]["source"][split]
        end = source[-1][0]
        axes.plot(*zip(*source[len(source) // 2 :], strict=True), color="0.5", label="mixture, before conversion")
        for color, mode in zip(("C0", "C3"), MODES, strict=True):
            for index, curve in enumerate(results["curves"][mode].values()):
                steps, losses = zip(*curve[split], strict=True)
                label = mode if index == 0 else None
                axes.plot([end + step for step in steps], losses, color=color, linewidth=1, alpha=0.8, label=label)
        axes.axvline(end, color="0.8", linewidth=1)
        axes.set(xlabel="step", ylabel="held-out cross-entropy", title=split)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150, bbox_inches="tight")


@command
def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(argv)
    source, converted = train_and_convert(settings)

    def continued(mode: str, seed: int) -> dict[str, Any]:
        options = ("--model", converted[mode], "--seed", seed, "--steps", settings.steps, "--lr", settings.lr)
        return pretrain(settings, f"{mode}-{seed}", *options)[0]

    pairs = [(mode, seed) for seed in settings.seeds for mode in MODES]
    with ThreadPoolExecutor(settings.jobs) as pool:
        finished = list(tqdm(pool.map(lambda pair: continued(*pair), pairs), total=len(pairs), desc="runs"))
    runs = {mode: {} for mode in MODES}
    for (mode, seed), results in zip(pairs, finished, strict=True):
        runs[mode][seed] = results

    any_run = runs["split"][settings.seeds[0]]
    results = {
        "seeds": settings.seeds,
        "settings": {
            name: value for name, value in asdict(settings).items() if name not in ("work", "output", "jobs")
        },
        "parameters": source["parameters"],
        "expert_flops_per_token": AutoConfig.from_pretrained(converted["split"]).expert_flops_per_token,
        "source_tokens": source["training_tokens"],
        "tokens": any_run["training_tokens"],
        "summary": summarize(runs),
        "curves": {"source": curves(source)}
        | {mode: {seed: curves(result) for seed, result in by_seed.items()} for mode, by_seed in runs.items()},
    }
    settings.output.mkdir(parents=True, exist_ok=True)
    (settings.output / "upcycling.json").write_text(json.dumps(results, indent=1) + "\n")
    (settings.output / "upcycling.md").write_text(markdown(results))
    plot(results, settings.output / "upcycling.png")
    print(markdown(results))


if __name__ == "__main__":
    main()
