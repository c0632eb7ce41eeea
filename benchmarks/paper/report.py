# Copyright 2026 The CoE Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Writes `RESULTS.md` and its plots from the JSON lines of all scales.

    python -m benchmarks.paper.report
    python -m benchmarks.paper.report --curves ../shared/data/paper_curves    # the paper's curves beside ours

What has not been run is said to be missing; nothing is filled in.
"""

import argparse
import os
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.paper import analysis, results
from benchmarks.paper.analysis import MEASURES, Comparison, Curve, Estimate, Evidence, standard_error
from benchmarks.paper.experiments import (
    BASELINES,
    EXPERIMENTS,
    FIGURE_3A,
    OFFICIAL,
    PRENORM,
    Arm,
    Experiment,
    coe,
    moe,
)
from benchmarks.paper.plots import plot_differences, plot_experiment, read_paper_curves
from benchmarks.paper.runs import SCALES, mean_loss, plan, tuning_runs
from configuration_coe import CoeConfig


HERE = Path(__file__).parent
GIB = 2**30
ADAMW_BYTES = 16  # of one parameter: weight, gradient and two moments in fp32

# Published figures: non-embedding parameters in 2**20, GPU memory in GB, and seconds for 1,000 steps.
PAPER_PARAMETERS = {moe(OFFICIAL): 544.51, coe(OFFICIAL, 2, 8): 544.75, coe(OFFICIAL, 2, 4, experts=47): 412.63}
PAPER_PARAMETERS |= {moe(OFFICIAL, depth=2): 1089.01, moe(OFFICIAL, depth=3): 1633.52}
PAPER_MEMORY = {coe(OFFICIAL, 2, 8): 11.70, coe(OFFICIAL, 2, 4, experts=47): 9.64}
PAPER_MEMORY |= {moe(OFFICIAL, depth=2): 20.21, moe(OFFICIAL, depth=3): 28.71}
MEMORY_CLAIMS = (  # what is claimed, of which arm, against which
    ("-17.6 %: 48 instead of 64 experts", coe(OFFICIAL, 2, 4, experts=47), coe(OFFICIAL, 2, 8)),
    ("-42 %: CoE-2(8/64) instead of MoE(8/64) of 2x layers", coe(OFFICIAL, 2, 8), moe(OFFICIAL, depth=2)),
)
PAPER_SECONDS = {moe(OFFICIAL): 989, moe(OFFICIAL, 16): 1451, moe(OFFICIAL, 24): 1852, coe(OFFICIAL, 2, 8): 1755}


# ---- Text -----------------------------------------------------------------------------------------------------------


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a Markdown table; the first column is text, the others are figures."""
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def mean_and_error(values: list[float]) -> str:
    if not values:
        return "-"
    error = standard_error(values)
    return number(statistics.fmean(values)) + (f" ± {error:.4f}" if error is not None else "")


def with_interval(difference: Estimate | None) -> str:
    if difference is None:
        return "-"
    if difference.count == 1:
        return f"{difference.mean:+.4f} (one seed)"
    return f"{difference.mean:+.4f} ± {difference.half:.4f}"


# ---- Sections -------------------------------------------------------------------------------------------------------


def setting(evidence: Evidence) -> list[str]:
    """What was run, and on what."""
    scale, shape = evidence.scale, evidence.scale.shape
    trained = [result for result in evidence.results.values() if result["settings"]["kind"] == "train"]
    machines = dict.fromkeys(machine_of(result["machine"]) for result in trained)
    dates = sorted(result["machine"]["date"] for result in trained)
    unigrams = {
        result["settings"]["data"]: f"{result['settings']['data']}, split {result['split']} "
        f"(unigram loss {result['unigram'][result['split']]:.2f})"
        for result in trained
    }
    return [
        f"{scale.about[0].upper()}{scale.about[1:]}. Hidden size {shape['hidden_size']}, {scale.layers} layers, "
        f"{shape['num_heads']} heads, experts {shape['expert_width']} wide, vocabulary {shape['vocab_size']:,}. "
        f"{shape['steps']:,} steps of {shape['batch_size']} x {shape['block_size']} tokens, "
        f"{scale.steps * scale.tokens_per_step / 1e6:.2f} million in all; AdamW with betas 0.9 and 0.95, weight decay "
        f"0.01, gradients clipped at 1; learning rate constant after {shape['warmup_steps']} steps of warm-up; "
        f"balancing loss 0.001. Held-out data: {'; '.join(unigrams.values())}.",
        "",
        f"{len(trained)} training runs on {'; '.join(machines)}, {dates[0]} to {dates[-1]}.",
        "",
        *revisions(evidence),
        *missing_runs(evidence),
        *pairing(evidence),
    ]


def machine_of(machine: Mapping[str, Any]) -> str:
    return (
        f"{machine['device']} ({machine['threads']} thread a run, {machine['cores']} cores, torch {machine['torch']}, "
        f"transformers {machine['transformers']})"
    )


def revisions(evidence: Evidence) -> list[str]:
    """Whether all runs are of the same code, by its fingerprints."""
    codes: dict[str, int] = {}
    for result in evidence.results.values():
        codes[result["code"]] = codes.get(result["code"], 0) + 1
    if len(codes) == 1:
        return []
    counts = ", ".join(f"{code} {count}" for code, count in codes.items())
    return [f"**Runs of {len(codes)} versions of the code** (fingerprints: {counts}).", ""]


def missing_runs(evidence: Evidence) -> list[str]:
    """How many runs of which experiment are not there."""
    stages, complete = plan(evidence.scale, evidence.results)
    missing = {name: sum(run.id not in evidence.results for run in stage) for name, stage in stages.items()}
    if complete and not any(missing.values()):
        return []
    counts = ", ".join(f"{name} {count}" for name, count in missing.items() if count)
    total = sum(map(len, stages.values()))
    later = "" if complete else " More depend on the learning rates that these decide."
    return [f"**Missing: {sum(missing.values())} of {total} runs** ({counts}).{later}", ""]


def pairing(evidence: Evidence) -> list[str]:
    """Whether the runs of a pair read the same."""
    contrasts = [contrast for name in evidence.scale.experiments for contrast in EXPERIMENTS[name].contrasts]
    if unequal := evidence.unequal_orders(contrasts):
        return [f"**Not the same tokens in the same order**: {'; '.join(unequal)}.", ""]
    return ["The runs of every pair read the same tokens in the same order, by the fingerprints of their batches.", ""]


def summary(evidence: Evidence) -> list[str]:
    """The headline in a paragraph, from the figures alone."""
    compared = [evidence.compare(contrast) for contrast in FIGURE_3A.contrasts]
    if any(comparison.differences["steps"] is None for comparison in compared):
        return ["The headline comparison is not finished.", ""]
    official, prenorm, standard, rule, _ = compared

    def told(comparison: Comparison) -> str:
        return f"{with_interval(comparison.differences['steps'])} ({comparison.verdict()})"

    return [
        f"At equal routed FLOPs and steps ({official.differences['steps'].count} seeds), CoE-2(4/64) differs from "
        f"MoE(8/64) by {told(official)} under the official residual rule and by {told(prenorm)} as a pre-norm chain; "
        f"under the official rule it differs from the standard pre-norm MoE by {told(standard)}. The official rule "
        f"alone, with one iteration, differs from the pre-norm layer by {with_interval(rule.differences['steps'])}. "
        "Negative is better; nats per token. In brackets, whether the paper's claim holds here.",
        "",
    ]


def claims(evidence: Evidence) -> list[str]:
    """The paper's claims, and the sceptics', one a row."""
    compared = [
        (name, evidence.compare(contrast))
        for name in evidence.scale.experiments
        for contrast in EXPERIMENTS[name].contrasts
        if contrast.claim is not None
    ]
    header = ("claim", "experiment", "rule", "theirs", "ours", "difference", "verdict", *MEASURES[1:])
    return table(header, [claim_row(name, comparison) for name, comparison in compared])


def claim_row(name: str, comparison: Comparison) -> list[str]:
    contrast = comparison.contrast

    def pair(losses: tuple[float | None, float | None] | None) -> str:
        if losses is None or None in losses:
            return "-"
        return f"{losses[0]:.4f} vs {losses[1]:.4f} ({losses[0] / losses[1] - 1:+.1%})"

    return [
        contrast.claim + ("" if contrast.by == "paper" else f" ({contrast.by})"),
        name,
        contrast.arm.residual,
        pair(comparison.paper),
        pair((comparison.loss, comparison.against)),
        with_interval(comparison.differences["steps"]),
        f"**{comparison.verdict()}**",
        *(
            f"{with_interval(comparison.differences[measure])}, {comparison.verdict(measure)}"
            for measure in MEASURES[1:]
        ),
    ]


def learning_rates(evidence: Evidence) -> list[str]:
    """The grid and what was chosen from it."""
    scale, rates = evidence.scale, evidence.scale.learning_rates
    arms = [arm.model for name in scale.experiments for arm in EXPERIMENTS[name].arms if arm.own_lr]
    rows = []
    for arm in dict.fromkeys((*BASELINES, *arms)):
        grid = tuning_runs(scale, [arm])
        losses = [mean_loss(evidence.results, (run for run in grid if run.lr == rate)) for rate in rates]
        best = min((loss for loss in losses if loss is not None), default=None)
        cells = ["diverged" if loss == float("inf") else number(loss) for loss in losses]
        for column, loss in enumerate(losses):
            if loss is not None and loss == best:
                cells[column] = f"**{cells[column]}**"
        rows.append([arm.label, *cells])
    lines = [
        f"Means over {len(scale.tuning_seeds)} seed(s) that no other run has. The rate with the lowest mean over the "
        "two baselines (the first two rows) is that of all runs but those with their own.",
        "",
        *table(("held-out loss", *(f"{rate:g}" for rate in rates)), rows),
    ]
    if (chosen := evidence.rate) is None:
        return [*lines, "Not chosen yet.", ""]
    edge = chosen in (min(rates), max(rates))
    return [*lines, f"Chosen: {chosen:g}{', which lies at the edge of the grid' if edge else ''}.", ""]


def experiment_section(evidence: Evidence, experiment: Experiment, image: str | None) -> list[str]:
    """Losses of the arms, and their differences by all three measures."""
    lines = [f"### {experiment.name}: {experiment.title}", ""]
    if experiment.note:
        lines += [experiment.note, ""]
    rows = [loss_row(evidence, arm) for arm in experiment.arms if evidence.runs(arm)]
    if not rows:
        return [*lines, "Not run yet.", ""]
    lines += table(("model", "seeds", "lr", "held-out loss", "other held-out data", "paper"), rows)
    compared = map(evidence.compare, experiment.contrasts)
    rows = [
        [
            comparison.contrast.label,
            *(with_interval(comparison.differences[measure]) for measure in MEASURES),
            str(max(difference.count if difference else 0 for difference in comparison.differences.values())),
        ]
        for comparison in compared
    ]
    lines += table(("difference", *(f"at equal {measure}" for measure in MEASURES), "pairs"), rows)
    return [*lines, *([f"![{experiment.title}]({image})", ""] if image else [])]


def loss_row(evidence: Evidence, arm: Arm) -> list[str]:
    runs = evidence.runs(arm)
    first, losses = next(iter(runs.values())), evidence.losses(arm)
    others = {name: evidence.losses(arm, name) for name in first["held_out"] if name != first["split"]}
    return [
        arm.label,
        str(len(runs)) + (f", {len(runs) - len(losses)} diverged" if len(losses) < len(runs) else ""),
        f"{first['settings']['lr']:g}",
        mean_and_error(losses),
        "; ".join(f"{name} {mean_and_error(values)}" for name, values in others.items()) or "-",
        number(paper_figure(arm)),
    ]


def paper_figure(arm: Arm) -> float | None:
    """The paper's loss of exactly this arm."""
    return None if arm.residual == PRENORM else analysis.paper_loss(arm)


def models(evidence: Evidence) -> list[str]:
    """What every model costs, and how its routers behave, each model once."""
    arms = dict.fromkeys(arm.model for name in evidence.scale.experiments for arm in EXPERIMENTS[name].arms)
    runs = {arm: found for arm in arms if (found := list(evidence.runs(arm).values()))}
    costs = (
        *("model", "parameters", "active", "expert MFLOP/token", "step", "paper's", "CPU s", "s", "tokens/s"),
        *("peak MiB", "of these, parameters"),
    )
    return [
        "### Cost",
        "",
        "`step`: time of a training step relative to MoE(8/64) inner, median and quartiles of pairs of steps of both "
        "models, run in turn in one process. It is what *equal seconds* goes by: two neighbouring steps share what "
        "slows the machine down. CPU seconds of whole runs, made hours apart and two at a time, do not; they and the "
        "wall-clock seconds of a step are in the columns after it (medians). `peak MiB`: memory of the training "
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
        "independent choices.",
        "",
        *table(
            ("model", "entropy", "MaxVio", "dead", "re-use"),
            [[arm.label, *routing_row(arm, found)] for arm, found in runs.items()],
        ),
    ]


def peak_memory(runs: list[dict[str, Any]]) -> float:
    """Mean peak of training runs, in bytes above what the process held before; of the device where there is one."""
    return statistics.fmean(run["peak_device_memory"] or run["peak_memory_above_start"] for run in runs)


def memory(evidence: Evidence) -> list[str]:
    """The paper's claims about memory at this scale's size; none where a model of theirs has no run."""
    rows = []
    for claim, *arms in MEMORY_CLAIMS:
        ours, theirs = (list(evidence.runs(arm).values()) for arm in arms)
        if ours and theirs:
            parameters = ours[0]["parameters"] / theirs[0]["parameters"] - 1
            rows.append((claim, f"{parameters:+.1%}", f"{peak_memory(ours) / peak_memory(theirs) - 1:+.1%}"))
    if not rows:
        return []
    return [
        "### Memory",
        "",
        "The paper's claims at this size: what parameters, gradients and moments take, and the measured peak, which "
        "holds activations too.",
        "",
        *table(("claim", "parameters", "measured peak"), rows),
    ]


def cost_row(evidence: Evidence, arm: Arm, runs: list[dict[str, Any]]) -> list[str]:
    first, timing = runs[0], evidence.timing(arm)
    ratio = timing and timing["ratio"]
    return [
        arm.label,
        f"{first['parameters']:,}",
        f"{first['active_parameters']:,}",
        number(first["expert_flops_per_token"] / 1e6, 3),
        f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})" if ratio else "-",
        number(PAPER_SECONDS[arm] / PAPER_SECONDS[BASELINES[0]] if arm in PAPER_SECONDS else None, 2),
        number(statistics.median(run["cpu_seconds_per_step"]["median"] for run in runs), 3),
        number(statistics.median(run["wall_seconds_per_step"]["median"] for run in runs), 3),
        number(statistics.median(run["tokens_per_second"] for run in runs), 0),
        number(peak_memory(runs) / 2**20, 0),
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
    for arm in dict.fromkeys((*PAPER_PARAMETERS, *PAPER_MEMORY)):
        config = paper_config(arm)
        rows.append(
            (
                arm.label,
                number((config.total_parameters - config.embedding_parameters) / 2**20, 2),
                number(PAPER_PARAMETERS.get(arm), 2),
                number(memory_bytes(arm) / GIB, 2),
                number(PAPER_MEMORY.get(arm), 2),
            )
        )
    saved = {claim: memory_bytes(arm) / memory_bytes(against) - 1 for claim, arm, against in MEMORY_CLAIMS}
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
            ("claim", "computed", "verdict"),
            (
                *((claim, f"{share:+.1%}", "holds, as arithmetic") for claim, share in saved.items()),
                (
                    "823x the combinations of experts",
                    f"{chained / single:.1f}x",
                    "does not: comb(64, 4)^2 / comb(64, 8) is 91.2",
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

- **Arms.** `CoE-2(4/64) inner`: two iterations of 4 out of 64 experts (the shared one counted), residual rule `inner`,
  which is the official one. `MoE` is one iteration. `prenorm` is the standard pre-norm residual stream, and
  `MoE(8/64) prenorm` DeepSeek-V2's own layer; the paper compares with `MoE(8/64) inner` only.
- **Equal steps**: the last evaluation of both. **Equal expert FLOPs**: both curves where the cheaper of the two has
  spent its whole training, by `CoeConfig.expert_flops_per_token`, routed and shared experts counted: a chain computes
  its shared expert in every iteration, so CoE-2(4/64) costs 10/9 of MoE(8/64) although the routed experts cost the
  same. **Equal seconds**: the same with the time of a training step. Losses between evaluations are interpolated
  linearly; the learning rate is constant after warm-up, so a curve's middle is what a shorter run would reach.
  Attention and routers are no part of the FLOPs; they are part of the seconds.
- **±** in a difference is half of the 95 % interval by Student's t over seeds, in a mean the standard error. Dozens of
  intervals are looked at: one in twenty misses by chance.
- Nothing is tuned for the chain only.
"""


def scale_section(evidence: Evidence, folder: Path, root: Path, paper: Mapping[Arm, Curve]) -> list[str]:
    """Everything about a scale; its plots are drawn into `folder`."""
    lines = [f"## Scale `{evidence.scale.name}`", "", *setting(evidence), *summary(evidence)]
    lines += ["### Claims", "", *claims(evidence)]
    if plot_differences(evidence, folder / "differences.png"):
        lines += [f"![differences]({os.path.relpath(folder / 'differences.png', root)})", ""]
    lines += ["### Learning rates", "", *learning_rates(evidence)]
    for name in evidence.scale.experiments:
        image = folder / f"{name}.png"
        drawn = plot_experiment(evidence, EXPERIMENTS[name], paper, image)
        lines += experiment_section(evidence, EXPERIMENTS[name], os.path.relpath(image, root) if drawn else None)
    return lines + models(evidence)


def write(output: Path, folder: Path, curves: Path) -> None:
    """Writes the report on all scales that there are runs of."""
    lines = [
        "# The paper's experiments, re-run",
        "",
        "Written by `python -m benchmarks.paper.report` from the JSON lines in `results/`, by rules that were fixed "
        "before the runs (`analysis.py`).",
        "",
        *METHOD.splitlines(),
        "",
        "The rule of the verdicts:",
        "",
        *analysis.__doc__.partition("before the runs:\n\n")[2].splitlines(),
        "",
    ]
    paper = read_paper_curves(curves)
    for name, scale in SCALES.items():
        path = results.path_of(name, folder)
        if found := results.load(path):
            lines += scale_section(Evidence(scale, found), path.parent, output.parent, paper)
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
    write(args.output, args.results, args.curves)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
