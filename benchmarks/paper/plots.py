# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Pictures of the report: curves of every experiment, the paper's beside ours, and all differences."""

import csv
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.paper.analysis import Curve, Evidence, Standing, Trend, curve_of, standard_error
from benchmarks.paper.experiments import (
    OFFICIAL,
    PRENORM,
    SERIES,
    Arm,
    Experiment,
    coe,
    dense,
    moe,
    under_official_rule,
)


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


def styles_of(arms: list[Arm]) -> dict[str, dict[str, Any]]:
    """How to draw the arms, by label: a pre-norm model is dashed and has the colour of its like with the official
    rule."""
    models = list(dict.fromkeys(map(under_official_rule, arms)))
    palette = colormaps["tab10" if len(models) <= 10 else "tab20"].colors
    colors = {model: palette[index % len(palette)] for index, model in enumerate(models)}
    return {
        arm.label: {"color": colors[under_official_rule(arm)], "linestyle": "--" if arm.residual == PRENORM else "-"}
        for arm in arms
    }


def draw_curves(
    axes: Any, curves: Mapping[str, list[Curve]], styles: Mapping[str, dict[str, Any]], title: str, unit: str
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
    # A character is some 0.065 inches wide, and a line before the label half an inch.
    columns = int(figure.get_figwidth() / (0.5 + 0.065 * max(map(len, shown))))
    columns = min(max(columns, 1), 4)
    figure.legend([handles[label] for label in shown], shown, loc="outside lower center", ncols=columns, fontsize=8)
    figure.suptitle(experiment.title, fontsize=10)
    figure.savefig(path, dpi=110)
    return True


def plot_standings(standings: Mapping[str, list[Standing]], path: Path) -> bool:
    """Every model's difference from the first rival, by data, and the time of its training step, in the order of the
    first data. Returns whether there was anything."""
    known = {data: {each.arm.model: each for each in found} for data, found in standings.items() if found}
    if not known:
        return False
    models = list(dict.fromkeys(model for found in known.values() for model in found))[::-1]
    rival = next(model for model, each in next(iter(known.values())).items() if each.differences[0] is None)
    figure = Figure(figsize=(10, 1.2 + 0.26 * len(models)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    for index, (data, found) in enumerate(known.items()):
        # The rival itself is a point without an interval.
        places = [
            (y + 0.15 - 0.3 * index, found[model].differences[0]) for y, model in enumerate(models) if model in found
        ]
        left.errorbar(
            [100 * difference.mean if difference else 0.0 for _, difference in places],
            [y for y, _ in places],
            xerr=[100 * difference.half if difference else 0.0 for _, difference in places],
            fmt="o",
            markersize=4,
            capsize=2,
            label=data,
        )
    for y, model in enumerate(models):
        step = next((found[model].step for found in known.values() if model in found), None)
        if step is not None:
            right.barh(y, step, color="C7", height=0.6)
    left.axvline(0, color="black", linewidth=1)
    left.set_yticks(range(len(models)), [model.label for model in models], fontsize=7)
    left.set(xlabel=f"loss against {rival.label}, %, with its 95 % interval (left of 0 is better)")
    right.axvline(1, color="black", linewidth=1)
    right.set(xlabel="time of a training step")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    left.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    return True


def plot_trends(by_data: Mapping[tuple[str, str], Mapping[str, Trend]], path: Path) -> bool:
    """What chains of growing length differ from the mixture of their series by, with the intervals, a panel for each
    data set and split. Returns whether there was anything."""
    panels = {
        key: several
        for key, found in by_data.items()
        if (several := {name: trend for name, trend in found.items() if trend.seeds > 1})
    }
    if not panels:
        return False
    figure = Figure(figsize=(1 + 3.6 * len(panels), 4), layout="constrained")
    for axes, ((data, split), found) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for index, (name, trend) in enumerate(found.items()):
            axes.errorbar(
                [arm.iterations + 0.06 * (index - 1) for arm in SERIES[name]],
                [100 * difference.mean for difference in trend.differences],
                yerr=[100 * difference.half for difference in trend.differences],
                fmt="o-",
                markersize=4,
                capsize=2,
                color=f"C{list(SERIES).index(name)}",
                label=name,
            )
        axes.axhline(0, color="black", linewidth=1)
        axes.set(xlabel="iterations", title=f"{data}, {split}")
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].set(ylabel="loss against the mixture of the series, %\n(below 0 is better)")
    figure.axes[0].legend(fontsize=8)
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
        if not found:
            continue
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


def plot_ladder(rungs: list[Evidence], experiment: Experiment, title: str, path: Path) -> bool:
    """What chains differ from mixtures by, with the intervals, against training tokens at the smallest width and
    against width, hence parameters, at the shortest training; rungs of another training are beside the line. The
    interval of two seeds says nothing and is left out. Returns whether there was anything."""
    parameters = {
        rung: run["parameters"] / 1e6
        for rung in rungs
        if (run := next(filter(None, map(rung.any_run, experiment.arms)), None))
    }
    if not parameters:
        return False
    million_tokens = {rung: rung.scale.training_tokens / 1e6 for rung in parameters}
    width = {rung: rung.scale.shape["hidden_size"] for rung in parameters}
    shortest, narrowest = min(million_tokens.values()), min(width.values())
    panels = (
        ("million tokens", {rung: at for rung, at in million_tokens.items() if width[rung] == narrowest}),
        ("width", {rung: at for rung, at in width.items() if million_tokens[rung] == shortest or at != narrowest}),
    )
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    is_empty = True
    for axes, (unit, places) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        beside = {rung for rung in places if width[rung] != narrowest and million_tokens[rung] != shortest}
        for index, contrast in enumerate(experiment.chain_contrasts):
            shares = {rung: rung.compare(contrast).relative() for rung in places}
            shares = {rung: share for rung, share in shares.items() if share is not None and share.count > 2}
            is_empty &= not shares
            # Side by side where intervals would cover each other.
            shift = 1.03 ** (index - (len(experiment.chain_contrasts) - 1) / 2)
            for style, label, rungs_of_style in (("o-", contrast.label, shares.keys() - beside), ("s", None, beside)):
                drawn = [rung for rung in shares if rung in rungs_of_style]
                axes.errorbar(
                    [places[rung] * shift for rung in drawn],
                    [100 * shares[rung].mean for rung in drawn],
                    yerr=[100 * shares[rung].half for rung in drawn],
                    fmt=style,
                    color=f"C{index}",
                    markersize=4,
                    capsize=2,
                    label=label,
                )
        axes.axhline(0, color="black", linewidth=1)
        axes.set_xscale("log")
        ticks = [
            f"{at:.3g}\n{parameters[rung]:.1f} M"
            + (f"\n({million_tokens[rung]:.3g} M tokens)" if rung in beside else "")
            for rung, at in places.items()
        ]
        axes.set_xticks(list(places.values()), ticks)
        axes.minorticks_off()
        axes.set(xlabel=f"{unit}, parameters below")
        axes.grid(axis="y", alpha=0.3)
    if is_empty:
        return False
    figure.axes[0].set(ylabel="difference of held-out losses, %\n(below 0: the first is better)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    return True
