# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""How small a difference runs can show: the spread of paired differences between seeds, from runs that are there.

    python -m benchmarks.paper.power

For every data set and training length it takes all pairs of models of one residual rule that were trained with the
same learning rate, and the seeds that both have. The spread is what seeds make of the pair's difference in percent;
the mean difference of a pair plays no part in it.
"""

import argparse
import statistics
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from benchmarks import markdown
from benchmarks.paper import results
from benchmarks.paper.analysis import curve_of


FEWEST_SEEDS = 3
SHARE = 0.01  # the difference that is to be seen
Losses = dict[int, float]


class Spread(NamedTuple):
    """Standard deviations over seeds, as shares of the loss: of a paired difference, of one between runs of different
    seeds, and how many pairs of models and degrees of freedom they are from."""

    paired: float
    unpaired: float
    pairs: int
    freedom: int

    def half(self, seeds: int) -> float:
        """Half of the 95 % interval of a mean of paired differences, as a share of the loss."""
        return float(stats.t.ppf(0.975, df=seeds - 1)) * self.paired / seeds**0.5

    @property
    def seeds(self) -> int:
        """The fewest seeds whose interval reaches no further than `SHARE` to either side."""
        return next(count for count in range(2, 10_000) if self.half(count) <= SHARE)


def late_loss(result: Mapping[str, Any], steps: int, late: int) -> float | None:
    """The mean of the last `late` evaluations up to a step; `None` where training diverged."""
    losses = [loss for step, loss in curve_of(result) if step <= steps][-late:]
    return statistics.fmean(losses) if len(losses) == late and curve_of(result)[-1][0] >= steps else None


def losses_by_model(found: Iterable[Mapping[str, Any]], steps: int, late: int) -> dict[str, Losses]:
    """Losses by seed, by all settings but the seed."""
    losses: dict[str, Losses] = {}
    for result in found:
        settings = {name: value for name, value in result["settings"].items() if name != "seed"}
        if (loss := late_loss(result, steps, late)) is not None:
            losses.setdefault(str(sorted(settings.items(), key=str)), {})[result["settings"]["seed"]] = loss
    return {model: seeds for model, seeds in losses.items() if len(seeds) >= FEWEST_SEEDS}


def spread(models: Iterable[Losses]) -> Spread | None:
    """Over all pairs of models, pooled by their degrees of freedom; `None` where there is no pair."""
    models = list(models)
    paired = unpaired = 0.0
    pairs = freedom = 0
    for first, second in combinations(models, 2):
        seeds = sorted(first.keys() & second.keys())
        if len(seeds) < FEWEST_SEEDS:
            continue
        level = statistics.fmean(second[seed] for seed in seeds)
        differences = [(first[seed] - second[seed]) / level for seed in seeds]
        apart = sum(statistics.variance([losses[seed] / level for seed in seeds]) for losses in (first, second))
        paired += (len(seeds) - 1) * statistics.variance(differences)
        unpaired += (len(seeds) - 1) * apart
        pairs, freedom = pairs + 1, freedom + len(seeds) - 1
    return Spread((paired / freedom) ** 0.5, (unpaired / freedom) ** 0.5, pairs, freedom) if freedom else None


def rows(found: Iterable[Mapping[str, Any]], rates: Iterable[float], lengths: Iterable[int], lates: Iterable[int]):
    """One row of the table each: data, rule, learning rate, steps, evaluations, and what follows."""
    found = [result for result in found if result["settings"]["kind"] == "train"]
    groups: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for result in found:
        settings = result["settings"]
        if settings["lr"] in rates:
            key = settings["data_set"], settings["residual"], settings["lr"]
            groups.setdefault(key, []).append(result)
    for (data, rule, rate), runs in sorted(groups.items()):
        for steps in lengths:
            for late in lates:
                measured = spread(losses_by_model(runs, steps, late).values())
                if measured is not None and rule in ("inner", "prenorm"):
                    yield data, rule, rate, steps, late, measured


def table(found: Iterable[Mapping[str, Any]], **choices: Any) -> list[str]:
    """The rows as lines of Markdown."""
    header = ("data", "rule", "lr", "steps", "evaluations", "paired", "unpaired", "± of 5 seeds", "seeds for ± 1 %")
    cells = [
        (
            *(data, rule, f"{rate:g}", str(steps), str(late)),
            *(f"{100 * each:.2f} %" for each in (measured.paired, measured.unpaired, measured.half(5))),
            f"{measured.seeds} ({measured.pairs} pairs)",
        )
        for data, rule, rate, steps, late, measured in rows(found, **choices)
    ]
    return markdown.table(list(header), cells)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--file", type=Path, default=results.path_of("cpu"), help="JSON lines of finished runs")
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-3])
    parser.add_argument("--lengths", type=int, nargs="+", default=[200, 350, 500], help="steps")
    parser.add_argument("--lates", type=int, nargs="+", default=[1, 2, 3, 5], help="evaluations to average")
    args = parser.parse_args(argv)
    if not args.file.is_file():
        parser.error(f"--file {args.file} does not exist; give one that `benchmarks.paper.run` wrote")
    choices = {"rates": args.rates, "lengths": args.lengths, "lates": args.lates}
    print("\n".join(table(results.load(args.file).values(), **choices)))


if __name__ == "__main__":
    main()
