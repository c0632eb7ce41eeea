# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Pictures of routing statistics and of training runs. Drawn by Agg, which needs no display."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .statistics import LayerRouting, RoutingStatistics


# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DPI = 200
ROUTING_LABELS = {
    "max_vio": "MaxVio",
    "load_entropy": "normalised entropy of load",
    "dead_share": "share of dead experts",
    "margin": "top-1 margin",
    "reuse": "share of re-used experts",
}


def plot_transitions(routing: RoutingStatistics, path: str | Path, layers: Sequence[int] | None = None) -> None:
    """Draws the probability of every expert in iteration t+1 given one of iteration t, as in figure 8 of the paper: a
    column of heat maps per layer, a row per transition, all on one scale. Rows of experts that were never chosen are
    grey; those of experts with less than a tenth of the uniform load are noise and do not widen the scale. The line in
    the colour bar marks uniform routing, K / N.

    Args:
        routing (`RoutingStatistics`): What to draw.
        path (`str` or `Path`): Where to write the PNG.
        layers (`Sequence[int]`, *optional*): Layers to draw; if not given the chained layers, of more than four the
            first and last two, as in the paper.

    Raises:
        ValueError: There are no such layers, they have one iteration only, or no tokens were recorded.
    """
    chosen = _choose_layers(routing, layers, min_iterations=2)
    num_rows = max(layer.num_iterations for layer in chosen.values()) - 1
    figure = Figure(figsize=(2.4 * len(chosen) + 0.9, 2.5 * num_rows + 0.3), layout="constrained")
    grid = figure.subplots(num_rows, len(chosen), squeeze=False)
    often = [layer.transitions[layer.load[:-1] >= 0.1 / routing.num_experts] for layer in chosen.values()]
    highest = torch.cat(often).max().item()
    for column, (layer_idx, layer) in enumerate(chosen.items()):
        for t, axes in enumerate(grid[:, column]):
            if t >= layer.num_iterations - 1:
                axes.axis("off")
                continue
            axes.set_facecolor("0.8")  # shows where a value is missing
            image = axes.imshow(
                layer.transitions[t].numpy(), vmin=0, vmax=highest, cmap="viridis", interpolation="nearest"
            )
            axes.set_xlabel(f"expert in iteration {t + 1}")
            if t == 0:
                axes.set_title(f"layer {layer_idx}")
            if column == 0:
                axes.set_ylabel(f"expert in iteration {t}")
    clipped = any(layer.transitions.nan_to_num().max() > highest for layer in chosen.values())
    extend = "max" if clipped else "neither"
    bar = figure.colorbar(image, ax=grid, label="probability (line: uniform)", aspect=30, extend=extend)
    first = next(iter(chosen.values()))
    uniform = first.selections[1].sum().item() / max(1, first.tokens.item()) / routing.num_experts
    bar.ax.axhline(uniform, color="white", linewidth=1.5)
    figure.savefig(path, dpi=DPI)


def plot_load(routing: RoutingStatistics, path: str | Path, layers: Sequence[int] | None = None) -> None:
    """Draws the load of every expert over that of uniform routing, a panel per layer and a line per iteration.

    Args:
        routing (`RoutingStatistics`): What to draw.
        path (`str` or `Path`): Where to write the PNG.
        layers (`Sequence[int]`, *optional*): Layers to draw; if not given, of more than four the first and last two.

    Raises:
        ValueError: There are no such layers, or no tokens were recorded.
    """
    chosen = _choose_layers(routing, layers)
    figure = Figure(figsize=(7, 1.5 * len(chosen) + 0.6), layout="constrained")
    panels = figure.subplots(len(chosen), sharex=True, sharey=True, squeeze=False)[:, 0]
    highest = routing.num_experts * max(layer.load.max().item() for layer in chosen.values())
    edges = [expert - 0.5 for expert in range(routing.num_experts + 1)]
    for axes, (layer_idx, layer) in zip(panels, chosen.items(), strict=True):
        axes.axhline(1, color="0.6", linewidth=0.8)
        for t, load in enumerate(layer.load.numpy() * routing.num_experts):
            color = COLORS[t % len(COLORS)]
            axes.stairs(load, edges, baseline=None, color=color, linewidth=1.2, label=f"iteration {t}")
        axes.set(ylabel=f"layer {layer_idx}", xlim=(edges[0], edges[-1]), ylim=(0, 1.05 * highest))
        _remove_frame(axes)
    panels[-1].set_xlabel("expert")
    figure.supylabel("load / uniform load", fontsize="medium")
    handles, labels = max((axes.get_legend_handles_labels() for axes in panels), key=lambda pair: len(pair[0]))
    figure.legend(handles, labels, loc="outside upper right", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=DPI)


def plot_training(log: list[dict[str, Any]] | str | Path, path: str | Path) -> None:
    """Draws a training run: the losses, the auxiliary loss, and what [`RoutingCallback`] has logged, the mean over
    layers as a line and the worst layer as a dotted one.

    Args:
        log (`list[dict[str, Any]]`, `str` or `Path`): `trainer.state.log_history`, or a JSON file that has a
            `log_history`, such as `trainer_state.json`.
        path (`str` or `Path`): Where to write the PNG.

    Raises:
        ValueError: There are no losses in the log.
    """
    if not isinstance(log, list):
        log = json.loads(Path(log).read_text(encoding="utf-8")).get("log_history", [])
    names = {name for entry in log for name in entry}
    losses = {name: name.removesuffix("_loss").replace("eval", "held out").replace("_", " ") for name in sorted(names)}
    losses = {name: label for name, label in losses.items() if re.fullmatch(r"eval(_.+)?_loss", name)}
    if "loss" not in names and not losses:
        raise ValueError("The log has no `loss` and no `eval_loss`, so there is nothing to draw.")
    routing = [name for name in ROUTING_LABELS if any(key.endswith(f"/{name}") for key in names)]
    drawn = ["loss", *(["aux_loss"] if "aux_loss" in names else []), *routing]

    columns = min(2, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(4.5 * columns, 2.2 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(drawn) :]:
        axes.axis("off")
    for axes, name in zip(panels, drawn, strict=False):
        if name == "loss":
            _draw(axes, log, "loss", color="0.5", label="training")
            for color, (key, label) in zip(COLORS, losses.items(), strict=False):
                _draw(axes, log, key, color=color, marker="o", markersize=2.5, label=label)
            axes.legend(frameon=False, fontsize="small")
        elif name == "aux_loss":
            _draw(axes, log, name, color="0.5")
        else:
            for t in sorted(int(key[1]) for key in map(_split_key(name).fullmatch, names) if key):
                color = COLORS[t % len(COLORS)]
                _draw(axes, log, f"routing/iter{t}/{name}", color=color, label=f"iteration {t}")
                _draw(axes, log, f"routing/iter{t}/{name}_worst", color=color, linestyle=":", linewidth=1)
        axes.set(
            xlabel="step", ylabel={"loss": "loss", "aux_loss": "auxiliary loss"}.get(name) or ROUTING_LABELS[name]
        )
        _remove_frame(axes)
    if routing:
        panels[drawn.index(routing[0])].legend(
            frameon=False, fontsize="small", title="dotted: worst layer", title_fontsize="small"
        )
    figure.savefig(path, dpi=DPI)


def _split_key(name: str) -> re.Pattern[str]:
    return re.compile(rf"routing/iter(\d+)/{name}")


def _draw(axes: Axes, log: list[dict[str, Any]], key: str, **options: Any) -> None:
    points = [(entry["step"], entry[key]) for entry in log if key in entry]
    if points:
        axes.plot(*zip(*points, strict=True), **{"linewidth": 1.4, **options})


def _remove_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _choose_layers(
    routing: RoutingStatistics, wanted: Sequence[int] | None, min_iterations: int = 1
) -> dict[int, LayerRouting]:
    if not routing.tokens:
        raise ValueError("No tokens were recorded, so there is nothing to draw.")
    available = {i: layer for i, layer in routing.layers.items() if layer.num_iterations >= min_iterations}
    if wanted is None:
        indices = list(available)
        wanted = indices if len(indices) <= 4 else indices[:2] + indices[-2:]
    if not wanted or not available.keys() >= set(wanted):
        raise ValueError(f"`layers` is {list(wanted)}, but those that can be drawn are {list(available)}.")
    return {index: available[index] for index in wanted}
