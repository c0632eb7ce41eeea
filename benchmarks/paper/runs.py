# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""How it is run: scales, runs and their order.

A [`Scale`] says how wide the models are and how long they train. A [`Run`] is an arm with everything resolved. Its
settings, all that decides what it computes, are its identity: experiments that need the same run share it, and a run
with any other setting is another one. Where it is written, on what machine and by what version of the code is none of
its settings; `worker.py` writes these beside them.

The learning rate is tuned once, for the two baselines and for nothing else, and then used by all. `own_lr` arms use
the best of the same grid for their own model instead.
"""

import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, Literal

from benchmarks.paper.experiments import BASELINES, EXPERIMENTS, REFERENCE, RENORM, Arm, Experiment


TIMING_SEED, TIMING_RATE = 0, 1e-4
WARM_UP = 3  # steps of a timing that do not count
# Options that all runs have in common.
COMMON_OPTIONS = {"weight_decay": 0.01, "beta2": 0.95, "aux_loss": 0.001}
COMMON_OPTIONS |= {"model": None, "init_range": None}
CPU_KERNEL = "grouped_mm"  # of the experts: a run that is computed again has the same bits
# Settings that `examples/pretrain.py` does not have.
OWN_SETTINGS = ("kind", "variant", "bf16", "cpu_kernel", "data_set", "split", "timed_steps", "reference", "problems")
Kind = Literal["train", "timing"]
STABILISED_EXPERIMENTS = ("stabilised", "norm_and_scale", "stabilised_second_data", "norm_and_scale_second_data")
LADDER_EXPERIMENTS = ("ladder", "ladder_second_data")
SERIES_EXPERIMENTS = ("more_iterations",)
PAPER_EXPERIMENTS = tuple(
    name for name in EXPERIMENTS if name not in (*STABILISED_EXPERIMENTS, *SERIES_EXPERIMENTS, *LADDER_EXPERIMENTS)
)


# ---- Scales ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Data of `examples/pretrain.py`: a name, the held-out split that losses are quoted of, how many problems of each
    split a trained model is asked to solve, and its options, where `{root}` is the folder of the runner's
    `--data-root`."""

    name: str
    split: str = "held_out"
    problems: int = 0
    data: str | None = None
    eval_data: str | None = None
    data_config: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    eval_fraction: float = 0.05
    prompt_column: str = "question"
    answer_column: str = "answer"
    tokenizer: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("name", "split", "problems")}


ARITHMETIC = Data("arithmetic", "numbers")
SOLVED_ARITHMETIC = replace(ARITHMETIC, problems=200)
GSM8K = Data("gsm8k", data="{root}/gsm8k/train.parquet", eval_data="{root}/gsm8k/test.parquet")
META_MATH = Data(
    "metamathqa",
    data="meta-math/MetaMathQA",
    prompt_column="query",
    answer_column="response",
    eval_fraction=0.01,
    tokenizer="deepseek-ai/DeepSeek-V2-Lite",
)


@dataclass(frozen=True)
class Scale:
    """Width, training length and grid of learning rates. Proportions are the paper's: experts are 11/16 as wide as the
    stream, and `examples/pretrain.py` gives the heads and latents theirs.

    Args:
        shape (`dict[str, int]`): Options of `examples/pretrain.py` that all arms share.
        layers (`int`): Of an arm with `depth=1`.
        learning_rates (`tuple[float, ...]`): The grid. A single one that is not extended is that of all models.
        tuning_seeds (`tuple[int, ...]`): Seeds of the grid, which no other run has.
        own_tuning_seeds (`tuple[int, ...]`): Those of them that an arm's own grid has.
        seeds (`tuple[int, ...]`): As many as the experiments with most seeds want.
        data (`dict[str, Data]`): Those of the arms' `data`.
        names (`tuple[str, ...]`): Of the experiments, by default those that the paper made and those that answer it.
        on_second_data (`tuple[str, ...]`): Names of those that use the second data set instead of the main one.
        bf16 (`bool`): Trains in mixed precision.
        minutes (`float`): Rough time of a run of MoE(8/64), to estimate with.
        jobs (`int`): Runs at a time.
        timed_steps (`int`): Pairs of steps in a timing run.
        schedule (`str`): Of the learning rate.
        late (`int`): The loss of a run is the mean of its last so many evaluations.
        extends_grid (`bool`): Where the best rate lies at an edge of the grid, the grid gets the next one.
        tunes_on_main (`bool`): An arm of its own rate has that of the main data on the second data set too.
        note (`str`): What a reader of its results should know.
    """

    name: str
    about: str
    shape: dict[str, int]
    layers: int
    learning_rates: tuple[float, ...]
    data: dict[str, Data]
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    tuning_seeds: tuple[int, ...] = (0,)
    own_tuning_seeds: tuple[int, ...] = (0,)
    names: tuple[str, ...] = PAPER_EXPERIMENTS
    on_second_data: tuple[str, ...] = ()
    bf16: bool = False
    minutes: float = 1.0
    jobs: int = 1
    timed_steps: int = 15
    schedule: str = "constant_with_warmup"
    late: int = 1
    extends_grid: bool = False
    tunes_on_main: bool = False
    note: str = ""

    @cached_property
    def experiments(self) -> list[Experiment]:
        """What is run, in this order."""
        return [self.experiment(name) for name in self.names]

    def experiment(self, name: str) -> Experiment:
        """One of them, with the scale's data."""
        return EXPERIMENTS[name].on("second") if name in self.on_second_data else EXPERIMENTS[name]

    @property
    def is_tuned(self) -> bool:
        """Whether there is more than one learning rate to choose from."""
        return len(self.learning_rates) > 1 or self.extends_grid

    @property
    def needs_common_rate(self) -> bool:
        """Whether any arm has the learning rate that is tuned for the baselines."""
        return any(not arm.own_lr for experiment in self.experiments for arm in experiment.arms)

    @property
    def steps(self) -> int:
        return self.shape["steps"]

    @property
    def tokens_per_step(self) -> int:
        return self.shape["batch_size"] * self.shape["block_size"]

    @property
    def training_tokens(self) -> int:
        return self.steps * self.tokens_per_step


def _shape(
    hidden: int, heads: int, vocab: int, block: int, batch: int, steps: int, evals: int, eval_blocks: int
) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_heads": heads,
        "expert_width": hidden * 11 // 16,
        "vocab_size": vocab,
        "block_size": block,
        "batch_size": batch,
        "steps": steps,
        "warmup_steps": steps // 10,
        "log_steps": max(1, steps // 50),
        "eval_steps": steps // evals,
        "eval_blocks": eval_blocks,
    }


def _rung(name: str, about: str, minutes: float, rates: tuple[float, ...], bf16: bool = False, **shape: int) -> Scale:
    """A rung of the ladder: today's size but for what `shape` says, and a rate that falls to zero, so that every rung
    is a whole training run."""
    common = {"hidden": 64, "heads": 4, "vocab": 1024, "block": 128, "batch": 8, "steps": 500}
    return Scale(
        f"ladder-{name}",
        f"the ladder's rung of {about}",
        _shape(**common | shape, evals=10, eval_blocks=128),
        layers=4,
        learning_rates=rates,
        data={"main": GSM8K, "second": SOLVED_ARITHMETIC},
        names=LADDER_EXPERIMENTS,
        bf16=bf16,
        schedule="cosine",
        extends_grid=True,
        minutes=minutes,
        note=LADDER_NOTE,
    )


# Written before the runs.
STABILISED_NOTE = (
    "Chosen before the runs, by the spread between the seeds of `cpu` (`How small a difference can be seen`). GSM8K "
    "decides: at a constant rate and the mean of the last five evaluations, five seeds show a difference of 1 %; "
    "longer training at that rate spreads the seeds further. On arithmetic no average does: there the seeds differ in "
    "when a skill is learned, so it is reported with its interval and nothing is decided by it. The rate falls to "
    "zero, which leaves no noise of late steps to average over, and better models; the last evaluation counts. Runs "
    "of a pair read the same batches. Five seeds. Every model has the best rate of its own grid, of one seed, on "
    "GSM8K. The middle of the grid is from nine runs of MoE(8/64) and CoE-2(4/64) with such a rate. Written after the "
    "runs: one of them, made again with the same commit, gave the same figures to the last digit; with later code, "
    "whose products round differently, a loss 0.15 % away."
)
SERIES_NOTE = (
    "Written before the runs. Those of `stabilised` had been looked at: there every further iteration lowers the loss "
    "of plain models on arithmetic by 1.8 ± 1.5 % with new numbers and by 2.0 ± 2.0 % on new kinds of problems, and "
    "with norm and scale by 1.2 ± 0.9 % on new kinds alone; on GSM8K it raises the loss by 0.1 ± 0.1 and 0.3 ± 0.2 %. "
    "Nobody had asked that beforehand, and of so many intervals some lie below zero by chance. So it is asked again, "
    "of ten seeds that no run has had: that the loss of plain models falls with every further iteration on `numbers`, "
    "that the loss of models with norm and scale does on `templates`, and that plain CoE-4 is better than the mixture "
    "on `numbers`. The rate is 0.008 for all, the best of its own grid for every one of these models but CoE-2 with "
    "norm and scale (0.016). Whatever else the runs show is a first look again."
)
LADDER_NOTE = (
    "The rate is that of the two baselines together, on GSM8K, of one seed; the grids of the first three rungs begin "
    "where runs of both in bfloat16, on a GPU, were best. Three seeds. GSM8K has 1.7 million tokens: longer training "
    "reads it several times; the arithmetic problems never repeat. Widths 256 and 512 are too much for two CPU cores: "
    "they are trained on a GPU, by autocast to bfloat16, 256 with the batches of the other rungs and 512 with four "
    "times as many tokens a step. Their runs shared the GPU, so no step was timed."
)
HEADLINE = ("figure_3a", "residual_rules", "own_learning_rates")
SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "smoke",
            "a few steps of a tiny model: tries the programs, measures nothing",
            _shape(hidden=16, heads=2, vocab=300, block=32, batch=2, steps=4, evals=2, eval_blocks=2),
            layers=1,
            learning_rates=(1e-3, 4e-3),
            data={"main": ARITHMETIC, "second": GSM8K},
            seeds=(1, 2),
            names=("figure_3a",),
            minutes=0.2,
            jobs=2,
            timed_steps=2,
        ),
        Scale(
            "cpu",
            "hours on two CPU cores",
            _shape(hidden=64, heads=4, vocab=1024, block=128, batch=8, steps=500, evals=10, eval_blocks=128),
            layers=4,
            learning_rates=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
            tuning_seeds=(0, 100, 200),
            data={"main": ARITHMETIC, "second": GSM8K},
            # Pairs of seeds differ less there.
            on_second_data=tuple(name for name in PAPER_EXPERIMENTS if name not in ("figure_3a", "residual_rules")),
            minutes=2.6,
            jobs=2,
            note="Changed after the first results, by how much seeds differ: the grid of learning rates was extended "
            "to 0.016 and from one seed to three, `figure_3a` from three seeds to eight, and all experiments but the "
            "first two moved from arithmetic to GSM8K, where a fifth of the paper's effect can be seen with fewer "
            "seeds. After a report on three seeds, all but the tables of residual rules went on to five. The claims "
            "about `both` and the controls were added later as well. The learning rate stayed that of the baselines "
            "on arithmetic. Runs from before that are still in the file. All are of commit cf36f65; four of them, "
            "made again with later code, gave the same figures. Their ids were computed anew twice: when what all "
            "runs have in common became part of a run's identity, and when its command line, which said the same "
            "again, ceased to be. The settings that they stand for now are, one by one, those that the programs of "
            "that commit resolve the published runs to; `former_ids` are a run's ids until then, oldest first.",
        ),
        Scale(
            "gpu-hour",
            "an hour or two of one H100, and as many more for the stabilised chains",
            _shape(hidden=512, heads=8, vocab=1024, block=256, batch=16, steps=1000, evals=20, eval_blocks=128),
            layers=4,
            learning_rates=(2.5e-4, 5e-4, 1e-3, 2e-3),
            data={"main": ARITHMETIC, "second": GSM8K},
            names=(*HEADLINE, "ladder", "stabilised"),
            bf16=True,
            minutes=1.5,
        ),
        Scale(
            "paper",
            "the paper's own set-up, about half an hour of one H100 a run",
            _shape(hidden=1024, heads=8, vocab=102_400, block=512, batch=64, steps=1000, evals=100, eval_blocks=256),
            layers=4,
            learning_rates=(1.5e-4, 3e-4, 6e-4),
            data={"main": META_MATH, "second": GSM8K},
            names=(*PAPER_EXPERIMENTS, "stabilised"),
            bf16=True,
            minutes=17.0,
        ),
        Scale(
            "stabilised",
            "a night on one CPU core",
            _shape(hidden=64, heads=4, vocab=1024, block=128, batch=8, steps=500, evals=10, eval_blocks=128),
            layers=4,
            learning_rates=(4e-3, 8e-3, 1.6e-2),
            data={"main": GSM8K, "second": ARITHMETIC},
            names=STABILISED_EXPERIMENTS,
            schedule="cosine",
            extends_grid=True,
            tunes_on_main=True,
            minutes=2.4,
            note=STABILISED_NOTE,
        ),
        Scale(
            "more-iterations",
            "two hours of one CPU core",
            _shape(hidden=64, heads=4, vocab=1024, block=128, batch=8, steps=500, evals=10, eval_blocks=128),
            layers=4,
            learning_rates=(8e-3,),
            data={"main": ARITHMETIC, "second": GSM8K},
            seeds=tuple(range(6, 16)),
            names=SERIES_EXPERIMENTS,
            schedule="cosine",
            minutes=2.4,
            note=SERIES_NOTE,
        ),
        # In the order in which they are to be run.
        _rung("0.5m", "0.5 million tokens and width 64", 2.2, (4e-3, 8e-3, 1.6e-2)),
        _rung("128", "width 128", 6.0, (2e-3, 4e-3), hidden=128),
        _rung("2m", "2 million tokens", 8.5, (8e-3, 1.6e-2), steps=2000),
        _rung("256", "width 256, on a GPU", 1.0, (1e-3, 2e-3, 4e-3), bf16=True, hidden=256),
        _rung(
            "512",
            "width 512 and 2 million tokens, on a GPU",
            1.2,
            (1e-3, 2e-3, 4e-3),
            bf16=True,
            hidden=512,
            heads=8,
            block=256,
            batch=16,
        ),
        _rung("8m", "8 million tokens", 34.0, (4e-3, 8e-3), steps=8000),
    )
}


# ---- Runs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One process's work: an arm at a scale with a learning rate and a seed, or the timing of an arm's steps."""

    scale: Scale
    arm: Arm
    lr: float
    seed: int
    kind: Kind = "train"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that decides what it computes: every setting of `examples/pretrain.py` but those of folders and of the
        report at the end, so that no default of that program decides, and what it has no setting for."""
        arm, shape, data = self.arm.model, self.scale.shape, self.scale.data[self.arm.data]
        settings = {
            "kind": self.kind,
            "variant": arm.variant,
            "bf16": self.scale.bf16,
            "cpu_kernel": CPU_KERNEL,
            "data_set": data.name,
            "split": data.split,
            **data.options,
            "schedule": self.scale.schedule,
            **COMMON_OPTIONS,
            **shape,
            "save_steps": shape["log_steps"],
            "num_layers": self.scale.layers * arm.depth,
            "num_experts": arm.experts,
            "shared_experts": arm.shared_experts,
            "top_k": arm.top_k,
            "iterations": 1 if arm.variant == "held" else arm.iterations,  # it has one router, called once
            "residual": arm.residual,
            "shared_router": arm.shared_router,
            # Where they are off they are left out: the first runs know nothing of them.
            **({} if arm.variant == RENORM else arm.stabilisers),
            "lr": self.lr,
            "seed": self.seed,
        }
        if data.problems:
            settings["problems"] = data.problems
        if self.kind == "train":
            return settings
        steps = self.scale.timed_steps
        reference = Run(self.scale, REFERENCE, TIMING_RATE, self.seed)
        return settings | {
            "lr": TIMING_RATE,
            "steps": WARM_UP + steps,
            "timed_steps": steps,
            "reference": reference.id,
        }

    @cached_property
    def id(self) -> str:
        """The run's identity: a hash of its settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        if self.kind == "timing":
            return f"timing of {self.arm.model.label}"
        data = self.scale.data[self.arm.data].name
        return f"{self.arm.label}, {data}, lr {self.lr:g}, seed {self.seed}"

    @property
    def estimated_seconds(self) -> float:
        """Before there are runs to learn from."""
        share = 0.12 if self.kind == "timing" else 1.0
        return 60 * self.scale.minutes * self.arm.relative_cost * share

    def options(self, data_root: str) -> dict[str, Any]:
        """The settings that `examples/pretrain.py` has too, with the folder of the data."""
        options = {name: value for name, value in self.settings.items() if name not in OWN_SETTINGS}
        options = self.arm.model.options | options
        texts = {name: value.replace("{root}", data_root) for name, value in options.items() if isinstance(value, str)}
        return options | texts

    def to_json(self) -> str:
        """The run without its scale, for another process."""
        return json.dumps({"arm": asdict(self.arm), "lr": self.lr, "seed": self.seed, "kind": self.kind})

    @classmethod
    def from_json(cls, scale: Scale, text: str) -> "Run":
        values = json.loads(text)
        return cls(scale, Arm(**values.pop("arm")), **values)


def final_loss(result: Mapping[str, Any], late: int) -> float:
    """The mean of the last `late` held-out losses of a result's main split; infinite where training diverged."""
    losses = [loss for _, loss in result["held_out"][result["split"]][-late:]]
    return float("inf") if None in losses else statistics.fmean(losses)


def tuning_runs(scale: Scale, arms: Iterable[Arm], results: Mapping[str, Any] | None = None) -> list[Run]:
    """The grid of learning rates, of the baselines or of arms with their own, as far as `results` let it be known; no
    runs where there is nothing to choose."""
    runs = []
    if not scale.is_tuned:
        return runs
    for arm in arms:
        tuned = replace(arm, own_lr=False, data="main" if arm.own_lr and scale.tunes_on_main else arm.data)
        seeds = scale.own_tuning_seeds if arm.own_lr else scale.tuning_seeds
        rates = grid_of(scale, (tuned,) if arm.own_lr else BASELINES, seeds, results or {})
        runs += [Run(scale, tuned, lr, seed) for lr, seed in product(rates, seeds)]
    return runs


def grid_of(scale: Scale, arms: Iterable[Arm], seeds: Iterable[int], results: Mapping[str, Any]) -> tuple[float, ...]:
    """The scale's learning rates and, where it extends them, those that the best for `arms` together has led to beyond
    their ends, in rising order. Every next one is twice or half the last."""
    rates = tuple(sorted(scale.learning_rates))
    while scale.extends_grid:
        means = {
            rate: mean_loss(results, (Run(scale, arm, rate, seed) for arm, seed in product(arms, seeds)))
            for rate in rates
        }
        if None in means.values():
            break
        best = min(means, key=means.get)
        if best == rates[0]:
            rates = (rates[0] / 2, *rates)
        elif best == rates[-1]:
            rates = (*rates, 2 * rates[-1])
        else:
            break
    return rates


def mean_loss(results: Mapping[str, Any], runs: Iterable[Run]) -> float | None:
    """The mean of the runs' losses, infinite where one diverged; `None` while a run is missing."""
    runs = list(runs)
    if any(run.id not in results for run in runs):
        return None
    return statistics.fmean(final_loss(results[run.id], run.scale.late) for run in runs)


def best_rate(scale: Scale, results: Mapping[str, Any], arms: Iterable[Arm]) -> float | None:
    """The learning rate of the grid with the lowest mean loss over arms and seeds; `None` while a run is missing."""
    runs = tuning_runs(scale, arms, results)
    rates = dict.fromkeys(run.lr for run in runs)
    means = {rate: mean_loss(results, (run for run in runs if run.lr == rate)) for rate in rates}
    return None if None in means.values() else min(means, key=means.get)


def learning_rate(scale: Scale, results: Mapping[str, Any], arm: Arm) -> float | None:
    """The learning rate of an arm; `None` while the grid it is chosen from is not finished."""
    if not scale.is_tuned:
        return scale.learning_rates[0]
    return best_rate(scale, results, (arm,) if arm.own_lr else BASELINES)


def plan(
    scale: Scale,
    results: Mapping[str, Any],
    only: Iterable[str] | None = None,
    seeds: Iterable[int] | None = None,
    assumed_rate: float | None = None,
) -> tuple[dict[str, list[Run]], bool]:
    """All runs in the order in which they are made, finished ones included, each where it is first needed.

    Args:
        scale (`Scale`): What to run at.
        results (`Mapping[str, Any]`): Finished runs by id, which the learning rates are chosen by.
        only (`Iterable[str]`, *optional*): Names of experiments; the grids they need are included.
        seeds (`Iterable[int]`, *optional*): Of every experiment, instead of the first few of the scale's.
        assumed_rate (`float`, *optional*): Stands for a learning rate that is not known yet.

    Returns:
        The runs by experiment, and whether these are all: those after an unfinished grid depend on it.
    """
    experiments = [scale.experiment(name) for name in only or scale.names]
    stages = {"learning_rate": tuning_runs(scale, BASELINES, results) if scale.needs_common_rate else []}
    complete = True
    for experiment in experiments:
        own = [arm for arm in experiment.arms if arm.own_lr]
        stage = stages[experiment.name] = tuning_runs(scale, own, results)
        rates = {arm: learning_rate(scale, results, arm) or assumed_rate for arm in experiment.arms}
        if None in rates.values():
            complete = False
            continue
        for seed in seeds or scale.seeds[: experiment.seeds]:
            stage += [Run(scale, arm, rates[arm], seed) for arm in experiment.arms]
    if complete:
        models = dict.fromkeys(arm.model for experiment in experiments for arm in experiment.arms)
        stages["timing"] = [Run(scale, model, 0.0, TIMING_SEED, kind="timing") for model in models]
    seen: set[str] = set()
    for name, stage in stages.items():
        stages[name] = [run for run in {run.id: run for run in stage}.values() if run.id not in seen]
        seen |= {run.id for run in stage}
    return stages, complete
