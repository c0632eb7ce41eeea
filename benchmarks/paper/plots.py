# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Pictures of the report: curves of every experiment, the paper's beside ours, and all differences."""

import csv
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.paper.analysis import Curve, Evidence, curve_of, standard_error
from benchmarks.paper.experiments import OFFICIAL, PRENORM, Arm, Experiment, coe, dense, moe, under_official_rule


# The paper's curves: file and column of each arm.
PAPER_CURVES = {
    moe(OFFICIAL): ("fixed_compute_and_fewer_experts", "64ept-8tpk-1itr"),
    coe(OFFICIAL, 2, 4): ("fixed_compute_and_fewer_experts", "64ept-4tpk-2itr"),
    coe(OFFICIAL, 2, 4, experts=47): ("fixed_compute_and_fewer_experts", "48ept-4tpk-2itr"),
    coe(OFFICIAL, 2, 8): ("width_scaling", "64ept-8tpk-2itr"),
    moe(OFFICIAL, 16): ("width_scaling", "64ept-16tpk-1itr"),
    moe(OFFICIAL, 24): ("width_scaling", "64ept-24tpk-1itr"),
    moe(OFFICIAL, depth=2): ("depth_scaling", "64ept-8tpk-1itr-8lyr"),
    moe(OFFICIAL, depth=3): ("depth_scaling", "64ept-8tpk-1itr-12lyr"),
    coe(OFFICIAL, 2, 8, shared_router=True): ("ablations", "64ept-8tpk-2itr-noig"),
    coe("outer", 2, 8): ("ablations", "64ept-8tpk-2itr-ore"),
    dense(OFFICIAL, 1): ("sparse_vs_dense", "8ept-8tpk-1itr"),
    dense(OFFICIAL, 2): ("sparse_vs_dense", "8ept-8tpk-2itr"),
}


def read_paper_curves(folder: Path) -> dict[Arm, Curve]:
    """The paper's curves by arm, as far as the files are there."""
    curves = {}
    for arm, (name, ending) in PAPER_CURVES.items():
        path = folder / f"{name}.tsv"
        if not path.exists():
            continue
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        column = next(key for key in rows[0] if key.removesuffix(" - val/loss").endswith(ending))
        curves[arm] = [(int(row["Step"]), float(row[column])) for row in rows]
    return curves


def styles_of(arms: list[Arm]) -> dict[str, dict[str, str]]:
    """How to draw the arms, by label: a pre-norm model is dashed and has the colour of its like with the official
    rule."""
    colors = {model: f"C{index % 10}" for index, model in enumerate(dict.fromkeys(map(under_official_rule, arms)))}
    return {
        arm.label: {"color": colors[under_official_rule(arm)], "linestyle": "--" if arm.residual == PRENORM else "-"}
        for arm in arms
    }


def draw_curves(
    axes: Any, curves: Mapping[str, list[Curve]], styles: Mapping[str, dict[str, str]], title: str, unit: str
) -> None:
    """Mean and standard error over seeds of curves that share their positions, from a quarter on, where differences
    show."""
    bottom, top = float("inf"), 0.0
    for label, seeds in curves.items():
        positions = [position for position, _ in seeds[0]]
        columns = list(zip(*([loss for _, loss in curve] for curve in seeds), strict=True))
        mean = [statistics.fmean(column) for column in columns]
        axes.plot(positions, mean, label=label, **styles[label])
        if len(seeds) > 1:
            errors = [standard_error(column) for column in columns]
            low, high = ([each + sign * error for each, error in zip(mean, errors, strict=True)] for sign in (-1, 1))
            axes.fill_between(positions, low, high, color=styles[label]["color"], alpha=0.15)
        late = [loss for position, loss in zip(positions, mean, strict=True) if position >= positions[-1] / 4]
        bottom, top = min(bottom, *late), max(top, *late)
    margin = 0.05 * (top - bottom)
    axes.set(xlabel=unit, ylabel="held-out loss", title=title, ylim=(bottom - margin, top + margin))
    axes.grid(alpha=0.3)


def plot_experiment(evidence: Evidence, experiment: Experiment, paper: Mapping[Arm, Curve], path: Path) -> bool:
    """The paper's curves where it has some, ours over steps and over seconds, of the seeds that all arms have. Returns
    whether there was anything."""
    steps: dict[str, list[Curve]] = {}
    seconds: dict[str, list[Curve]] = {}
    seeds = evidence.common_seeds(experiment)
    for arm in experiment.arms:
        runs = [run for seed, run in evidence.runs(arm).items() if seed in seeds]
        curves = [curve_of(run) for run in runs if evidence.final(run) is not None]
        if not curves:
            continue
        steps[arm.label] = curves
        if (ratio := evidence.cost(arm, "seconds")) is not None:
            seconds[arm.label] = [[(step * ratio, loss) for step, loss in curve] for curve in curves]
    if not steps:
        return False
    theirs = {arm.label: [paper[arm.model]] for arm in experiment.arms if arm.model in paper}
    styles = styles_of(experiment.arms)
    panels = [
        (curves, title, unit)
        for curves, title, unit in (
            (theirs if len(theirs) > 1 else {}, "the paper's", "step"),
            (steps, f"ours, {evidence.scale.name}", "step"),
            (seconds, f"ours, {evidence.scale.name}", "time, in steps of MoE(8/64) inner"),
        )
        if curves
    ]
    figure = Figure(figsize=(5.2 * len(panels), 4.8), layout="constrained")
    for axes, (curves, title, unit) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw_curves(axes, curves, styles, title, unit)
    handles = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    shown = [label for label in styles if label in handles]
    figure.legend([handles[label] for label in shown], shown, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(experiment.title, fontsize=10)
    figure.savefig(path, dpi=110)
    return True


def plot_differences(evidence: Evidence, path: Path) -> bool:
    """All paired differences with their intervals, at equal steps and at equal seconds, in percent of the loss."""
    colors = {"steps": "C0", "seconds": "C3"}
    rows = [
        (f"{experiment.name}: {contrast.label}", {measure: finding.relative(measure) for measure in colors})
        for experiment in evidence.scale.experiments
        for contrast in experiment.contrasts
        if (finding := evidence.compare(contrast)).differences["steps"] is not None
        and finding.differences["steps"].count > 1
    ][::-1]
    if not rows:
        return False
    figure = Figure(figsize=(8, 1 + 0.24 * len(rows)))
    axes = figure.subplots()
    for shift, (measure, color) in zip((0.15, -0.15), colors.items(), strict=True):
        found = [(y + shift, row[measure]) for y, (_, row) in enumerate(rows) if row[measure] is not None]
        axes.errorbar(
            [100 * difference.mean for _, difference in found],
            [y for y, _ in found],
            xerr=[100 * difference.half for _, difference in found],
            fmt="o",
            markersize=3,
            capsize=2,
            color=color,
            label=f"at equal {measure}",
        )
    axes.axvline(0, color="black", linewidth=1)
    axes.set_xscale("symlog", linthresh=10, linscale=1.2)  # a few wide intervals would leave no room for the others
    ticks = (-40, -20, -10, -5, 0, 5, 10, 20, 40)
    axes.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=6)
    axes.set(
        xlabel="difference of held-out losses, %, with its 95 % interval (left of 0: the first is better; "
        "logarithmic beyond 10)",
        ylim=(-1, len(rows)),
    )
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    return True
