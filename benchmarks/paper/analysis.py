# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What finished runs say: losses at equal steps, FLOPs and seconds, paired differences, and verdicts on claims."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, takewhile
from typing import Any, Literal, NamedTuple

from scipy import stats

from benchmarks.paper.experiments import (
    BASELINES,
    REFERENCE,
    RENORM,
    Arm,
    Contrast,
    Experiment,
    paper_loss,
    under_official_rule,
)
from benchmarks.paper.runs import TIMING_SEED, Run, Scale, learning_rate
from benchmarks.upcycling import interval


MEASURES = ("steps", "FLOPs", "seconds")
VERDICTS = HOLDS, DOES_NOT, CANNOT_TELL, MISSING = "holds", "does not", "cannot tell", "not run"

Curve = list[tuple[float, float]]


class Estimate(NamedTuple):
    """A mean with half of its 95 % confidence interval, infinite for a single value."""

    mean: float
    half: float
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __truediv__(self, divisor: float) -> "Estimate":
        return Estimate(self.mean / divisor, self.half / divisor, self.count)


def estimate(values: list[float]) -> Estimate | None:
    """Mean and interval by Student's t; `None` without values."""
    return Estimate(statistics.fmean(values), interval(values), len(values)) if values else None


def paired_difference(pairs: list[tuple[float, float]]) -> Estimate | None:
    """The first's loss less the second's; `None` without pairs."""
    return estimate([loss - against for loss, against in pairs])


def difference_of_means(values: list[float], others: list[float]) -> Estimate | None:
    """The first's mean less the second's, of values that are not paired, with the interval of Welch's t; `None` where
    there are not two of each."""
    count = min(len(values), len(others))
    if count < 2:
        return None
    low, high = stats.ttest_ind(values, others, equal_var=False).confidence_interval(0.95)
    return Estimate(statistics.fmean(values) - statistics.fmean(others), (high - low) / 2, count)


def standard_error(values: list[float]) -> float | None:
    """Of the mean; `None` for a single value."""
    return float(stats.sem(values)) if len(values) > 1 else None


def interpolate(curve: Curve, step: float) -> float:
    """The loss at a step, linear between the evaluations around it.

    Raises:
        ValueError: The curve does not reach it.
    """
    for (left, left_loss), (right, right_loss) in pairwise(curve):
        if left <= step <= right:
            return left_loss + (right_loss - left_loss) * (step - left) / (right - left)
    raise ValueError(f"The curve goes from step {curve[0][0]} to {curve[-1][0]}, so it has no loss at {step}.")


def curve_of(result: Mapping[str, Any]) -> Curve:
    """Held-out losses of the main split over the steps, as far as they are finite."""
    return list(takewhile(lambda point: point[1] is not None, result["held_out"][result["split"]]))


def flops_per_token(result: Mapping[str, Any]) -> float:
    """Forward floating-point operations (2 per multiply-add) that a token costs in products with weights: experts,
    attention, routers and output head. Attention's products of activations are left out."""
    settings = result["settings"]
    width, num_layers, num_experts = (settings[name] for name in ("hidden_size", "num_layers", "num_experts"))
    all_experts = num_layers * (num_experts + settings["shared_experts"]) * 3 * width * settings["expert_width"]
    others = result["non_embedding_parameters"] - all_experts
    again = settings["iterations"] - 1
    if settings["shared_router"]:  # a parameter once, used in every iteration
        others += again * num_layers * num_experts * width
    if settings["variant"] == "loop":  # so is attention here
        others += again * num_layers * attention_weights(settings)
    head = (result["parameters"] - result["non_embedding_parameters"]) // 2
    return result["expert_flops_per_token"] + 2 * (others + head)


def attention_weights(settings: Mapping[str, Any]) -> int:
    """Weights of one layer's attention, with the proportions of `examples/pretrain.py`."""
    width, heads = settings["hidden_size"], settings["num_heads"]
    head, latent = width // heads, width // 2
    rotary = head // 2
    return width * (heads * (head + rotary) + latent + rotary) + latent * heads * 2 * head + heads * head * width


# ---- The rule of the verdicts ---------------------------------------------------------------------------------------


class Bound(NamedTuple):
    """A difference of losses: a share of B's loss, or of the paper's difference relative to its loss of B."""

    share: float
    of: Literal["B's loss", "the paper's difference"]

    def __str__(self) -> str:
        return f"{100 * self.share:g} % of {self.of}" if self.share else "zero"

    def value(self, against: float, paper: tuple[float, float] | None) -> float:
        """The bound for a loss of B; zero where it is a share of what the paper has no figures of."""
        if self.of == "B's loss":
            return self.share * against
        return self.share * against * (paper[0] / paper[1] - 1) if paper else 0.0


class Case(NamedTuple):
    """The verdict on a claim whose whole interval lies on one side of a bound."""

    verdict: str
    side: Literal["below", "above"]
    bound: Bound

    def __str__(self) -> str:
        return f"**{self.verdict}** if the whole interval lies {self.side} {self.bound}"

    def applies(self, difference: Estimate, bound: float) -> bool:
        return difference.high < bound if self.side == "below" else difference.low > bound


class Rule(NamedTuple):
    """How a kind of claim is decided: by the first case that applies; where none does, one cannot tell."""

    claim: str
    cases: tuple[Case, ...]
    note: str

    def __str__(self) -> str:
        return f"{self.claim}: {'; else '.join(map(str, self.cases))}; else **{CANNOT_TELL}**. {self.note}"

    def verdict(self, difference: Estimate, against: float, paper: tuple[float, float] | None) -> str:
        applying = (case for case in self.cases if case.applies(difference, case.bound.value(against, paper)))
        return next((case.verdict for case in applying), CANNOT_TELL)


BETTER = Rule(
    '"A is better than B"',
    (
        Case(DOES_NOT, "above", Bound(0.2, "the paper's difference")),
        Case(HOLDS, "below", Bound(0.0, "B's loss")),
    ),
    "The paper's difference is relative to its loss of B, and zero where it has no figures; that under its own rule "
    "is asked of pre-norm models as well.",
)
MATCHES = Rule(
    '"A matches B"',
    (
        Case(HOLDS, "below", Bound(0.015, "B's loss")),
        Case(DOES_NOT, "above", Bound(0.015, "B's loss")),
    ),
    "This bound is a little more than what separates the paper's own matches (1.0 % and 1.1 %).",
)
PAIRED = (
    "Differences are paired, A - B: of two arms with the same seed, hence the same data in the same order. Their mean "
    "has a 95 % interval by Student's t over the seeds."
)
DIVERGED = f"A claim **{DOES_NOT}** hold if A diverged for a seed for which B did not."


def verdict(
    difference: Estimate | None, against: float | None, matches: bool, paper: tuple[float, float] | None
) -> str:
    """Whether a claim holds, by the rule of its kind.

    Args:
        difference (`Estimate`, *optional*): Of the arm that is claimed to be better (or as good) minus the other.
        against (`float`, *optional*): Loss of the other.
        matches (`bool`): The kind of the claim.
        paper (`tuple[float, float]`, *optional*): The paper's losses of the two.
    """
    if difference is None or against is None:
        return MISSING
    return (MATCHES if matches else BETTER).verdict(difference, against, paper)


# ---- Evidence -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What the runs say about a contrast: losses of both by measure, seed by seed, and the number of seeds for which
    the first diverged and the second did not."""

    contrast: Contrast
    pairs: dict[str, list[tuple[float, float]]]
    diverged: int

    @cached_property
    def differences(self) -> dict[str, Estimate | None]:
        """By measure; `None` without pairs."""
        return {measure: paired_difference(pairs) for measure, pairs in self.pairs.items()}

    @cached_property
    def losses(self) -> dict[str, tuple[float, float] | None]:
        """Means of both by measure; `None` without pairs."""
        return {
            measure: tuple(map(statistics.fmean, zip(*pairs, strict=True))) if pairs else None
            for measure, pairs in self.pairs.items()
        }

    @property
    def paper(self) -> tuple[float, float] | None:
        """The paper's losses, where it has both."""
        return paper_losses(self.contrast.arm, self.contrast.against)

    def relative(self, measure: str = "steps") -> Estimate | None:
        """The difference as a share of the second's loss."""
        losses = self.losses[measure]
        return None if losses is None else self.differences[measure] / losses[1]

    def shares(self, measure: str = "steps") -> list[float]:
        """What `relative` is the mean of, seed by seed."""
        losses = self.losses[measure]
        return [(loss - against) / losses[1] for loss, against in self.pairs[measure]]

    def verdict(self, measure: str = "steps") -> str:
        if self.diverged:
            return DOES_NOT
        contrast = self.contrast
        expected = paper_losses(under_official_rule(contrast.arm), under_official_rule(contrast.against))
        losses = self.losses[measure]
        return verdict(self.differences[measure], losses and losses[1], contrast.matches, expected)


def paper_losses(arm: Arm, against: Arm) -> tuple[float, float] | None:
    losses = paper_loss(arm), paper_loss(against)
    return None if None in losses else losses


class Trend(NamedTuple):
    """What more iterations do to the loss, of models that cost the same."""

    losses: list[float]  # means over seeds, model by model
    differences: list[Estimate]  # from the first model, as shares of its loss
    slope: Estimate  # by what share of the models' mean loss it changes with every further iteration
    seeds: int

    @property
    def verdict(self) -> str:
        """On the loss falling with every further iteration."""
        return verdict(self.slope, 1.0, matches=False, paper=None)


class Standing(NamedTuple):
    """A model beside its rivals."""

    arm: Arm
    loss: float  # mean over seeds
    seeds: int
    differences: list[Estimate | None]  # from each rival, as shares of its loss; `None` where it is one itself
    step: float | None  # time of a training step, as a multiple of the first rival's
    peak: float  # of memory, as a multiple of the first rival's

    @property
    def kind(self) -> Literal["mixture", "chain", "loop", "other"]:
        """A chain iterates inside of its layers and a loop repeats whole layers; stand-ins for a chain are neither."""
        if self.arm.iterations == 1:
            return "mixture"
        kinds = {None: "chain", RENORM: "chain", "loop": "loop", "loop_own": "loop"}
        return kinds.get(self.arm.variant, "other")


def peak_memory(run: Mapping[str, Any]) -> int:
    """Peak of a training run, in bytes above what the process held before; of the device where there is one."""
    return run["peak_device_memory"] or run["peak_memory_above_start"]


class Evidence:
    """The finished runs of a scale, by arm.

    Args:
        scale (`Scale`): The scale.
        results (`Mapping[str, dict]`): Finished runs by id.
    """

    def __init__(self, scale: Scale, results: Mapping[str, dict[str, Any]]):
        self.scale, self.results = scale, results
        self._runs: dict[Arm, dict[int, dict[str, Any]]] = {}

    @cached_property
    def seeds(self) -> list[int]:
        """All seeds that there are runs of, but for those of the learning rate's grid."""
        settings = (result["settings"] for result in self.results.values())
        return sorted({each["seed"] for each in settings if "seed" in each}.difference(self.scale.tuning_seeds))

    def runs(self, arm: Arm) -> dict[int, dict[str, Any]]:
        """Finished runs of an arm by seed, looked up once."""
        if arm not in self._runs:
            rate = learning_rate(self.scale, self.results, arm)
            seeds = [] if rate is None else self.seeds
            ids = {seed: Run(self.scale, arm, rate, seed).id for seed in seeds}
            self._runs[arm] = {seed: self.results[id] for seed, id in ids.items() if id in self.results}
        return self._runs[arm]

    def as_run(self, arm: Arm) -> Arm:
        """The arm whose runs these are: another one, where its own learning rate turns out to be that of all."""
        is_common = arm.own_lr and self.rate is not None and learning_rate(self.scale, self.results, arm) == self.rate
        return replace(arm, own_lr=False) if is_common else arm

    def any_run(self, arm: Arm) -> dict[str, Any] | None:
        return next(iter(self.runs(arm).values()), None)

    def common_seeds(self, experiment: Experiment) -> list[int]:
        """Seeds that all arms of an experiment have runs of, but for arms without any."""
        found = [runs.keys() for arm in experiment.arms if (runs := self.runs(arm))]
        return sorted(set.intersection(*map(set, found))) if found else []

    def final(self, result: dict[str, Any], split: str | None = None) -> float | None:
        """The mean loss of the last evaluations, of the main split or another; `None` where training diverged."""
        curve = result["held_out"][split or result["split"]][-self.scale.late :]
        losses = [loss for _, loss in curve]
        return None if None in losses or curve[-1][0] != self.scale.steps else statistics.fmean(losses)

    def loss_at(self, result: dict[str, Any], step: float) -> float:
        """The mean loss of the last evaluations there would have been if training had ended at a step."""
        curve, distance = curve_of(result), self.scale.shape["eval_steps"]
        return statistics.fmean(interpolate(curve, step - late * distance) for late in range(self.scale.late))

    def timing(self, arm: Arm) -> dict[str, Any] | None:
        """The timing of an arm's training step."""
        return self.results.get(Run(self.scale, arm.model, 0.0, TIMING_SEED, kind="timing").id)

    def cost(self, arm: Arm, measure: str) -> float | None:
        """What a training step of an arm costs, in units that differ by measure; `None` where it was not measured."""
        if measure == "steps":
            return 1.0
        if measure == "FLOPs":
            result = self.any_run(arm)
            return result and flops_per_token(result)
        if arm.model == REFERENCE:
            return 1.0
        timing = self.timing(arm)
        return timing and timing["ratio"]["median"]

    def peak(self, arm: Arm) -> float | None:
        """Peak memory of an arm's training in bytes, the mean over its runs; `None` without any."""
        peaks = [peak_memory(run) for run in self.runs(arm).values()]
        return statistics.fmean(peaks) if peaks else None

    def pairs(self, contrast: Contrast, measure: str, share: float = 1.0) -> list[tuple[float, float]]:
        """Losses of the arm and of the other, seed by seed, when both have spent what the cheaper one spends in all
        its steps, or in a share of them. Seeds for which one diverged are left out."""
        costs = self.cost(contrast.arm, measure), self.cost(contrast.against, measure)
        is_constant = self.scale.schedule == "constant_with_warmup"
        if None in costs or not (is_constant or (measure == "steps" and share == 1)):
            return []  # where the rate falls, a curve's middle is not what a shorter run would reach
        budget = share * self.scale.steps * min(costs)
        runs, others = self.runs(contrast.arm), self.runs(contrast.against)
        ends = [min(budget / cost, self.scale.steps) for cost in costs]
        return [
            (self.loss_at(runs[seed], ends[0]), self.loss_at(others[seed], ends[1]))
            for seed in sorted(runs.keys() & others.keys())
            if None not in (self.final(runs[seed]), self.final(others[seed]))
        ]

    def compare(self, contrast: Contrast) -> Finding:
        """All that the runs say about a contrast."""
        runs, others = self.runs(contrast.arm), self.runs(contrast.against)
        diverged = sum(
            self.final(runs[seed]) is None and self.final(others[seed]) is not None
            for seed in runs.keys() & others.keys()
        )
        return Finding(contrast, {measure: self.pairs(contrast, measure) for measure in MEASURES}, diverged)

    def standings(self, arms: Iterable[Arm], rivals: list[Arm]) -> list[Standing]:
        """The models that have runs, the one with the lowest loss first; none where a rival has no runs."""
        losses = {
            arm: statistics.fmean(finals)
            for arm in dict.fromkeys((*rivals, *arms))
            if (finals := [loss for run in self.runs(arm).values() if (loss := self.final(run)) is not None])
        }
        if not all(rival in losses for rival in rivals):
            return []
        peaks = {arm: self.peak(arm) for arm in losses}
        steps = {arm: self.cost(arm, "seconds") for arm in losses}
        unit = steps[rivals[0]]
        return [
            Standing(
                arm,
                losses[arm],
                len(self.runs(arm)),
                [None if arm == rival else self.compare(Contrast(arm, rival)).relative() for rival in rivals],
                step and unit and step / unit,
                peaks[arm] / peaks[rivals[0]],
            )
            for arm, step in sorted(steps.items(), key=lambda item: losses[item[0]])
        ]

    def trend(self, arms: Sequence[Arm], split: str) -> Trend | None:
        """What more iterations do to the loss on a split, by the seeds that all of the arms have; `None` without such
        seeds. The slope is that of a line through the models of a seed, by least squares."""
        found = [
            {seed: loss for seed, run in self.runs(arm).items() if (loss := self.final(run, split)) is not None}
            for arm in arms
        ]
        seeds = sorted(set.intersection(*map(set, found)))
        if not seeds:
            return None
        losses = [[of_arm[seed] for of_arm in found] for seed in seeds]
        means = list(map(statistics.fmean, zip(*losses, strict=True)))
        differences = [[(loss - of_seed[0]) / means[0] for loss in of_seed] for of_seed in losses]
        counts = [arm.iterations for arm in arms]
        slopes = [statistics.linear_regression(counts, of_seed).slope for of_seed in losses]
        return Trend(
            means,
            [estimate(list(of_arm)) for of_arm in zip(*differences, strict=True)],
            estimate(slopes) / statistics.fmean(means),
            len(seeds),
        )

    def unequal_orders(self, contrasts: list[Contrast]) -> list[str]:
        """Pairs whose runs did not read the same tokens in the same order."""
        return [
            f"{contrast.arm.label} and {contrast.against.label}, seed {seed}"
            for contrast in contrasts
            for seed, result in self.runs(contrast.arm).items()
            if seed in (others := self.runs(contrast.against))
            and others[seed]["order_fingerprint"] != result["order_fingerprint"]
        ]

    @property
    def rate(self) -> float | None:
        """The learning rate of all arms but those with their own."""
        return learning_rate(self.scale, self.results, BASELINES[0])
