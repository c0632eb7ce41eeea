# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Writes `RESULTS.md` and its plots from the JSON lines of all scales.

    python -m benchmarks.paper.report
    python -m benchmarks.paper.report --curves ../shared/data/paper_curves    # the paper's curves beside ours

What has not been run is said to be missing; nothing is filled in.
"""

import argparse
import os
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import markdown
from benchmarks.paper import analysis, power, results
from benchmarks.paper.analysis import (
    CANNOT_TELL,
    MEASURES,
    Curve,
    Estimate,
    Evidence,
    Finding,
    Standing,
    Trend,
    peak_memory,
    standard_error,
)
from benchmarks.paper.experiments import (
    BASELINES,
    EXPERIMENTS,
    NORM_AND_SCALE,
    OFFICIAL,
    PREDICTIONS,
    REFERENCE,
    SERIES,
    Arm,
    Contrast,
    Experiment,
    coe,
    moe,
    paper_loss,
    twelfths,
)
from benchmarks.paper.plots import (
    plot_differences,
    plot_experiment,
    plot_ladder,
    plot_standings,
    plot_trends,
    read_paper_curves,
)
from benchmarks.paper.runs import (
    COMMON_OPTIONS,
    LADDER_EXPERIMENTS,
    SCALES,
    SERIES_EXPERIMENTS,
    STABILISED_EXPERIMENTS,
    Run,
    mean_loss,
    plan,
    tuning_runs,
)
from configuration_coe import CoeConfig


HERE = Path(__file__).parent
GIB = 2**30
EARLY = 0.4  # of all steps: where one more look at the differences is taken
ADAMW_BYTES = 16  # of one parameter: weight, gradient and two moments in fp32

RUNGS = tuple(name for name, scale in SCALES.items() if scale.names == LADDER_EXPERIMENTS)
# Those that begin with the contrasts of `headline`.
HEADLINE_EXPERIMENTS = ("figure_3a", "second_data", *LADDER_EXPERIMENTS)

# Published figures: non-embedding parameters in 2**20, GPU memory in GB, and seconds for 1,000 steps.
PAPER_PARAMETERS = {moe(OFFICIAL): 544.51, coe(OFFICIAL, 2, 8): 544.75, coe(OFFICIAL, 2, 4, experts=47): 412.63}
PAPER_PARAMETERS |= {moe(OFFICIAL, depth=2): 1089.01, moe(OFFICIAL, depth=3): 1633.52}
PAPER_MEMORY = {moe(OFFICIAL): 11.70, coe(OFFICIAL, 2, 8): 11.70, coe(OFFICIAL, 2, 4, experts=47): 9.64}
PAPER_MEMORY |= {moe(OFFICIAL, depth=2): 20.21, moe(OFFICIAL, depth=3): 28.71}
MEMORY_CLAIMS = (  # what is claimed, of which arm, against which
    ("CoE-2(4/48) takes less memory than MoE(8/64)", coe(OFFICIAL, 2, 4, experts=47), moe(OFFICIAL)),
    ("CoE-2(8/64) takes less memory than MoE(8/64) of 2x layers", coe(OFFICIAL, 2, 8), moe(OFFICIAL, depth=2)),
)
PAPER_SECONDS = {moe(OFFICIAL): 989, moe(OFFICIAL, 16): 1451, moe(OFFICIAL, 24): 1852, coe(OFFICIAL, 2, 8): 1755}


# ---- Text -----------------------------------------------------------------------------------------------------------


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a table and the empty one that ends it."""
    return [*markdown.table(list(header), rows), ""]


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def mean_and_error(values: list[float]) -> str:
    if not values:
        return "-"
    error = standard_error(values)
    return number(statistics.fmean(values)) + (f" ± {error:.4f}" if error is not None else "")


def with_interval(difference: Estimate | None, digits: int = 4) -> str:
    if difference is None:
        return "-"
    if difference.count == 1:
        return f"{difference.mean:+.{digits}f} (one seed)"
    return f"{difference.mean:+.{digits}f} ± {difference.half:.{digits}f}"


def percent(share: Estimate | None) -> str:
    return "-" if share is None else f"{with_interval(share / 0.01, digits=1)} %"


def pairs_of(experiment: Experiment, difference: Estimate | None) -> str:
    """How many seeds a difference is of, and of how many it is to be."""
    count = difference.count if difference else 0
    return str(count) if count >= experiment.seeds else f"{count} of {experiment.seeds}"


# ---- The answer -----------------------------------------------------------------------------------------------------


def in_short(evidences: Mapping[str, Evidence]) -> list[str]:
    """What a new model gains and pays by each change, and the best of the models whose experts cost the same: one
    screen, in front of everything else."""
    lines = []
    if rungs := [evidences[name] for name in RUNGS if name in evidences]:
        sizes = [rung_size(rung, moe(OFFICIAL)) for rung in rungs]
        lines += [
            "What a model's held-out loss differs by from another's of equal routed FLOPs and steps, in percent, with "
            "the 95 % interval over seeds; below zero the first is better. `step` and `peak`: time of its training "
            "step and peak memory at the first size, as multiples of the other's.",
            "",
            *table(("difference", "data", *sizes, "step", "peak"), changes_of_models(rungs)),
        ]
    if stabilised := evidences.get("stabilised"):
        for data, standings in standings_by_data(stabilised).items():
            best = {each.kind: each for each in reversed(standings)}
            told = (told_standing(best[kind]) for kind in ("mixture", "chain", "loop") if kind in best)
            lines += [
                f"Of models whose experts cost the same (`{stabilised.scale.name}`) on {data}: {'; '.join(told)}.",
                "",
            ]
        lines += [NOT_TRIED, ""]
    return ["## In short", "", *lines] if lines else []


def told_standing(standing: Standing) -> str:
    """A model in a few words, with what it differs by from the plain mixture and from the one with norm and scale."""
    rivals = zip(("plain", "normed and scaled"), standing.differences, strict=True)
    about = [f"{percent(difference)} from the {name} mixture" for name, difference in rivals if difference]
    about += [f"{name} {number(cost, 2)}" for name, cost in (("step", standing.step), ("peak", standing.peak))]
    return f"the best {standing.kind} is **{standing.arm.model.label}**, {number(standing.loss)} ({', '.join(about)})"


def changes_of_models(rungs: list[Evidence]) -> list[list[str]]:
    """The ladder's contrasts that change one thing, a row for each data set: those of mixtures, and iterating where
    the residual rule and the options stay."""
    first, rows = rungs[0], []
    by_data = zip(*(EXPERIMENTS[name].contrasts for name in LADDER_EXPERIMENTS), strict=True)
    contrasts = [contrast for of_each in by_data for contrast in of_each]
    for contrast in sorted(contrasts, key=lambda each: each.arm.iterations):
        arm, against = contrast.arm, contrast.against
        is_same_layer = (arm.residual, arm.stabilisers) == (against.residual, against.stabilisers)
        if arm.iterations > 1 and not is_same_layer:
            continue
        cells = [percent(rung.compare(contrast).relative()) for rung in rungs]
        costs = ((first.cost(each, "seconds"), first.peak(each)) for each in (arm, against))
        ratios = [ours / theirs if ours and theirs else None for ours, theirs in zip(*costs, strict=True)]
        data = first.scale.data[arm.data].name
        rows.append([contrast.label, data, *cells, *(number(ratio, 2) for ratio in ratios)])
    return rows


# ---- Sections -------------------------------------------------------------------------------------------------------


def setting(evidence: Evidence) -> list[str]:
    """What was run, and on what."""
    scale, shape = evidence.scale, evidence.scale.shape
    is_constant = scale.schedule == "constant_with_warmup"
    stages, complete = plan(scale, evidence.results)
    planned = {run.id for stage in stages.values() for run in stage}
    trained = [result for result in evidence.results.values() if result["settings"]["kind"] == "train"]
    used = sum(result["id"] in planned for result in trained)
    machines = dict.fromkeys(machine_of(result["machine"]) for result in trained)
    dates = sorted(result["machine"]["date"] for result in trained)
    unigrams: dict[tuple[str, str], list[float]] = {}
    for result in trained:
        split = result["split"]
        unigrams.setdefault((result["settings"]["data_set"], split), []).append(result["unigram"][split])
    held_out = (
        f"{data}, split {split} (unigram loss {statistics.fmean(losses):.2f})"
        for (data, split), losses in unigrams.items()
    )
    return [
        f"{scale.about[0].upper()}{scale.about[1:]}. Hidden size {shape['hidden_size']}, {scale.layers} layers, "
        f"{shape['num_heads']} heads, experts {shape['expert_width']} wide, vocabulary of at most "
        f"{shape['vocab_size']:,}. "
        f"{shape['steps']:,} steps of {shape['batch_size']} x {shape['block_size']} tokens, "
        f"{scale.training_tokens / 1e6:.2f} million in all; AdamW with betas 0.9 and "
        f"{COMMON_OPTIONS['beta2']:g}, weight decay {COMMON_OPTIONS['weight_decay']:g}, gradients clipped at 1; "
        f"learning rate {'constant' if is_constant else 'falling to zero as a cosine'} after {shape['warmup_steps']} "
        "steps of warm-up; balancing loss "
        f"{COMMON_OPTIONS['aux_loss']:g}. Held-out data: at most {shape['eval_blocks']} blocks of "
        f"{shape['block_size']} tokens; {'; '.join(held_out)}.",
        "",
        f"{used} training runs on {'; '.join(machines)}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"
        + (f"; {len(trained) - used} more in the file are of no experiment." if used < len(trained) else "."),
        "",
        *([f"The loss of a run is the mean of its last {scale.late} evaluations.", ""] if scale.late > 1 else []),
        *(
            []
            if is_constant
            else ["Equal FLOPs and seconds are not compared: a curve's middle is no shorter run.", ""]
        ),
        *([scale.note, ""] if scale.note else []),
        *revisions(evidence),
        *missing_runs(evidence, stages, complete),
        *pairing(evidence),
    ]


def machine_of(machine: Mapping[str, Any]) -> str:
    return (
        f"{machine['device']} ({machine['threads']} thread a run, {machine['cores']} cores, torch {machine['torch']}, "
        f"transformers {machine['transformers']})"
    )


def revisions(evidence: Evidence) -> list[str]:
    """Which code the runs are of, by its fingerprints."""
    codes = Counter(
        (result["code"], f" of commit {commit}" if (commit := result.get("commit")) else "")
        for result in evidence.results.values()
    )
    names = [f"{code}{commit}" for code, commit in codes]
    if len(codes) == 1:
        return [f"All runs are of one version of the code (fingerprint {names[0]}).", ""]
    counts = ", ".join(f"{name} {count}" for name, count in zip(names, codes.values(), strict=True))
    return [f"**Runs of {len(codes)} versions of the code** (fingerprints: {counts}).", ""]


def missing_runs(evidence: Evidence, stages: Mapping[str, list[Run]], complete: bool) -> list[str]:
    """How many runs of which experiment are not there."""
    missing = {name: sum(run.id not in evidence.results for run in stage) for name, stage in stages.items()}
    if complete and not any(missing.values()):
        return []
    counts = ", ".join(f"{name} {count}" for name, count in missing.items() if count)
    total = sum(map(len, stages.values()))
    later = "" if complete else " More depend on the learning rates that these decide."
    return [f"**Missing: {sum(missing.values())} of {total} runs** ({counts}).{later}", ""]


def pairing(evidence: Evidence) -> list[str]:
    """Whether the runs of a pair read the same."""
    contrasts = [contrast for experiment in evidence.scale.experiments for contrast in experiment.contrasts]
    if unequal := evidence.unequal_orders(contrasts):
        return [f"**Not the same tokens in the same order**: {'; '.join(unequal)}.", ""]
    return ["The runs of every pair read the same tokens in the same order, by the fingerprints of their batches.", ""]


def summary(evidence: Evidence) -> list[str]:
    """The headline in a paragraph, from the figures alone."""
    lines = []
    for experiment in evidence.scale.experiments:
        if experiment.name not in HEADLINE_EXPERIMENTS:
            continue
        compared = [evidence.compare(contrast) for contrast in experiment.contrasts]
        if any(finding.differences["steps"] is None for finding in compared):
            continue
        official, prenorm, standard, rule, *_ = compared

        def told(finding: Finding) -> str:
            return f"{percent(finding.relative())} ({finding.verdict()})"

        lines += [
            f"On {data_of(evidence, experiment)}, at equal routed FLOPs and steps "
            f"({pairs_of(experiment, official.differences['steps'])} seeds), the loss of CoE-2(4/64) differs from "
            f"that of MoE(8/64) by {told(official)} under the official residual rule and by {told(prenorm)} as a "
            f"pre-norm chain; under the official rule it differs from the standard pre-norm MoE by {told(standard)}. "
            "The official rule alone, with one iteration, differs from the pre-norm layer by "
            f"{percent(rule.relative())}. Negative is better. In brackets, the verdict on the chain being better; "
            "the paper found -6.2 % under its own rule.",
            "",
        ]
    return lines or ["The headline comparison is not finished.", ""]


NOT_TRIED = (
    "Not tried: other values of the two numbers, other pairs of options, more than six iterations, more than two "
    "loops over whole layers, and these models at other sizes or on other data."
)


def stabilised_arms(evidence: Evidence) -> list[Arm]:
    """The models of a scale whose experts cost what those of MoE(11/64) do."""
    experiments = (each for each in evidence.scale.experiments if each.name in STABILISED_EXPERIMENTS)
    return [arm for experiment in experiments for arm in experiment.arms]


def standings_by_data(evidence: Evidence) -> dict[str, list[Standing]]:
    """By the name of the data, the models of the stabilised experiments beside the plain mixture of equal work and the
    one with the same norm and scale."""
    arms = stabilised_arms(evidence)
    return {
        evidence.scale.data[data].name: evidence.standings(
            [arm for arm in arms if arm.data == data],
            [replace(twelfths(1, **options), data=data) for options in ({}, NORM_AND_SCALE)],
        )
        for data in dict.fromkeys(arm.data for arm in arms)
    }


def stabilised_summary(evidence: Evidence, folder: Path, root: Path) -> list[str]:
    """Every model beside the mixtures it is to beat, the best first: one screen for each data set, and a plot in
    `folder`."""
    by_data, image = standings_by_data(evidence), folder / "models.png"
    count = len({arm.model for arm in stabilised_arms(evidence)})
    rivals = [twelfths(1, **options).model.label for options in ({}, NORM_AND_SCALE)]
    lines = [
        "Losses are means over seeds, differences in percent with the 95 % interval of paired ones. `step` and "
        "`peak`: time of a training step and peak memory, as multiples of the first rival's.",
        "",
    ]
    for data, standings in by_data.items():
        if not standings:
            lines += [f"On {data} the models to compare with have no runs.", ""]
            continue
        first, chain = standings[0], next((each for each in standings if each.kind == "chain"), None)
        lines.append(
            f"On {data}, with experts of equal FLOPs and equal steps, **{first.arm.model.label}** has the lowest "
            f"loss, {number(first.loss)}."
        )
        if chain is not None:
            differences = " and ".join(
                f"{percent(difference)} from {rival}"
                for difference, rival in zip(chain.differences, rivals, strict=True)
            )
            lines[-1] += f" The best chain is **{chain.arm.model.label}**: {differences}."
        if missing := count - len(standings):
            lines[-1] += f" {missing} models have no runs."
        header = ("model", "held-out loss", *(f"against {rival}" for rival in rivals), "step", "peak", "seeds")
        rows = [
            [
                each.arm.model.label,
                number(each.loss),
                *map(percent, each.differences),
                number(each.step, 2),
                number(each.peak, 2),
                str(each.seeds),
            ]
            for each in standings
        ]
        lines += ["", *table(header, rows)]
    if plot_standings(by_data, image):
        lines += [f"![all models]({os.path.relpath(image, root)})", ""]
    return [*lines, NOT_TRIED, ""]


def trends_by_data(evidence: Evidence) -> dict[tuple[str, str], dict[str, Trend]]:
    """By the names of data and split, and of a series of models that cost the same, what more iterations do to it."""
    found: dict[tuple[str, str], dict[str, Trend]] = {}
    for (name, arms), (data, about) in product(SERIES.items(), evidence.scale.data.items()):
        arms = [replace(arm, data=data) for arm in arms]
        splits = (run := evidence.any_run(arms[0])) and run["held_out"]
        for split in splits or ():
            if trend := evidence.trend(arms, split):
                found.setdefault((about.name, split), {})[name] = trend
    return found


def more_iterations(evidence: Evidence, folder: Path, root: Path) -> list[str]:
    """Whether more iterations pay where experts cost the same, with a plot in `folder`."""
    by_data, image = trends_by_data(evidence), folder / "iterations.png"
    is_predicted = evidence.scale.names == SERIES_EXPERIMENTS
    if not by_data:
        return ["No series of models has runs of one seed yet.", ""]
    counts = sorted({arm.iterations for arms in SERIES.values() for arm in arms})
    rows = []
    for (data, split), found in by_data.items():
        for name, trend in found.items():
            losses = dict(zip((arm.iterations for arm in SERIES[name]), trend.losses, strict=True))
            told = f"**{trend.verdict}**" if is_predicted and (name, split) in PREDICTIONS else "-"
            cells = (number(losses.get(count)) for count in counts)
            rows.append([name, data, split, *cells, percent(trend.slope), told, str(trend.seeds)])
    lines = [
        "Held-out losses by number of iterations C, of models whose experts cost the same, means over seeds. `a "
        "further one`: by how many percent of the models' mean the loss changes with every further iteration, the "
        "slope of a line through the models of each seed, with the 95 % interval over seeds; negative is better. "
        + (
            "`falls`: the verdict on the predictions."
            if is_predicted
            else "Looked at after the runs: `more-iterations` asks it again, of other seeds."
        ),
        "",
        *table(
            ("models", "data", "split", *(f"C = {count}" for count in counts), "a further one", "falls", "seeds"), rows
        ),
    ]
    if plot_trends(by_data, image):
        lines += [f"![more iterations]({os.path.relpath(image, root)})", ""]
    return lines


def ladder(found: Mapping[str, Evidence], folder: Path, root: Path) -> list[str]:
    """The differences of the ladder's contrasts at every rung that there are runs of, and the problems solved; its
    plots are drawn into `folder`."""
    evidences = {name: found[name] for name in RUNGS if name in found}
    if not evidences:
        return []
    absent = [name for name in RUNGS if name not in evidences]
    first = EXPERIMENTS[LADDER_EXPERIMENTS[0]]
    sizes = [rung_size(evidence, first.arms[0]) for evidence in evidences.values()]
    lines = [
        "## The ladder",
        "",
        f"{first.title}. Differences of held-out losses, in percent of the second's, with the 95 % interval and the "
        "number of seeds in brackets. Columns: tokens, width, parameters of MoE(8/64) inner; float32 on "
        "CPUs where not said otherwise.",
        "",
        *([f"**No runs of {', '.join(absent)}.**", ""] if absent else []),
    ]
    for name in LADDER_EXPERIMENTS:
        experiment = EXPERIMENTS[name]
        differences = [
            [contrast.label, *(rung_difference(evidence, experiment, contrast) for evidence in evidences.values())]
            for contrast in experiment.contrasts
        ]
        solved = [
            [arm.label, *(share_solved(evidence, arm) for evidence in evidences.values())] for arm in experiment.arms
        ]
        data = data_of(next(iter(evidences.values())), experiment)
        lines += [f"On {data}:", "", *table(("difference", *sizes), differences)]
        lines += changes(list(evidences.values()), sizes, experiment)
        image = folder / f"{name}.png"
        if plot_ladder(list(evidences.values()), experiment, f"{experiment.title} ({data})", image):
            lines += [f"![{experiment.title}]({os.path.relpath(image, root)})", ""]
        if any(cell != "-" for row in solved for cell in row[1:]):
            lines += [
                f"Held-out problems of {data} (the same kinds, other numbers) whose final answer is right, with the "
                "95 % interval over seeds:",
                "",
                *table(("model", *sizes), solved),
            ]
    return lines


def rung_size(evidence: Evidence, arm: Arm) -> str:
    scale, run = evidence.scale, evidence.any_run(arm)
    size = f"{scale.training_tokens / 1e6:.1f} M tokens, width {scale.shape['hidden_size']}"
    size += f", {run['parameters'] / 1e6:.1f} M" if run else ""
    return size + (", bfloat16" if scale.bf16 else "")


def rung_difference(evidence: Evidence, experiment: Experiment, contrast: Contrast) -> str:
    finding = evidence.compare(contrast)
    if (difference := finding.differences["steps"]) is None:
        return "not run"
    return f"{percent(finding.relative())} ({pairs_of(experiment, difference)})"


def changes(evidences: list[Evidence], sizes: list[str], experiment: Experiment) -> list[str]:
    """Whether what chains differ from mixtures by is another at larger rungs than at the first."""
    rows = []
    for contrast in experiment.chain_contrasts:
        first, *others = (evidence.compare(contrast).shares() for evidence in evidences)
        estimates = [analysis.difference_of_means(shares, first) for shares in others]
        if any(estimates):
            rows.append([contrast.label, *map(change, estimates)])
    if not rows:
        return []
    return [
        f"By how many points these differences are others than at {sizes[0]}, with the 95 % interval of Welch's t. "
        "Where it lies below zero, the chain gains on the mixture:",
        "",
        *table(("difference", *sizes[1:]), rows),
    ]


def change(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    word = "gains" if estimate.high < 0 else "loses" if estimate.low > 0 else CANNOT_TELL
    return f"{with_interval(estimate / 0.01, digits=1)}, {word}"


def share_solved(evidence: Evidence, arm: Arm) -> str:
    runs = evidence.runs(arm).values()
    shares = [100 * run["exact_match"][run["split"]] for run in runs if run.get("exact_match")]
    return f"{with_interval(analysis.estimate(shares), digits=1)} %".lstrip("+") if shares else "-"


def power_section(folder: Path) -> list[str]:
    """How small a difference the runs of `cpu` show, and what was chosen by it."""
    found = list(results.load(results.path_of("cpu", folder)).values())
    rows = power.table(found, rates=[4e-3], lengths=[200, 350, 500], lates=[1, 3, 5])
    return ["## How small a difference can be seen", "", *POWER, "", *rows, ""] if found else []


def data_of(evidence: Evidence, experiment: Experiment) -> str:
    """Names of the data that an experiment's models learn from."""
    return " and ".join(dict.fromkeys(evidence.scale.data[arm.data].name for arm in experiment.arms))


SOURCES = {
    "paper": "The paper's, of the models it has measured. That the chain matches a dearer model says something only "
    "where the control, that the dearer model is better than MoE(8/64), holds.",
    "ours": "The same, asked of pre-norm models and of the standard pre-norm MoE, which the paper has not measured.",
    "sceptics": "The sceptics'. Where the chain is not better than MoE(8/64), a scalar that does what the chain "
    "does has nothing to explain.",
}


def claims(evidence: Evidence) -> list[str]:
    """The claims, one a row, by whose they are."""
    compared = [
        (experiment, evidence.compare(contrast))
        for experiment in evidence.scale.experiments
        for contrast in experiment.contrasts
        if contrast.claim is not None
    ]
    verdicts = {claim_as_run(evidence, finding.contrast): finding.verdict() for _, finding in compared}
    counts = Counter(verdicts.values())
    tally = ", ".join(f"{each} {counts[each]}" for each in analysis.VERDICTS if each in counts)
    repeated = len(compared) - len(verdicts)
    lines = [
        "Differences are the first model's loss less the second's, in percent of the second's, with the 95 % "
        "interval. The verdict is on equal steps; at equal FLOPs and seconds it is in the cell. "
        f"Of {len(verdicts)} claims: {tally}."
        + (f" {repeated} of the rows are of the same runs as others and are not counted." if repeated else ""),
        "",
    ]
    header = ("claim", "experiment", "data", "rule", "theirs", "ours", "difference", "verdict", *MEASURES[1:], "seeds")
    for source, about in SOURCES.items():
        rows = [claim_row(evidence, *each) for each in compared if each[1].contrast.source == source]
        lines += [about, "", *table(header, rows)] if rows else []
    return lines


def claim_as_run(evidence: Evidence, contrast: Contrast) -> tuple[str | None, Arm, Arm]:
    """A claim and the runs that it rests on."""
    return contrast.claim, evidence.as_run(contrast.arm), evidence.as_run(contrast.against)


def claim_row(evidence: Evidence, experiment: Experiment, finding: Finding) -> list[str]:
    contrast, theirs = finding.contrast, finding.paper

    def versus(loss: float, against: float) -> str:
        return f"{loss:.4f} vs {against:.4f}"

    return [
        contrast.claim,
        experiment.name,
        evidence.scale.data[contrast.arm.data].name,
        contrast.rule,
        f"{versus(*theirs)} ({theirs[0] / theirs[1] - 1:+.1%})" if theirs else "-",
        versus(*losses) if (losses := finding.losses["steps"]) else "-",
        percent(finding.relative()) + (f", {finding.diverged} diverged" if finding.diverged else ""),
        f"**{finding.verdict()}**",
        *(f"{percent(finding.relative(measure))}, {finding.verdict(measure)}" for measure in MEASURES[1:]),
        pairs_of(experiment, finding.differences["steps"]),
    ]


def learning_rates(evidence: Evidence) -> list[str]:
    """The grid and what was chosen from it."""
    scale = evidence.scale
    if not scale.is_tuned:
        return [f"{scale.learning_rates[0]:g} for all models; nothing is tuned here.", ""]
    own = [arm for experiment in scale.experiments for arm in experiment.arms if arm.own_lr]
    if scale.tunes_on_main:
        own = list(dict.fromkeys(replace(arm, data="main") for arm in own))
    common = BASELINES if scale.needs_common_rate else ()
    grids = {arm: tuning_runs(scale, [arm], evidence.results) for arm in (*common, *own)}
    rates = sorted({run.lr for grid in grids.values() for run in grid})
    rows, on_edge = [], []
    for arm, grid in grids.items():
        means = {run.lr: mean_loss(evidence.results, (each for each in grid if each.lr == run.lr)) for run in grid}
        cells = {rate: "diverged" if loss == float("inf") else number(loss) for rate, loss in means.items()}
        if (best := min((loss for loss in means.values() if loss is not None), default=None)) is not None:
            chosen = next(rate for rate, loss in means.items() if loss == best)
            cells[chosen] = f"**{cells[chosen]}**"
            on_edge += [arm.label] if chosen in (min(means), max(means)) else []
        seeds = str(len({run.seed for run in grid}))
        rows.append([arm.label, scale.data[arm.data].name, seeds, *(cells.get(rate, "-") for rate in rates)])
    lines = ["Mean held-out losses of the grid, over seeds that no other run has."]
    if common:
        lines[0] += (
            " The rate with the lowest mean over the two baselines (the first two rows) is that of all runs but those "
            "with their own."
        )
    if scale.extends_grid:
        lines[0] += " A model whose best rate lies at an edge of its grid gets the next one."
    if scale.tunes_on_main:
        lines[0] += " Every model has its own rate, and the same one on other data."
    lines += [
        "",
        *table(("model", "data", "seeds", *(f"{rate:g}" for rate in rates)), rows),
        *([f"**At the edge of the grid**: {'; '.join(on_edge)}.", ""] if on_edge else []),
    ]
    if not common:
        return lines
    if (chosen := evidence.rate) is None:
        return [*lines, "Not chosen yet.", ""]
    tried = {run.lr for arm in common for run in grids[arm]}  # the scale's own rates, and those that it grew by
    is_on_edge = chosen in (min(tried), max(tried))
    return [*lines, f"Chosen: {chosen:g}{', which lies at the edge of the grid' if is_on_edge else ''}.", ""]


def experiment_section(evidence: Evidence, experiment: Experiment, image: str | None) -> list[str]:
    """Losses of the arms, and their differences by all three measures."""
    lines = [f"### {experiment.name}: {experiment.title}", ""]
    if experiment.note:
        lines += [experiment.note, ""]
    seeds = evidence.common_seeds(experiment)
    rows = [loss_row(evidence, arm, seeds) for arm in experiment.arms if evidence.runs(arm)]
    if not rows:
        return [*lines, "Not run yet.", ""]
    lines += [f"Data: {data_of(evidence, experiment)}. Losses are means over the seeds that all models here have.", ""]
    if same := [arm.label for arm in experiment.arms if evidence.as_run(arm) != arm]:
        lines += [f"Their own rate is that of all models, so these are the same runs: {'; '.join(same)}.", ""]
    lines += table(("model", "seeds", "lr", "held-out loss", "other held-out data", "paper"), rows)
    at_equal = (f"at equal {measure}" for measure in MEASURES)
    rows = []
    for contrast in experiment.contrasts:
        finding = evidence.compare(contrast)
        early = analysis.paired_difference(evidence.pairs(contrast, "steps", share=EARLY))
        cells = map(with_interval, (early, *(finding.differences[measure] for measure in MEASURES)))
        rows.append([contrast.label, *cells, pairs_of(experiment, finding.differences["steps"])])
    lines += table(("difference", f"after {EARLY:.0%} of the steps", *at_equal, "pairs"), rows)
    return [*lines, *([f"![{experiment.title}]({image})", ""] if image else [])]


def loss_row(evidence: Evidence, arm: Arm, seeds: list[int]) -> list[str]:
    runs = {seed: run for seed, run in evidence.runs(arm).items() if seed in seeds}
    first = next(iter(evidence.runs(arm).values()))

    def losses_of(split: str) -> list[float]:
        return [loss for run in runs.values() if (loss := evidence.final(run, split)) is not None]

    losses = losses_of(first["split"])
    others = {name: losses_of(name) for name in first["held_out"] if name != first["split"]}
    return [
        arm.label,
        str(len(runs)) + (f", {len(runs) - len(losses)} diverged" if len(losses) < len(runs) else ""),
        f"{first['settings']['lr']:g}",
        mean_and_error(losses),
        "; ".join(f"{name} {mean_and_error(values)}" for name, values in others.items()) or "-",
        number(paper_loss(arm)),
    ]


def models(evidence: Evidence) -> list[str]:
    """What every model costs, and how its routers behave, each model once."""
    arms = [arm for experiment in evidence.scale.experiments for arm in experiment.arms]
    arms = [arm for arm in arms if not arm.own_lr or replace(arm, own_lr=False) not in arms]
    runs = {arm: found for arm in arms if (found := list(evidence.runs(arm).values()))}
    costs = (
        "model",
        "data",
        "parameters",
        "active",
        "expert MFLOP/token",
        "all",
        "step",
        "paper's",
        "CPU s",
        "s",
        "tokens/s",
        "peak MiB",
        "of these, parameters",
    )
    return [
        "### Cost",
        "",
        "`step`: time of a training step relative to MoE(8/64) inner, median and quartiles of pairs of steps of both "
        "models, run in turn in one process. It is what *equal seconds* goes by: two neighbouring steps share what "
        "slows the machine down; MoE(8/64) inner against itself shows how exact that is. Models are timed with "
        "the tokenizer of arithmetic and count for both data. CPU seconds of whole runs, "
        "made hours apart and two at a time, do not; they, the wall-clock seconds of a step and the tokens per second "
        "are in the columns after it (medians), and compare no models. `peak MiB`: memory of the training "
        "process above what it held before the model was built; `parameters` are weights, gradients and moments. In "
        "narrow models a call costs more than its products, and a chain makes more calls: `benchmarks/README.md` has "
        "the ratio at larger widths.",
        "",
        *table(costs, [cost_row(evidence, arm, found) for arm, found in runs.items()]),
        *memory(evidence),
        "### Routing",
        "",
        "Of the trained models on held-out tokens, means over layers and seeds, by iteration. `entropy`: of the load, "
        "1 if uniform. `MaxVio`: load of the busiest expert over the mean, minus 1. `dead`: share of experts never "
        "chosen. `re-use`: share of an iteration's choices that the one before had made; in brackets that of "
        "independent choices among experts equally likely.",
        "",
        *table(
            ("model", "data", "entropy", "MaxVio", "dead", "re-use"),
            [
                [arm.model.label, evidence.scale.data[arm.data].name, *routing_row(arm, found)]
                for arm, found in runs.items()
            ],
        ),
        *mechanism(evidence, runs),
    ]


def mechanism(evidence: Evidence, runs: Mapping[Arm, list[dict[str, Any]]]) -> list[str]:
    """What each iteration adds, by model and by depth; nothing where no run has it."""
    measured = {
        arm: found
        for arm, each in runs.items()
        if (found := [run["mechanism"] for run in each if run.get("mechanism")])
    }
    if not measured:
        return []

    def over_seeds(values: list[float]) -> str:
        return with_interval(analysis.estimate(values), digits=2)

    def each_iteration(columns: Iterable[Iterable[float]]) -> str:
        """One estimate over seeds for each iteration."""
        return " / ".join(over_seeds(list(column)) for column in columns) or "-"

    def rise(loss: float, without: list[float]) -> list[float]:
        return [100 * (each / loss - 1) for each in without]

    def mean_of_layers(run: Mapping[str, Any], name: str) -> list[float]:
        return [statistics.fmean(column) for column in zip(*(layer[name] for layer in run["layers"]), strict=True)]

    rows, by_depth = [], []
    for arm, found in measured.items():
        name = (arm.model.label, evidence.scale.data[arm.data].name, str(len(found)))
        columns = (zip(*(mean_of_layers(run, part) for run in found), strict=True) for part in ("cosine", "norm"))
        without = zip(*(rise(run["loss"], run["loss_without"]) for run in found), strict=True)
        rows.append((*name, *map(each_iteration, columns), each_iteration(without)))
        if arm.iterations > 1:
            for index in range(len(found[0]["layers"])):
                layers = [run["layers"][index] for run in found]
                cosines = zip(*(layer["cosine"] for layer in layers), strict=True)
                alone = (rise(run["loss"], layer["loss_without"]) for run, layer in zip(found, layers, strict=True))
                cells = each_iteration(cosines), each_iteration(zip(*alone, strict=True))
                by_depth.append((*name[:2], str(layers[0]["layer"]), *cells))
    lines = [
        "### Mechanism",
        "",
        "Of the trained models on held-out tokens, by iteration, with the 95 % interval over seeds. `cosine`: of an "
        "iteration's update, as it is added, and the next one's, mean over tokens and layers. `size`: mean length of "
        "the update. `without`: by how many percent the loss rises when this iteration of all layers adds nothing. "
        "How many experts successive iterations share is under `Routing` (`re-use`).",
        "",
        *table(("model", "data", "seeds", "cosine", "size", "without, %"), rows),
    ]
    if by_depth:
        lines += [
            "By depth: the same cosine in one layer, and by how many percent the loss rises when the iteration of "
            "this layer alone adds nothing.",
            "",
            *table(("model", "data", "layer", "cosine", "without, %"), by_depth),
        ]
    return lines


def memory(evidence: Evidence) -> list[str]:
    """The paper's claims about memory at this scale's size; none where a model of theirs has no run."""
    rows = []
    for (claim, *arms), data in product(MEMORY_CLAIMS, evidence.scale.data):
        ours, theirs = (evidence.runs(replace(arm, data=data)) for arm in arms)
        if seeds := ours.keys() & theirs.keys():
            ratios = [peak_memory(ours[seed]) / peak_memory(theirs[seed]) - 1 for seed in seeds]
            published = tuple(PAPER_MEMORY[arm] for arm in arms)
            measured = analysis.estimate(ratios)
            parameters = ours[min(seeds)]["parameters"] / theirs[min(seeds)]["parameters"] - 1
            found = analysis.verdict(measured, 1.0, matches=False, paper=published)
            shares = f"{published[0] / published[1] - 1:+.1%}", f"{parameters:+.1%}", percent(measured)
            rows.append((claim, evidence.scale.data[data].name, *shares, f"**{found}**", str(len(seeds))))
    if not rows:
        return []
    return [
        "### Memory",
        "",
        "The paper's claims at this size: what parameters, gradients and moments take, and the measured peak, which "
        "holds activations too; these do not shrink with the number of experts.",
        "",
        *table(("claim", "data", "theirs", "parameters", "measured peak", "verdict", "seeds"), rows),
    ]


def cost_row(evidence: Evidence, arm: Arm, runs: list[dict[str, Any]]) -> list[str]:
    first, timing = runs[0], evidence.timing(arm)
    ratio = timing and timing["ratio"]
    return [
        arm.model.label,
        evidence.scale.data[arm.data].name,
        f"{first['parameters']:,}",
        f"{first['active_parameters']:,}",
        number(first["expert_flops_per_token"] / 1e6, 3),
        number(analysis.flops_per_token(first) / 1e6, 3),
        f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})" if ratio else "-",
        number(PAPER_SECONDS[arm.model] / PAPER_SECONDS[REFERENCE] if arm.model in PAPER_SECONDS else None, 2),
        number(statistics.median(run["cpu_seconds_per_step"]["median"] for run in runs), 3),
        number(statistics.median(run["wall_seconds_per_step"]["median"] for run in runs), 3),
        number(statistics.median(run["tokens_per_second"] for run in runs), 0),
        number(evidence.peak(arm) / 2**20, 0),
        number(first["parameters"] * ADAMW_BYTES / 2**20, 0),
    ]


def routing_row(arm: Arm, runs: list[dict[str, Any]]) -> list[str]:
    """Means over layers and seeds, by iteration."""

    def means(part: str, name: str) -> list[float]:
        columns = zip(
            *([entry[name] for entry in layer[part]] for run in runs for layer in run["routing"]), strict=True
        )
        return [statistics.fmean(column) for column in columns]

    cells = [
        " / ".join(number(value, digits) for value in means("iterations", name))
        for name, digits in (("load_entropy", 3), ("max_vio", 2), ("dead_share", 3))
    ]
    reuse = " / ".join(number(value, 3) for value in means("transitions", "reuse"))
    return [*cells, f"{reuse} ({arm.top_k / arm.experts:.3f})" if reuse else "-"]


# ---- What needs no training -----------------------------------------------------------------------------------------


def paper_config(arm: Arm) -> CoeConfig:
    """An arm at the paper's size."""
    return CoeConfig(
        **{"vocab_size": 102_400, "hidden_size": 1024, "num_hidden_layers": 4 * arm.depth, "num_attention_heads": 8},
        **{
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        **{"moe_intermediate_size": 704, "n_routed_experts": arm.experts, "n_shared_experts": arm.shared_experts},
        **{"num_experts_per_tok": arm.top_k, "inner_iter": arm.iterations},
    )


def memory_bytes(arm: Arm) -> int:
    """Weights, gradients and AdamW's moments of an arm at the paper's size, in fp32."""
    return ADAMW_BYTES * paper_config(arm).total_parameters


def arithmetic() -> list[str]:
    """The claims that parameters decide."""
    rows = []
    for arm, published in PAPER_PARAMETERS.items():
        config = paper_config(arm)
        rows.append(
            (
                arm.label,
                number((config.total_parameters - config.embedding_parameters) / 2**20, 2),
                number(published, 2),
                number(memory_bytes(arm) / GIB, 2),
                number(PAPER_MEMORY[arm], 2),
            )
        )
    savings = []
    for claim, arm, against in MEMORY_CLAIMS:
        theirs, ours = PAPER_MEMORY[arm] / PAPER_MEMORY[against] - 1, memory_bytes(arm) / memory_bytes(against) - 1
        found = analysis.HOLDS if abs(theirs - ours) < 0.005 else analysis.DOES_NOT
        savings.append((claim, f"{theirs:+.1%}", f"{ours:+.1%}", f"**{found}**"))
    chained, single = (
        CoeConfig(n_routed_experts=64, num_experts_per_tok=top_k, inner_iter=iterations).expert_combinations
        for top_k, iterations in ((4, 2), (8, 1))
    )
    return [
        "## Claims that need no training",
        "",
        f"At the paper's size, {ADAMW_BYTES} bytes a parameter (weight, gradient, AdamW's two moments; fp32), "
        "embeddings included, activations left out. The published memory is this and 0.07 GiB more: it says what the "
        "parameters say.",
        "",
        *table(
            ("model", "non-embedding parameters, Mi", "published", "memory, GiB", "published, GB"),
            rows,
        ),
        *table(
            ("claim", "theirs", "computed", "verdict"),
            (
                *savings,
                (
                    "CoE-2(4/64) has 823 times the combinations of experts of MoE(8/64): comb(64, 4)^2 / comb(64, 8)",
                    "823x",
                    f"{chained / single:.1f}x",
                    f"**{analysis.DOES_NOT}**",
                ),
            ),
        ),
        "Whether the losses are the same, which is what makes the savings worth something, is the claim of `figure_6` "
        "and of `figure_4`; the memory of the models of a scale is under its `Memory`.",
        "",
    ]


# ---- The whole ------------------------------------------------------------------------------------------------------


METHOD = """\
## How to read it

- **Arms.** `CoE-2(4/64) inner`: two iterations of 4 of 63 routed experts and of the shared one, which makes 64;
  residual rule `inner`, which is the official one. `MoE` is one iteration. `prenorm` is the standard pre-norm residual
  stream, and `MoE(8/64) prenorm` DeepSeek-V2's own layer; the paper compares with `MoE(8/64) inner` only.
- **Equal steps**: the last evaluation of both. **Equal FLOPs**: both curves where the cheaper of the two has spent its
  whole training, by the products with weights of all kinds (`flops_per_token` in `analysis.py`). Routed experts of
  CoE-2(4/64) and MoE(8/64) cost the same, but a chain computes its shared expert in every iteration, so its experts
  cost 10/9. **Equal seconds**: the same with the time of a training step, in CPU seconds of one thread where there is
  no GPU. Losses between evaluations are interpolated linearly; the learning rate is constant after warm-up, so a
  curve's middle is what a shorter run would reach.
- **±** in a difference is half of the 95 % interval by Student's t over seeds, in a mean the standard error. Dozens of
  intervals are looked at: one in twenty misses by chance. It says how much seeds differ and nothing else: the held-out
  texts of GSM8K are the same for all of them, and the times of a step, by which seconds are equal, are each measured
  in one process and known to a few percent (`Cost`).
- Nothing is tuned for the chain only: the learning rate is the best of the two baselines, and `own_learning_rates`
  gives every model the same grid.
"""


POWER = (
    "Standard deviations over seeds of the difference between two models, as a share of the loss, pooled over all "
    "pairs of models of one rule and rate (`benchmarks/paper/power.py`): paired, with the same seed and so the same "
    "batches, and unpaired. `evaluations`: how many of the last ones a run's loss is the mean of. From them, half of "
    "the 95 % interval that five seeds give, and the seeds whose interval is no wider than 1 % to either side.",
)


def scale_section(evidence: Evidence, folder: Path, root: Path, paper: Mapping[Arm, Curve]) -> list[str]:
    """Everything about a scale; its plots are drawn into `folder`."""
    lines = [f"## Scale `{evidence.scale.name}`", "", *setting(evidence)]
    names = set(evidence.scale.names)
    if names.intersection(HEADLINE_EXPERIMENTS):
        lines += summary(evidence)
    if names.intersection(STABILISED_EXPERIMENTS):
        lines += ["### Which model", "", *stabilised_summary(evidence, folder, root)]
    if names.intersection((*STABILISED_EXPERIMENTS, *SERIES_EXPERIMENTS)):
        lines += ["### Do more iterations pay?", "", *more_iterations(evidence, folder, root)]
    lines += ["### Claims", "", *claims(evidence)]
    if plot_differences(evidence, folder / "differences.png"):
        lines += [f"![differences]({os.path.relpath(folder / 'differences.png', root)})", ""]
    lines += ["### Learning rates", "", *learning_rates(evidence)]
    for experiment in evidence.scale.experiments:
        image = folder / f"{experiment.name}.png"
        drawn = plot_experiment(evidence, experiment, paper, image)
        lines += experiment_section(evidence, experiment, os.path.relpath(image, root) if drawn else None)
    return lines + models(evidence)


def load_evidence(folder: Path) -> dict[str, Evidence]:
    """The finished runs of every scale that there are any of, in the order of the scales."""
    loaded = {name: results.load(results.path_of(name, folder)) for name in SCALES}
    return {name: Evidence(SCALES[name], found) for name, found in loaded.items() if found}


def write(output: Path, folder: Path, curves: Path) -> None:
    """Writes the report on all scales that there are runs of."""
    evidences = load_evidence(folder)
    lines = [
        "# The paper's experiments, re-run",
        "",
        "Written by `python -m benchmarks.paper.report` from the JSON lines in `results/`. The rule of the verdicts "
        "was fixed before the runs; the line on divergence was added later.",
        "",
        *in_short(evidences),
        *METHOD.splitlines(),
        "",
        "The rule of the verdicts; the first case that applies decides:",
        "",
        *(f"- {text}" for text in (analysis.PAIRED, analysis.BETTER, analysis.MATCHES, analysis.DIVERGED)),
        "",
    ]
    paper = read_paper_curves(curves)
    for name, evidence in evidences.items():
        lines += scale_section(evidence, results.path_of(name, folder).parent, output.parent, paper)
    lines += ladder(evidences, folder, output.parent)
    lines += power_section(folder)
    lines += arithmetic()
    lines += [
        "## Elsewhere",
        "",
        "A trained mixture of experts that goes on as it is and as a chain (`split`): `benchmarks/upcycling.py`, with "
        "its results in `benchmarks/results/upcycling`.",
    ]
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=HERE / "RESULTS.md", help="plots go beside the JSON lines")
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="folder of the JSON lines")
    default = HERE.parents[2] / "shared" / "data" / "paper_curves"
    parser.add_argument("--curves", type=Path, default=default, help="folder of the paper's curves, if there is one")
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        parser.error(f"--results {args.results} is no folder; give the one that `benchmarks.paper.run` wrote to")
    if not args.output.parent.is_dir():
        parser.error(f"--output {args.output} cannot be written: {args.output.parent} is no folder; make it")
    write(args.output, args.results, args.curves)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
