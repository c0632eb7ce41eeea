"""`benchmarks/paper/`: what is run, that a run is the same again, that none is lost, and what follows from them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from itertools import combinations, product
from math import comb
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from benchmarks.paper import analysis, power, report, results, run, runs, variants, worker
from benchmarks.paper.analysis import CANNOT_TELL, DOES_NOT, HOLDS, MISSING, Estimate, Evidence
from benchmarks.paper.experiments import (
    BASELINES,
    EXPERIMENTS,
    FIGURE_3A,
    FIGURE_6,
    ITERATIONS,
    OFFICIAL,
    PAPER_LOSS,
    PRENORM,
    RENORM,
    RULES,
    SERIES,
    STABILISED,
    Arm,
    Contrast,
    coe,
    dense,
    loop,
    moe,
    paper_loss,
    twelfths,
)
from benchmarks.paper.plots import PAPER_CURVES, read_paper_curves
from benchmarks.paper.runs import GSM8K, SCALES, TIMING_SEED, Data, Run, Scale, plan, tuning_runs
from configuration_coe import RESIDUAL_RULES
from modeling_coe import CoeConfig, CoeForCausalLM
from modeling_coe.command_line import InputError
from tests.helpers import ROOT, random_ids, tiny_config


SMOKE, CPU = SCALES["smoke"], SCALES["cpu"]
ARMS = list(dict.fromkeys(arm for experiment in EXPERIMENTS.values() for arm in experiment.arms))


class Vocabulary:
    """As much of a tokenizer as a configuration needs."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 1

    def __len__(self) -> int:
        return 320


def config_of(made: Run) -> CoeConfig:
    return worker.pretrain.build_config(worker.settings_of(made, "out", "root"), Vocabulary())


def routed_flops(made: Run) -> int:
    config = config_of(made)
    shared = 6 * config.hidden_size * config.shared_expert_width * config.inner_iter * config.num_hidden_layers
    return config.expert_flops_per_token - shared


def line(made: Run, curve: list, **changes) -> dict:
    """The line of a run with a given held-out curve."""
    common = {"id": made.id, "label": made.label, "settings": made.settings, "seconds": 10.0, "code": "c"}
    if made.kind == "timing":
        return common | {"ratio": {"median": 1.0, "q1": 0.9, "q3": 1.1}} | changes
    machine = {
        "device": "a machine",
        "threads": 1,
        "cores": 2,
        "torch": "2",
        "transformers": "5",
        "date": "2026-01-01",
    }
    config = config_of(made)
    iteration = {"load_entropy": 0.9, "max_vio": 1.0, "dead_share": 0.0}
    return {
        **common,
        **{"machine": machine, "split": "numbers", "held_out": {"numbers": curve, "templates": curve[-1:]}},
        **{"training": [], "unigram": {"numbers": 4.0}, "order_fingerprint": f"{made.seed}"},
        **{"parameters": config.total_parameters, "active_parameters": config.active_parameters},
        "non_embedding_parameters": config.total_parameters - config.embedding_parameters,
        "expert_flops_per_token": config.expert_flops_per_token,
        **{"cpu_seconds_per_step": {"median": 0.1}, "wall_seconds_per_step": {"median": 0.1}},
        **{"tokens_per_second": 1000.0, "peak_memory_above_start": 2**20, "peak_device_memory": None},
        "routing": [
            {
                "iterations": [iteration] * made.arm.iterations,
                "transitions": [{"reuse": 0.1}] * (made.arm.iterations - 1),
            }
        ],
        **changes,
    }


def finished(losses: dict[Arm, list[float]], experiment=FIGURE_3A, rate: float = 1e-3, scale=SMOKE) -> dict[str, dict]:
    """Results of a scale whose grid chose `rate`: the last losses of arms by seed, and their timings."""
    lines = [
        line(made, [[0, 6.0], [scale.steps, 1.0 if made.lr == rate else 2.0]])
        for made in tuning_runs(scale, BASELINES)
    ]
    for arm, values in losses.items():
        lines += [
            line(Run(scale, arm, rate, seed), [[0, 6.0], [scale.steps, value]])
            for seed, value in zip(scale.seeds, values, strict=False)
        ]
        lines.append(line(Run(scale, arm.model, 0.0, TIMING_SEED, kind="timing"), []))
    return {entry["id"]: entry for entry in lines}


@pytest.fixture(scope="module")
def few_texts():
    """Makes tokenizers from few texts, on one thread."""
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COE_CPU_KERNEL", "auto")  # the worker sets it
        patch.setattr(worker.corpus, "TOKENIZER_EXAMPLES", 200)
        yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)


class TestTable:
    @pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
    def test_every_arm_builds_a_configuration(self, scale):
        for arm in ARMS:
            config = config_of(Run(scale, arm, 1e-3, 1))
            assert config.residual_rule == arm.residual
            assert config.num_experts_per_tok == arm.top_k and config.n_routed_experts == arm.experts
            assert config.num_hidden_layers == scale.layers * arm.depth
            assert config.inner_iter == (1 if arm.variant == "held" else arm.iterations)
            assert arm.variant in (None, RENORM) or arm.residual in variants.VARIANT_RULES[arm.variant]
            assert {name: getattr(config, name) for name in arm.options} == arm.canonical.options

    def test_arms_are_what_their_labels_say(self):
        assert len({arm.label for arm in ARMS if arm.data == "main"}) == len([a for a in ARMS if a.data == "main"])
        assert coe(OFFICIAL, 2, 4).label == "CoE-2(4/64) inner"
        assert moe(PRENORM, depth=2).label == "MoE(8/64) prenorm, 2x layers"
        assert moe("outer") == moe(PRENORM) and moe("init") == moe(OFFICIAL)

    def test_routed_flops_are_equal_where_claimed(self):
        def flops(arm: Arm) -> int:
            return routed_flops(Run(CPU, arm, 1e-3, 1))

        for rule in RULES:
            assert flops(coe(rule, 2, 4)) == flops(moe(rule))
        for rule in (OFFICIAL, PRENORM):
            assert flops(coe(rule, 2, 8)) == flops(moe(rule, 16))
            assert flops(moe(rule, 12)) == flops(coe(rule, 2, 6)) == flops(coe(rule, 3, 4)) == flops(coe(rule, 4, 3))
            assert flops(coe(rule, 2, 8)) == flops(moe(rule, depth=2))
        assert {contrast.arm.iterations for contrast in ITERATIONS.contrasts} == {2, 3, 4}

    def test_experts_of_the_stabilised_cost_the_same(self):
        """Shared ones too, in every model but those of more attention, which cost 3 % more in all."""
        scale = SCALES["stabilised"]
        single = Run(scale, twelfths(1), 1e-3, 1)
        for arm in dict.fromkeys(arm for experiment in scale.experiments for arm in experiment.arms):
            made = Run(scale, arm, 1e-3, 1)
            config = config_of(made)
            if arm.variant in ("loop", "loop_own") or arm.depth > 1:
                model = variants.build_model(config, arm.model.variant)
                total = sum(parameter.numel() for parameter in model.parameters())
                counted = {"parameters": total, "non_embedding_parameters": total - config.embedding_parameters}
                ours, theirs = (
                    analysis.flops_per_token(line(each, [[0, 1.0]], **more)) - 2 * 64 * len(Vocabulary())
                    for each, more in ((made, counted), (single, {}))
                )
                assert 1.0 < ours / theirs < 1.06, arm.label
            else:
                assert config.expert_flops_per_token == config_of(single).expert_flops_per_token, arm.label
        ladder = EXPERIMENTS["ladder"].arms[-1]
        base = config_of(Run(scale, moe(PRENORM), 1e-3, 1))
        assert config_of(Run(scale, ladder, 1e-3, 1)).expert_flops_per_token == base.expert_flops_per_token

    def test_headline_separates_the_rule_from_iterating(self):
        differing = []
        for contrast in FIGURE_3A.contrasts:
            rule = contrast.arm.residual != contrast.against.residual
            differing.append((rule, contrast.arm.iterations != contrast.against.iterations))
        assert differing == [(False, True), (False, True), (True, True), (True, False), (True, False)]
        assert FIGURE_3A.seeds >= 3 and all(experiment.seeds >= 3 for experiment in EXPERIMENTS.values())

    def test_every_run_is_planned_once(self):
        stages, complete = plan(CPU, {}, assumed_rate=2e-3)
        runs = [made for stage in stages.values() for made in stage]
        assert complete and len({made.id for made in runs}) == len(runs)
        assert list(stages) == ["learning_rate", *CPU.names, "timing"]
        arms = [arm for experiment in CPU.experiments for arm in experiment.arms]
        wanted = {(arm.model, arm.data) for arm in [*arms, *BASELINES]}
        trained = {(made.arm.model, made.arm.data) for made in runs if made.kind == "train"}
        assert trained == wanted and {made.arm for made in stages["timing"]} == {arm.model for arm in arms}

    def test_experiments_on_the_second_data(self):
        scale = replace(SMOKE, names=("figure_6", "figure_3a"), on_second_data=("figure_6",))
        stages, _ = plan(scale, {}, assumed_rate=1e-3)
        assert {made.settings["data_set"] for made in stages["figure_6"]} == {"gsm8k"}
        assert {made.settings["data_set"] for made in stages["figure_3a"]} == {"arithmetic"}
        assert all(made.options("root")["data"] == "root/gsm8k/train.parquet" for made in stages["figure_6"])
        figure_6, figure_3a = scale.experiments
        assert {arm.data for arm in figure_6.arms} == {"second"} and figure_3a == FIGURE_3A
        assert [contrast.label for contrast in figure_6.contrasts] == [each.label for each in FIGURE_6.contrasts]

    def test_the_grid_comes_first_and_only_the_baselines_decide(self):
        scale = replace(SMOKE, tuning_seeds=(0, 9))
        stages, complete = plan(scale, {})
        assert not complete and not stages["figure_3a"]
        grid = stages["learning_rate"]
        assert {made.arm for made in grid} == set(BASELINES) == {moe(OFFICIAL), moe(PRENORM)}
        assert {made.seed for made in grid} == {0, 9} and not {0, 9} & {*scale.seeds}
        # The first seed alone would choose the other rate.
        losses = {(OFFICIAL, 1e-3): 1.0, (OFFICIAL, 4e-3): 1.3, (PRENORM, 1e-3): 1.4, (PRENORM, 4e-3): 1.0}
        offsets = {(9, 1e-3): -0.2}
        results = {
            made.id: line(made, [[4, losses[made.arm.residual, made.lr] + offsets.get((made.seed, made.lr), 0)]])
            for made in grid
        }
        stages, complete = plan(scale, results)
        assert complete and {made.lr for made in stages["figure_3a"]} == {1e-3}
        diverged = {
            id: entry | {"held_out": {"numbers": [[4, None]]}}
            for id, entry in results.items()
            if entry["settings"]["lr"] == 1e-3
        }
        stages, _ = plan(scale, results | diverged)
        assert {made.lr for made in stages["figure_3a"]} == {4e-3}

    def test_own_learning_rates(self):
        scale = replace(SMOKE, names=("own_learning_rates",))
        stages, complete = plan(scale, {}, assumed_rate=1e-3)
        own = [made for made in stages["own_learning_rates"] if made.seed in scale.tuning_seeds]
        assert {made.arm for made in own} == {*BASELINES, coe(OFFICIAL, 2, 4), coe(PRENORM, 2, 4)}
        grid = stages["learning_rate"] + own
        results = {made.id: line(made, [[4, made.lr if made.arm.iterations == 1 else -made.lr]]) for made in grid}
        stages, complete = plan(scale, results)
        rates = {
            (made.arm.iterations, made.lr)
            for made in stages["own_learning_rates"]
            if made.seed not in scale.tuning_seeds
        }
        assert complete and rates == {(1, 1e-3), (2, 4e-3)}

    def test_a_grid_grows_where_the_best_is_at_its_edge(self):
        scale = replace(SMOKE, extends_grid=True, tunes_on_main=True, names=("stabilised_second_data",))
        arm = twelfths(1, data="second")

        def results_of(*best: float) -> dict:
            """Of the runs that are there, where losses fall towards the last of `best`."""
            known = {}
            for peak in best:
                grid = tuning_runs(scale, [arm], known)
                known |= {made.id: line(made, [[4, abs(made.lr - peak)]]) for made in grid}
            return known

        rates = [made.lr for made in tuning_runs(scale, [arm])]
        assert rates == [1e-3, 4e-3] and {made.arm.data for made in tuning_runs(scale, [arm])} == {"main"}
        known = results_of(8e-3)
        assert [made.lr for made in tuning_runs(scale, [arm], known)] == [1e-3, 4e-3, 8e-3]
        assert runs.learning_rate(scale, known, arm) is None
        known = results_of(8e-3, 8e-3, 8e-3)
        assert [made.lr for made in tuning_runs(scale, [arm], known)] == [1e-3, 4e-3, 8e-3, 1.6e-2]
        assert runs.learning_rate(scale, known, arm) == 8e-3
        assert plan(scale, known)[0]["learning_rate"] == []

    def test_a_single_rate_is_not_tuned(self):
        scale = SCALES["more-iterations"]
        stages, complete = plan(scale, {})
        made = stages["more_iterations"]
        assert complete and stages["learning_rate"] == [] and {each.lr for each in made} == {8e-3}
        assert {each.seed for each in made} == set(range(6, 16)) and len(made) == 9 * 10
        assert {each.settings["data_set"] for each in made} == {"arithmetic"}
        assert {each.arm.iterations * (each.arm.top_k + 1) for each in made} == {12}
        # Seeds that no run of `stabilised` has.
        known = {
            each.seed for stage in plan(SCALES["stabilised"], {}, assumed_rate=8e-3)[0].values() for each in stage
        }
        assert not known & {each.seed for each in made}
        assert report.learning_rates(Evidence(scale, {}))[0] == "0.008 for all models; nothing is tuned here."

    @pytest.mark.parametrize("peak, wanted", [(1e-3, 1e-3), (3e-4, 2.5e-4), (8e-3, 8e-3)])
    def test_a_common_grid_grows_too_and_the_plan_goes_on(self, peak, wanted):
        scale, known = replace(SMOKE, extends_grid=True), {}
        for _ in range(6):  # as the runner does: all that is planned, and a new plan
            stages, complete = plan(scale, known)
            assert complete or any(made.id not in known for made in stages["learning_rate"])
            known |= {made.id: line(made, [[4, abs(made.lr - peak)]]) for made in stages["learning_rate"]}
        assert complete and {made.lr for made in stages["figure_3a"]} == {wanted}
        assert f"Chosen: {wanted:g}." in report.learning_rates(Evidence(scale, known))  # at no edge any more

    def test_the_loss_of_a_run_is_the_mean_of_its_late_evaluations(self):
        scale, arm = replace(SMOKE, late=2), moe(OFFICIAL)
        made = Run(scale, arm, 1e-3, 1)
        known = finished({}, scale=scale) | {made.id: line(made, [[0, 9.0], [2, 3.0], [4, 2.0]])}
        evidence = Evidence(scale, known)
        assert evidence.final(known[made.id]) == 2.5 == runs.final_loss(known[made.id], 2)
        assert evidence.loss_at(known[made.id], 4) == 2.5 and evidence.loss_at(known[made.id], 3) == (2.5 + 6.0) / 2
        falling = Evidence(replace(scale, schedule="cosine"), known)
        assert falling.pairs(Contrast(arm, arm), "FLOPs") == []

    def test_paper_figures(self):
        assert {arm.model for arm in PAPER_LOSS} <= {arm.model for arm in ARMS}
        assert paper_loss(coe(OFFICIAL, 2, 4, data="second")) == 1.1211
        assert paper_loss(coe("init", 2, 8)) is paper_loss(coe(PRENORM, 2, 4)) is None

    def test_whose_claim_it_is(self):
        official, standard, mixed, *_ = FIGURE_3A.contrasts
        assert [each.source for each in (official, standard, mixed)] == ["paper", "ours", "ours"]
        assert [each.rule for each in (official, standard, mixed)] == [OFFICIAL, PRENORM, f"{OFFICIAL} vs {PRENORM}"]
        claimed = {each.source for each in EXPERIMENTS["ours"].contrasts if each.claim}
        assert claimed == {"sceptics"}

    def test_paper_curves_end_where_the_table_says(self):
        curves = read_paper_curves(ROOT.parent / "shared" / "data" / "paper_curves")
        if not curves:
            pytest.skip("the paper's curves (../shared/data/paper_curves) are not there")
        assert curves.keys() == PAPER_CURVES.keys() == PAPER_LOSS.keys()
        for arm, curve in curves.items():
            assert curve[-1] == (1000, pytest.approx(PAPER_LOSS[arm], abs=5e-5))
        assert read_paper_curves(ROOT / "nowhere") == {}


# By what a run is made of: fields with other values, those that decide what it computes and those that do not.
DECISIVE = {
    Run: {"scale": SMOKE, "arm": moe(OFFICIAL), "lr": 2e-3, "seed": 2, "kind": "timing"},
    Arm: {"residual": PRENORM, "iterations": 3, "top_k": 2, "experts": 31, "shared_experts": 2, "depth": 2}
    | {"shared_router": True, "variant": "held", "data": "second"}
    | {"iteration_norm": True, "branch_norm": True, "residual_scale": 2.0, "reinject": 0.5},
    Scale: {"shape": CPU.shape | {"steps": 501}, "layers": 5, "data": {"main": GSM8K}, "bf16": True}
    | {"schedule": "cosine"},
    Data: {
        "name": "other",
        "split": "templates",
        "data": "other.parquet",
        "eval_data": "other.parquet",
        "data_config": "other",
    }
    | {"train_split": "other", "eval_split": "other", "eval_fraction": 0.5, "prompt_column": "other"}
    | {"answer_column": "other", "tokenizer": "other", "problems": 10},
}
INDIFFERENT = {
    Run: {},
    Arm: {"own_lr": True},
    Scale: {"name": "other", "about": "other", "learning_rates": (1.0,), "seeds": (9,), "tuning_seeds": (9,)}
    | {"own_tuning_seeds": (9,), "names": (), "on_second_data": (), "minutes": 9.0, "jobs": 9, "note": "other"}
    | {"late": 3, "extends_grid": True, "tunes_on_main": True}
    | {"timed_steps": 99},  # of timings, where it decides
    Data: {},
}


class TestIdentity:
    MADE = Run(CPU, coe(OFFICIAL, 2, 4), 1e-3, 1)
    TIMED = Run(CPU, coe(OFFICIAL, 2, 4), 0.0, TIMING_SEED, kind="timing")

    @pytest.mark.parametrize("made", [MADE, TIMED], ids=["train", "timing"])
    def test_every_setting_is_part_of_it(self, made):
        ids = {made.id}
        for name in made.settings:
            other = replace(made)
            vars(other)["settings"] = made.settings | {name: "another value"}
            ids.add(other.id)
        assert len(ids) == 1 + len(made.settings)

    @pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
    def test_every_option_of_the_trainer_is_a_setting(self, scale):
        """With the value that the trainer has, the one that its command line would give it: none is a default."""
        start = {"output_dir", "resume", "overwrite", "micro_batch_size"}
        start_and_report = start | {"num_problems", "num_samples", "max_new_tokens"}
        for arm in ARMS:
            made = Run(scale, arm, 1e-3, 1)
            settings, options = worker.settings_of(made, "out", "root"), made.options("root")
            assert {name: value for name, value in vars(settings).items() if name not in start_and_report} == options
            told = {f"--{name.replace('_', '-')}": value for name, value in options.items() if value is not None}
            argv = [f"{name}={value}" for name, value in told.items()]
            assert worker.pretrain.parse_settings(["--output-dir=out", *argv]) == settings

    @pytest.mark.parametrize("kind", DECISIVE, ids=lambda kind: kind.__name__)
    def test_every_field_decides_or_is_known_not_to(self, kind):
        def changed(name: str, value) -> str:
            arm, scale, data = self.MADE.arm, self.MADE.scale, self.MADE.scale.data["main"]
            made = {
                Run: lambda: replace(self.MADE, **{name: value}),
                Arm: lambda: replace(self.MADE, arm=replace(arm, **{name: value})),
                Scale: lambda: replace(self.MADE, scale=replace(scale, **{name: value})),
                Data: lambda: replace(self.MADE, scale=replace(scale, data={"main": replace(data, **{name: value})})),
            }
            return made[kind]().id

        assert DECISIVE[kind].keys() | INDIFFERENT[kind].keys() == {field.name for field in fields(kind)}
        ids = [changed(name, value) for name, value in DECISIVE[kind].items()]
        assert len({self.MADE.id, *ids}) == 1 + len(ids)
        assert {changed(name, value) for name, value in INDIFFERENT[kind].items()} <= {self.MADE.id}

    def test_precision_is_the_run_s(self, few_texts, tmp_path):
        for bf16 in (False, True):
            made = Run(replace(SMOKE, bf16=bf16), moe(OFFICIAL), 1e-3, 1)
            inputs = worker.Inputs(made, str(tmp_path), "root")
            assert inputs.trainer(inputs.model(made)).args.bf16 == bf16

    def test_every_part_of_the_shape(self):
        shapes = [CPU.shape | {name: value + 1} for name, value in CPU.shape.items()]
        ids = {replace(self.MADE, scale=replace(CPU, shape=shape)).id for shape in shapes}
        assert len({self.MADE.id, *ids}) == 1 + len(CPU.shape)

    @pytest.mark.parametrize("name", ["COMMON_OPTIONS", "CPU_KERNEL", "WARM_UP", "TIMING_RATE", "REFERENCE"])
    def test_what_all_runs_share(self, monkeypatch, name):
        value = getattr(runs, name)
        others = [value | {key: "other"} for key in value] if isinstance(value, dict) else []
        others = others or [moe(PRENORM) if isinstance(value, Arm) else "mm" if isinstance(value, str) else 2 * value]
        for other in others:
            before = replace(self.TIMED).id
            with monkeypatch.context() as patch:
                patch.setattr(runs, name, other)
                assert replace(self.TIMED).id != before
        assert replace(self.TIMED, scale=replace(CPU, timed_steps=9)).id != self.TIMED.id

    @pytest.mark.parametrize("name", ["dropout", "output_dir", "num_problems"])
    def test_a_setting_that_the_trainer_does_not_compute_with(self, name):
        other = replace(self.MADE)
        vars(other)["settings"] = self.MADE.settings | {name: 1}
        with pytest.raises(ValueError, match=rf"CoE-2\(4/64\) inner, arithmetic.*: {name} must be in both"):
            worker.settings_of(other, "out", "root")

    def test_a_default_that_is_no_setting(self, monkeypatch):
        @dataclass(frozen=True, kw_only=True)
        class WithDropout(worker.pretrain.PretrainSettings):
            dropout: float = 0.1

        monkeypatch.setattr(worker.pretrain, "PretrainSettings", WithDropout)
        with pytest.raises(ValueError, match=": dropout must be in both"):
            worker.settings_of(self.MADE, "out", "root")

    def test_a_setting_without_meaning(self):
        other = replace(self.MADE)
        vars(other)["settings"] = self.MADE.settings | {"top_k": 0}
        with pytest.raises(InputError, match="--top-k is 0"):
            worker.settings_of(other, "out", "root")

    def test_the_environment_does_not_decide(self, monkeypatch, tmp_path):
        """Which kernel computes the experts is a setting."""
        found = {}
        monkeypatch.setenv("COE_CPU_KERNEL", "mm")
        monkeypatch.setattr(worker, "execute", lambda *_: found.update(os.environ) or {"id": "a"})
        threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
        worker.main(["--scale=cpu", f"--run={self.MADE.to_json()}", f"--results={tmp_path}"])
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)
        assert found["COE_CPU_KERNEL"] == self.MADE.settings["cpu_kernel"] == "grouped_mm"

    def test_through_json(self):
        assert Run.from_json(CPU, self.MADE.to_json()) == self.MADE
        assert json.loads(json.dumps(self.TIMED.settings)) == self.TIMED.settings

    def test_published_runs_are_runs_of_today(self):
        """Every line has the id and the settings that a run with its settings has today, and its ids of before."""
        names = {data.name: key for key, data in CPU.data.items()}
        published = results.load(results.path_of("cpu"))
        for id, entry in published.items():
            settings = entry["settings"]
            arm = Arm(
                settings["residual"],
                iterations=2 if settings["variant"] == "held" else settings["iterations"],
                top_k=settings["top_k"],
                experts=settings["num_experts"],
                shared_experts=settings["shared_experts"],
                depth=settings["num_layers"] // CPU.layers,
                shared_router=settings["shared_router"],
                variant=settings["variant"],
                data=names[settings["data_set"]],
            )
            made = Run(CPU, arm, settings["lr"], settings["seed"], settings["kind"])
            assert (made.id, made.settings, made.label) == (id, settings, entry["label"])
        assert len(published) == 401
        assert len({id for entry in published.values() for id in (entry["id"], *entry["former_ids"])}) == 3 * 401

    def test_what_the_published_commit_trained(self):
        """The options that `examples/pretrain.py` of commit cf36f65 resolved a published run to."""
        options = {
            **{"seed": 0, "data": None, "data_config": None, "train_split": "train", "eval_data": None},
            **{"eval_split": "test", "eval_fraction": 0.05, "prompt_column": "question", "answer_column": "answer"},
            **{"tokenizer": None, "vocab_size": 1024, "block_size": 128, "model": None, "hidden_size": 64},
            **{"num_layers": 4, "num_heads": 4, "num_experts": 63, "shared_experts": 1, "expert_width": 44},
            **{"top_k": 8, "iterations": 1, "residual": "inner", "shared_router": False, "aux_loss": 0.001},
            **{"init_range": None, "steps": 500, "batch_size": 8, "lr": 0.002, "schedule": "constant_with_warmup"},
            **{"warmup_steps": 50, "weight_decay": 0.01, "beta2": 0.95, "log_steps": 10, "eval_steps": 50},
            **{"eval_blocks": 128, "save_steps": 10},
        }
        first = next(iter(results.load(results.path_of("cpu")).values()))
        assert first["former_ids"] == ["8eb7c6ade237", "94d6b7b1f8a1"]
        assert first["settings"] == options | {
            **{"kind": "train", "variant": None, "bf16": False, "cpu_kernel": "grouped_mm"},
            **{"data_set": "arithmetic", "split": "numbers"},
        }


class TestCodeFingerprint:
    def test_it_changes_with_every_file(self, tmp_path, monkeypatch):
        files = sorted(path.relative_to(ROOT) for pattern in worker.SOURCES for path in ROOT.glob(pattern))
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes((ROOT / file).read_bytes())
        original = worker.code_fingerprint()
        monkeypatch.setattr(worker, "ROOT", tmp_path)
        assert worker.code_fingerprint() == original
        found = set()
        for file in files:
            with open(tmp_path / file, "a") as stream:
                stream.write("\n")
            found.add(worker.code_fingerprint())
        assert len(found | {original}) == len(files) + 1
        (tmp_path / "modeling_coe" / "another.py").touch()
        assert worker.code_fingerprint() not in found

    def test_it_covers_what_a_run_imports(self):
        """All files of this project that the worker has loaded, and all of the packages that load more when needed."""
        program = (
            "import sys; from pathlib import Path; from benchmarks.paper import worker\n"
            "for module in list(sys.modules.values()):\n"
            "    file = getattr(module, '__file__', None)\n"
            "    if file and worker.ROOT in Path(file).parents: print(Path(file).relative_to(worker.ROOT))"
        )
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}"}
        command = [sys.executable, "-c", program]
        found = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
        imported = {line for line in found.stdout.splitlines() if not line.startswith(".")}
        covered = {str(path.relative_to(ROOT)) for pattern in worker.SOURCES for path in ROOT.glob(pattern)}
        assert {"examples/pretrain.py", "benchmarks/paper/runs.py"} <= imported <= covered
        for package in ("configuration_coe", "modeling_coe"):
            assert {str(path.relative_to(ROOT)) for path in ROOT.glob(f"{package}/*.py")} <= covered


class TestVariants:
    def both(self, variant: str, rule: str, **fields):
        config = tiny_config(**RESIDUAL_RULES[rule], **fields)
        models = []
        for name in (None, variant):
            torch.manual_seed(0)
            models.append(variants.build_model(config, name).eval())
        return *models, random_ids(2, 7)

    @pytest.mark.parametrize("rule", ["inner", "prenorm"])
    def test_scalar_starts_as_the_mixture(self, rule):
        mixture, scaled, ids = self.both("scalar", rule, inner_iter=1)
        torch.testing.assert_close(scaled(ids).logits, mixture(ids).logits)
        for layer in scaled.model.layers:
            torch.nn.init.constant_(layer.scale, 0.5)
        assert not torch.allclose(scaled(ids).logits, mixture(ids).logits)

    @pytest.mark.parametrize("rule", ["inner", "prenorm"])
    def test_held_routes_once_and_runs_twice(self, rule):
        mixture, held, ids = self.both("held", rule, inner_iter=1)
        for layer in held.model.layers:
            torch.nn.init.zeros_(layer.scale)
        torch.testing.assert_close(held(ids).logits, mixture(ids).logits)
        output = held.train()(ids, labels=ids, output_router_logits=True)
        assert len(output.router_indices) == held.config.num_hidden_layers
        output.loss.backward()
        assert all(layer.scale.grad.abs() > 0 for layer in held.model.layers)
        assert variants.expert_flops_per_token(held.config, "held") == 2 * held.config.expert_flops_per_token

    @pytest.mark.parametrize("options", [{}, {"iteration_norm": True, "residual_scale": 2.0}], ids=str)
    @pytest.mark.parametrize("variant", ["loop", "loop_own"])
    def test_a_loop_is_twice_the_layers_with_shared_weights(self, variant, options):
        fields = {"use_igate": True, "num_hidden_layers": 2, **RESIDUAL_RULES["prenorm"], **options}
        looped = variants.build_model(tiny_config(inner_iter=2, **fields), variant).eval()
        scale = looped.model.layers[0].iteration_multiplier
        assert scale == (2.0 / (2 * 2**0.5) if options else 1.0)
        plain = {"num_hidden_layers": 4, "inner_iter": 1, "residual_multiplier": scale}
        stacked = CoeForCausalLM(tiny_config(**fields | plain | {"residual_scale": None})).eval()
        for name in ("model.embed_tokens", "model.norm", "lm_head"):
            stacked.get_submodule(name).load_state_dict(looped.get_submodule(name).state_dict())
        for index, layer in enumerate(looped.model.layers):
            for norm in (*layer.attention_norms, *(layer.iteration_norms or ())):
                torch.nn.init.normal_(norm.weight, mean=1.0)
            for t in range(2):
                copied = stacked.model.layers[2 * index + t]
                state = {name: tensor for name, tensor in layer.mlp.state_dict().items() if "gate." not in name[:5]}
                copied.mlp.load_state_dict(state | {"gate.0.weight": layer.mlp.gate[t].weight})
                own = t == 1 and variant == "loop_own"
                attention = layer.later_attentions[0] if own else layer.self_attn
                copied.self_attn.load_state_dict(attention.state_dict())
                for norm, later in (("input_layernorm", "attention_norms"), ("post_attention_layernorm",) * 2):
                    later = later if later == "attention_norms" else "iteration_norms"
                    module = getattr(layer, later)[0] if t == 1 and options else getattr(layer, norm)
                    getattr(copied, norm).load_state_dict(module.state_dict())
        ids = random_ids(2, 9)
        torch.testing.assert_close(looped(ids).logits, stacked(ids).logits, atol=1e-4, rtol=1e-4)
        looped.train()(ids, labels=ids).loss.backward()
        assert all(parameter.grad.any() for name, parameter in looped.named_parameters() if "attn" in name)

    def test_a_loop_reads_its_input_again(self):
        fields = {"inner_iter": 2, "num_hidden_layers": 1, **RESIDUAL_RULES["prenorm"]}
        mixed = variants.build_model(
            tiny_config(reinject=2.0, **fields), "loop"
        ).eval()  # the second loop reads h alone
        layer, h = mixed.model.layers[0], torch.randn(1, 5, 32)
        embeddings = mixed.model.rotary_emb(h, torch.arange(5)[None])
        attended = layer.self_attn(layer.input_layernorm(h), position_embeddings=embeddings, attention_mask=None)[0]
        x = layer.post_attention_layernorm(h + attended)
        expected = h + 2 * attended + layer.mlp(x, 0)[0] + layer.mlp(x, 1)[0]
        torch.testing.assert_close(layer(h, position_embeddings=embeddings, attention_mask=None), expected)

    def test_norms_of_iterations_were_a_variant(self):
        """The published runs name it; today it is an option of the model, and the same run."""
        named, option = coe(PRENORM, 2, 4, variant=RENORM), coe(PRENORM, 2, 4, iteration_norm=True)
        assert Run(CPU, named, 1e-3, 1).id == Run(CPU, option, 1e-3, 1).id
        assert named.label == option.label == "CoE-2(4/64) prenorm, norm each time"
        assert config_of(Run(CPU, named, 1e-3, 1)).iteration_norm
        other = coe(PRENORM, 2, 4, iteration_norm=True, reinject=0.5)
        assert Run(CPU, other, 1e-3, 1).settings["variant"] is None

    def test_unknown_rule(self):
        with pytest.raises(ValueError, match=r"'loop'.*'inner'"):
            variants.build_model(tiny_config(), "loop")


class TestStatistics:
    def test_interval_by_hand(self):
        # Standard deviation 1, t(2) = 4.3027.
        found = analysis.estimate([1.0, 2.0, 3.0])
        assert found == (2.0, pytest.approx(4.3027 / 3**0.5, abs=1e-4), 3)
        assert (found.low, found.high) == (pytest.approx(-0.4843, abs=1e-3), pytest.approx(4.4843, abs=1e-3))
        assert analysis.estimate([1.0]).half == float("inf") and analysis.estimate([]) is None
        assert analysis.standard_error([1.0, 2.0, 3.0]) == pytest.approx(3**-0.5)

    # As tables of Student's t have it, by degrees of freedom.
    @pytest.mark.parametrize(
        "freedom, quantile",
        [(1, 12.706), (4, 2.776), (9, 2.262), (10, 2.228), (15, 2.131), (20, 2.086), (30, 2.042), (120, 1.980)],
    )
    def test_quantiles_of_students_t(self, freedom, quantile):
        values = [float(index % 2) for index in range(freedom + 1)]
        error = analysis.standard_error(values)
        deviation = (sum((value - sum(values) / len(values)) ** 2 for value in values) / freedom) ** 0.5
        assert error == pytest.approx(deviation / len(values) ** 0.5)
        assert analysis.estimate(values).half == pytest.approx(quantile * error, abs=6e-4 * error)

    def test_interpolation(self):
        curve = [(0, 4.0), (10, 2.0), (20, 1.5)]
        assert [analysis.interpolate(curve, step) for step in (0, 5, 10, 18, 20)] == [4.0, 3.0, 2.0, 1.6, 1.5]
        with pytest.raises(ValueError, match=r"0 to 20.*21"):
            analysis.interpolate(curve, 21)

    @pytest.mark.parametrize(
        "mean, half, paper, expected",
        [
            (-0.05, 0.01, (0.9, 1.0), HOLDS),
            (-0.05, 0.06, (0.9, 1.0), CANNOT_TELL),
            (0.05, 0.01, (0.9, 1.0), DOES_NOT),
            (0.05, 0.06, (0.9, 1.0), DOES_NOT),  # as much as 0.02, a fifth of theirs, is excluded
            (-0.01, 0.005, (0.9, 1.0), DOES_NOT),
            (-0.03, 0.02, (0.9, 1.0), HOLDS),
            (-0.01, 0.005, None, HOLDS),
            (0.01, 0.005, None, DOES_NOT),
            (-0.01, float("inf"), None, CANNOT_TELL),
        ],
    )
    def test_better(self, mean, half, paper, expected):
        assert analysis.verdict(Estimate(mean, half, 3), 1.0, matches=False, paper=paper) == expected

    @pytest.mark.parametrize(
        "mean, half, expected", [(0.01, 0.004, HOLDS), (0.02, 0.004, DOES_NOT), (0.01, 0.01, CANNOT_TELL)]
    )
    def test_matches(self, mean, half, expected):
        assert analysis.verdict(Estimate(mean, half, 3), 1.0, matches=True, paper=None) == expected

    @pytest.mark.parametrize("matches", [False, True])
    @pytest.mark.parametrize("paper", [(0.9, 1.0), (1.1, 1.0), None], ids=str)
    def test_the_words_of_a_rule_decide_as_it_does(self, tmp_path, matches, paper):
        """A reader of the report who goes through its sentence from left to right."""
        report.main([f"--results={tmp_path}", f"--output={tmp_path / 'RESULTS.md'}", "--curves=nowhere"])
        claim = '- "A matches B":' if matches else '- "A is better than B":'
        lines = (tmp_path / "RESULTS.md").read_text(encoding="utf-8").splitlines()
        (sentence,) = [line for line in lines if line.startswith(claim)]
        cases = re.findall(r"\*\*([a-z ]+)\*\*(?: if the whole interval lies (below|above) ([^;]+))?[;.]", sentence)
        assert [verdict for verdict, *_ in cases][-1] == CANNOT_TELL and len(cases) == 3
        against, found = 2.0, set()

        def bound(words: str) -> float:
            share, of = re.fullmatch(r"zero|([\d.]+) % of (B's loss|the paper's difference)", words).groups()
            if of == "the paper's difference":
                return float(share) / 100 * against * (paper[0] / paper[1] - 1) if paper else 0.0
            return float(share or 0) / 100 * against

        def read(low: float, high: float) -> str:
            for verdict, side, words in cases:
                if not side or (high < bound(words) if side == "below" else low > bound(words)):
                    return verdict

        edges = [-0.3, -0.05, -0.03, -0.01, 0.0, 0.01, 0.025, 0.035, 0.05, 0.3]
        for low, high in combinations(edges, 2):
            difference = Estimate((low + high) / 2, (high - low) / 2, 3)
            found.add(decided := analysis.verdict(difference, against, matches, paper))
            assert decided == read(difference.low, difference.high)
        assert found == {HOLDS, DOES_NOT, CANNOT_TELL}

    def test_equal_steps_flops_and_seconds(self):
        chain, single = coe(OFFICIAL, 2, 8), moe(OFFICIAL)
        known = finished({}) | {
            made.id: line(made, curve)
            for made, curve in (
                (Run(SMOKE, chain, 1e-3, 1), [[0, 10.0], [4, 2.0]]),
                (Run(SMOKE, single, 1e-3, 1), [[0, 10.0], [4, 4.0]]),
            )
        }
        contrast = Contrast(chain, single)
        assert Evidence(SMOKE, known).pairs(contrast, "seconds") == []  # the chain was not timed
        timing = Run(SMOKE, chain.model, 0.0, TIMING_SEED, kind="timing")
        known[timing.id] = line(timing, [], ratio={"median": 1.6})
        # The other is the unit, whatever its own timing says.
        timing = Run(SMOKE, single.model, 0.0, TIMING_SEED, kind="timing")
        known[timing.id] = line(timing, [], ratio={"median": 0.9})
        evidence = Evidence(SMOKE, known)
        assert evidence.pairs(contrast, "steps") == [(2.0, 4.0)]
        assert evidence.pairs(contrast, "steps", share=0.5) == [(6.0, 7.0)]
        assert evidence.pairs(contrast, "seconds") == [(pytest.approx(5.0), 4.0)]  # at step 2.5
        ratio = evidence.cost(chain, "FLOPs") / evidence.cost(single, "FLOPs")
        assert 1 < ratio < 2  # of attention and head there is one
        assert evidence.pairs(contrast, "FLOPs") == [(pytest.approx(10 - 2 * 4 / ratio), 4.0)]
        # A share of the loss at that point, also where the second is cut short.
        other_way = evidence.compare(Contrast(single, chain))
        assert other_way.relative("seconds").mean == pytest.approx((4.0 - 5.0) / 5.0)

    @pytest.mark.parametrize(
        "arm",
        [
            *(moe(OFFICIAL, depth=2), coe(OFFICIAL, 2, 8), coe(OFFICIAL, 2, 8, shared_router=True), dense(PRENORM, 2)),
            *(loop(), loop("loop_own"), twelfths(4, **STABILISED)),
        ],
        ids=lambda arm: arm.label,
    )
    def test_flops_of_a_model(self, arm):
        """Every matrix once, but a router shared by iterations in each, and of the experts what is chosen."""
        made = Run(CPU, arm, 1e-3, 1)
        config = config_of(made)
        model = variants.build_model(config, arm.model.variant)
        matrices = {name: weight.numel() for name, weight in model.named_parameters() if weight.ndim == 2}
        routers = sum(size for name, size in matrices.items() if ".gate." in name)
        others = sum(size for name, size in matrices.items() if "expert" not in name and "embed" not in name)
        num_routers = config.num_hidden_layers * (1 if arm.shared_router else arm.iterations)
        assert routers == num_routers * config.hidden_size * arm.experts
        again = routers * (arm.iterations - 1) if arm.shared_router else 0
        if arm.variant == "loop":
            again += sum(size for name, size in matrices.items() if ".self_attn." in name)
        expected = config.expert_flops_per_token + 2 * (others + again)
        # Norms have a weight for every channel.
        total = sum(parameter.numel() for parameter in model.parameters())
        counted = {"parameters": total, "non_embedding_parameters": total - config.embedding_parameters}
        assert analysis.flops_per_token(line(made, [[0, 1.0]], **counted)) == pytest.approx(expected, rel=0.006)

    def test_diverged_and_missing_runs_are_no_pairs(self):
        chain, single = coe(OFFICIAL, 2, 4), moe(OFFICIAL)
        known = finished({chain: [1.0, 1.1], single: [1.5]})
        evidence = Evidence(SMOKE, known)
        assert evidence.compare(Contrast(chain, single)).differences["steps"].count == 1
        made = Run(SMOKE, single, 1e-3, 2)
        known[made.id] = line(made, [[0, 6.0], [2, 5.0], [4, None]])
        comparison = Evidence(SMOKE, known).compare(Contrast(chain, single))
        assert comparison.losses["steps"] == (1.0, 1.5) and comparison.diverged == 0
        assert comparison.relative().mean == pytest.approx(-1 / 3)
        assert {each.count for each in comparison.differences.values() if each} == {1}
        other_way = Evidence(SMOKE, known).compare(Contrast(single, chain))
        assert other_way.diverged == 1 and other_way.verdict() == DOES_NOT
        assert Evidence(SMOKE, {}).compare(Contrast(chain, single)).verdict() == MISSING

    def test_an_own_learning_rate_that_is_everybody_s_makes_no_other_runs(self):
        common, other = coe(OFFICIAL, 2, 4, own_lr=True), coe(PRENORM, 2, 4, own_lr=True)
        known = finished({coe(OFFICIAL, 2, 4): [1.0, 1.1]})
        for arm, best in ((common, 1e-3), (other, 4e-3)):
            grid = (line(made, [[0, 6.0], [4, 1.0 + (made.lr != best)]]) for made in tuning_runs(SMOKE, [arm]))
            known |= {entry["id"]: entry for entry in grid}
        evidence = Evidence(SMOKE, known)
        assert evidence.as_run(common) == coe(OFFICIAL, 2, 4) and evidence.as_run(other) == other
        assert evidence.runs(common) == evidence.runs(coe(OFFICIAL, 2, 4)) != {}
        claim = "a claim"
        contrasts = [Contrast(arm, other, claim) for arm in (common, coe(OFFICIAL, 2, 4), other)]
        assert len({report.claim_as_run(evidence, each) for each in contrasts}) == 2
        assert Evidence(SMOKE, {}).as_run(common) == common


class TestPower:
    def test_by_hand(self):
        first, second = {1: 1.0, 2: 1.2, 3: 1.4, 4: 9.0}, {1: 0.9, 2: 1.0, 3: 1.1}
        measured = power.spread([first, second, {1: 1.0}])
        # Differences 0.1, 0.2, 0.3 of 1.0; apart, standard deviations 0.2 and 0.1.
        assert measured.paired == pytest.approx(0.1) and measured.unpaired == pytest.approx(0.05**0.5)
        assert (measured.pairs, measured.freedom) == (1, 2)
        assert measured.half(3) == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
        assert power.Spread(0.0089, 0.0, 1, 1).seeds == 6 and power.spread([first]) is None

    def test_of_runs(self):
        runs = [
            line(Run(CPU, arm, 4e-3, seed), [[0, 9.0], [50, loss + 0.5 * seed], [100, loss]])
            for arm, losses in ((moe(PRENORM), (1.0, 1.2, 1.4)), (coe(PRENORM, 2, 4), (0.9, 1.0, 1.1)))
            for seed, loss in enumerate(losses, start=1)
        ]
        (found,) = power.rows(runs, rates=[4e-3], lengths=[100], lates=[1])
        assert found[:5] == ("arithmetic", PRENORM, 4e-3, 100, 1) and found[5].paired == pytest.approx(0.1)
        assert power.late_loss(runs[1], 100, 2) == pytest.approx(1.7) and power.late_loss(runs[0], 150, 1) is None
        assert list(power.rows(runs, rates=[1e-3], lengths=[100], lates=[1])) == []
        assert (
            "| arithmetic | prenorm | 0.004 | 100 | 1 | 10.00 % |"
            in power.table(runs, rates=[4e-3], lengths=[100], lates=[1])[-1]
        )


class TestReport:
    CHAIN, SINGLE = coe(OFFICIAL, 2, 4), moe(OFFICIAL)

    def written(self, tmp_path: Path, known: dict[str, dict]) -> str:
        for entry in known.values():
            results.append(results.path_of("smoke", tmp_path), entry)
        report.main([f"--results={tmp_path}", f"--output={tmp_path / 'RESULTS.md'}", "--curves=nowhere"])
        return (tmp_path / "RESULTS.md").read_text()

    def verdict_of(self, text: str, rule: str = OFFICIAL) -> str:
        rows = [row.split(" | ") for row in text.splitlines() if row.startswith("| CoE-2(4/64) reaches")]
        return next(row[7] for row in rows if row[3] == rule)

    def test_a_claim_that_holds(self, tmp_path):
        # The differences vary less than the losses.
        known = finished({self.CHAIN: [1.000, 1.201], self.SINGLE: [1.100, 1.300], moe(PRENORM): [0.9, 1.1]})
        text = self.written(tmp_path, known)
        assert self.verdict_of(text) == "**holds**" and self.verdict_of(text, PRENORM) == "**not run**"
        assert "-0.0995 ± 0.0064" in text and "1.1211 vs 1.1958 (-6.2%)" in text
        assert "| 1.1005 vs 1.2000 | -8.3 ± 0.5 % |" in text and "Of 3 claims: holds 1, does not 1, not run 1." in text
        assert "**Missing: 3 of 16 runs** (figure_3a 2, timing 1)." in text
        assert "The headline comparison is not finished." in text
        assert (
            "| CoE-2(4/64) inner | arithmetic | 0.900 / 0.900 | 1.00 / 1.00 | 0.000 / 0.000 | 0.100 (0.063) |" in text
        )
        assert (tmp_path / "smoke" / "figure_3a.png").stat().st_size > 0

    def test_a_claim_that_does_not(self, tmp_path):
        losses = {
            self.CHAIN: [1.1, 1.3],
            self.SINGLE: [1.0, 1.2],
            moe(PRENORM): [0.9, 1.1],
            coe(PRENORM, 2, 4): [0.7, 1.1],
        }
        text = self.written(tmp_path, finished(losses))
        assert self.verdict_of(text) == "**does not**" and self.verdict_of(text, PRENORM) == "**cannot tell**"
        assert "Missing" not in text and "(does not) under the official residual rule" in text
        assert "Chosen: 0.001, which lies at the edge of the grid." in text
        assert "by the fingerprints of their batches" in text

    def test_pairs_that_read_other_tokens_are_named(self, tmp_path):
        known = finished({self.CHAIN: [1.0], self.SINGLE: [1.1]})
        known[Run(SMOKE, self.CHAIN, 1e-3, 1).id]["order_fingerprint"] = "other"
        assert (
            "**Not the same tokens in the same order**: CoE-2(4/64) inner and MoE(8/64) inner, seed 1"
            in self.written(tmp_path, known)
        )

    def test_memory_at_the_size_of_a_scale(self):
        fewer, single = coe(OFFICIAL, 2, 4, experts=47, data="second"), moe(OFFICIAL, data="second")
        known = finished({fewer: [1.0, 1.0], single: [1.0, 1.0]}, scale=CPU)
        for seed, mebibytes in ((1, 79), (2, 81)):
            known[Run(CPU, fewer, 1e-3, seed).id] |= {"parameters": 90, "peak_memory_above_start": mebibytes * 2**20}
            known[Run(CPU, single, 1e-3, seed).id] |= {"parameters": 100, "peak_memory_above_start": 100 * 2**20}
        rows = [row for row in report.memory(Evidence(CPU, known)) if row.startswith("| CoE")]
        assert rows == [
            "| CoE-2(4/48) takes less memory than MoE(8/64) | gsm8k | -17.6% | -10.0% | "
            "-20.0 ± 12.7 % | **holds** | 2 |"
        ]
        assert report.memory(Evidence(SMOKE, {})) == []

    def test_what_iterations_are_worth(self):
        arm = coe(PRENORM, 2, 4)
        known = finished({arm: [1.0, 1.0], moe(PRENORM): [1.0]}, scale=CPU)
        for seed, cosine in ((1, 0.4), (2, 0.6)):
            layers = [
                {"cosine": [cosine + shift], "norm": [1.0, 3.0], "loss_without": [1.5, 1.2]} for shift in (0, 0.2)
            ]
            layers = [{"layer": index, **layer} for index, layer in enumerate(layers)]
            known[Run(CPU, arm, 1e-3, seed).id]["mechanism"] = {
                **{"loss": 1.0, "loss_without": [1.0 + cosine, 1.1], "layers": layers}
            }
        evidence = Evidence(CPU, known)
        rows = report.mechanism(evidence, {each: list(evidence.runs(each).values()) for each in (arm, moe(PRENORM))})
        # t(1) = 12.706 and a standard error of 0.1
        assert (
            "| CoE-2(4/64) prenorm | arithmetic | 2 | +0.60 ± 1.27 | +1.00 ± 0.00 / +3.00 ± 0.00 | "
            "+50.00 ± 127.06 / +10.00 ± 0.00 |" in rows
        )
        assert "| CoE-2(4/64) prenorm | arithmetic | 1 | +0.70 ± 1.27 | +50.00 ± 0.00 / +20.00 ± 0.00 |" in rows
        assert not any("MoE" in row for row in rows) and report.mechanism(evidence, {moe(PRENORM): [{}]}) == []

    def test_the_ladder(self, tmp_path, monkeypatch):
        arms = EXPERIMENTS["ladder"].arms
        for name, loss in (("ladder-0.5m", 1.1), ("ladder-256", 0.9)):
            monkeypatch.setitem(SCALES, name, scale := replace(SCALES[name], extends_grid=False))
            losses = {moe(PRENORM): [1.0, 2.0, 1.5], arms[-1]: [loss, 2 * loss + 0.01, 1.5 * loss + 0.005]}
            for entry in finished(losses, rate=scale.learning_rates[0], scale=scale).values():
                entry["split"] = "numbers"
                entry["exact_match"] = {"numbers": 0.25, "templates": 0.5}
                results.append(results.path_of(name, tmp_path), entry)
        text = "\n".join(report.ladder(report.load_evidence(tmp_path), tmp_path, tmp_path))
        label = "CoE-3(2/64) prenorm, branch norm, scaled - MoE(8/64) prenorm"
        assert re.search(rf"\| {re.escape(label)} \| \+10.3 ± [\d.]+ % \(3\) \| -9.7 ± [\d.]+ % \(3\) \|", text)
        # From 0.1, 0.21, 0.155 to -0.1, -0.19, -0.145, of 1.5: standard error sqrt(0.001683) / 1.5, t(3.85) = 2.82.
        assert f"| {label} | -20.0 ± 7.7, gains |" in text
        assert "](ladder.png)" in text and (tmp_path / "ladder.png").stat().st_size > 10_000
        assert "**No runs of ladder-128, ladder-2m, ladder-512, ladder-8m.**" in text and "not run" in text
        assert "0.5 M tokens, width 64 | 0.5 M tokens, width 256, bfloat16 |" in text
        assert "| MoE(8/64) prenorm | 25.0 ± 0.0 % | 25.0 ± 0.0 % |" in text
        assert report.ladder(report.load_evidence(tmp_path / "nowhere"), tmp_path, tmp_path) == []

    def test_the_answer_comes_first(self, tmp_path, monkeypatch):
        scale = replace(SCALES["ladder-0.5m"], extends_grid=False)
        monkeypatch.setitem(SCALES, scale.name, scale)
        losses = {moe(OFFICIAL): [0.9, 1.9], moe(PRENORM): [1.0, 2.0], coe(OFFICIAL, 2, 4): [1.0, 2.02]}
        known = finished(losses, rate=scale.learning_rates[0], scale=scale)
        for entry in known.values():
            if entry["label"] == f"timing of {coe(OFFICIAL, 2, 4).label}":
                entry["ratio"] = {"median": 1.25, "q1": 1.2, "q3": 1.3}
            if entry["label"].startswith("CoE"):
                entry["peak_memory_above_start"] = 3 * 2**18
            results.append(results.path_of(scale.name, tmp_path), entry)
        report.write(tmp_path / "report.md", tmp_path, tmp_path)
        first, second = re.split(r"^## ", (tmp_path / "report.md").read_text(), flags=re.MULTILINE)[1:3]
        assert first.startswith("In short") and second.startswith("How to read it")
        # Differences of -0.1, of 1.5; of 0.1 and 0.12, of 1.4, whose standard error is 0.01, times t(1) = 12.706.
        assert "| MoE(8/64) inner - MoE(8/64) prenorm | gsm8k | -6.7 ± 0.0 % | 1.00 | 1.00 |" in first
        assert "| CoE-2(4/64) inner - MoE(8/64) inner | gsm8k | +7.9 ± 9.1 % | 1.25 | 0.75 |" in first
        assert "| CoE-2(4/64) inner - MoE(8/64) inner | arithmetic | - | 1.25 | - |" in first
        assert report.in_short(report.load_evidence(tmp_path / "nowhere")) == []

    def test_what_the_stabilised_come_to(self, tmp_path):
        scale = replace(SMOKE, names=("stabilised",), learning_rates=(1e-3,))
        experiment = scale.experiment("stabilised")
        chain, single = experiment.contrasts[0].arm, experiment.contrasts[0].against
        normed = experiment.contrasts[1].against
        known = {}
        for arm, losses in ((chain, [0.9, 1.81]), (single, [1.0, 2.0]), (normed, [0.8, 1.7])):
            lines = [line(made, [[0, 6.0], [4, 1.0]]) for made in tuning_runs(scale, [arm])]
            for seed, loss in enumerate(losses, start=1):
                lines.append(line(Run(scale, arm, 1e-3, seed), [[0, 6.0], [4, loss]]))
            steps = {"median": 2.0 if arm == chain else 1.0, "q1": 0.9, "q3": 1.1}
            lines.append(line(Run(scale, arm.model, 0.0, TIMING_SEED, kind="timing"), [], ratio=steps))
            known |= {entry["id"]: entry for entry in lines}
        evidence = Evidence(scale, known)
        text = "\n".join(report.stabilised_summary(evidence, tmp_path, tmp_path))
        assert "![all models](models.png)" in text
        assert "**MoE(11/64) prenorm, branch norm, scaled** has the lowest loss, 1.2500." in text
        assert re.search(
            r"best chain is \*\*CoE-2\(5/64\) prenorm, stabilised\*\*: -9.7 ± [\d.]+ % from MoE\(11/64\) prenorm and "
            r"\+8.4 ± [\d.]+ % from MoE\(11/64\) prenorm, branch norm, scaled",
            text,
        )
        rows = [row.split(" | ") for row in text.splitlines() if row.startswith("| ")][2:]
        assert [(row[0], row[1], *row[4:]) for row in rows] == [
            ("| MoE(11/64) prenorm, branch norm, scaled", "1.2500", "1.00", "1.00", "2 |"),
            ("| CoE-2(5/64) prenorm, stabilised", "1.3550", "2.00", "1.00", "2 |"),
            ("| MoE(11/64) prenorm", "1.5000", "1.00", "1.00", "2 |"),
        ]
        assert f"{len(experiment.arms) - 3} models have no runs" in text
        standing = evidence.standings([chain], [single, normed])[1]
        assert standing.kind == "chain" and re.search(
            r"best chain is \*\*CoE-2\(5/64\) prenorm, stabilised\*\*, 1.3550 "
            r"\(-9.7 ± [\d.]+ % from the plain mixture, \+8.4 ± [\d.]+ % from the normed and scaled mixture, "
            r"step 2.00, peak 1.00\)",
            report.told_standing(standing),
        )
        kinds = {"scalar": "mixture", "held": "other", "loop": "loop", "loop_own": "loop", RENORM: "chain"}
        for variant, kind in kinds.items():
            arm = replace(single if variant == "scalar" else chain, variant=variant)
            assert standing._replace(arm=arm).kind == kind
        without = {
            id: entry for id, entry in known.items() if id not in {run["id"] for run in evidence.runs(normed).values()}
        }
        assert "have no runs" in "\n".join(report.stabilised_summary(Evidence(scale, without), tmp_path, tmp_path))

    def test_whether_more_iterations_pay(self, tmp_path):
        scale = SCALES["more-iterations"]
        known = {}
        for arms in SERIES.values():
            # Lines through C = 1 with slopes -0.1 and -0.3, one seed each; on the other split they rise.
            for arm, (seed, slope) in product(arms, ((6, -0.1), (7, -0.3))):
                curves = [[[0, 6.0], [500, 1 + sign * slope * (arm.iterations - 1)]] for sign in (1, -1)]
                made = line(Run(scale, arm, 8e-3, seed), curves[0])
                made["held_out"] |= {"templates": curves[1][-1:]}
                known[made["id"]] = made
        plain = SERIES["plain"]
        evidence = Evidence(scale, known)
        trend = evidence.trend(plain, "numbers")
        assert trend.losses == pytest.approx([1.0, 0.8, 0.6, 0.4]) and trend.seeds == 2
        assert [each.mean for each in trend.differences] == pytest.approx([0.0, -0.2, -0.4, -0.6])
        # Of a mean loss of 0.7; the interval of two values is t(1) = 12.706 times half of what they differ by.
        assert trend.slope.mean == pytest.approx(-0.2 / 0.7) and trend.slope.half == pytest.approx(
            12.706 * 0.1 / 0.7, 1e-4
        )
        assert trend.verdict == "cannot tell" and trend._replace(slope=Estimate(-0.2, 0.1, 2)).verdict == "holds"
        text = "\n".join(report.more_iterations(evidence, tmp_path, tmp_path))
        row = "| plain | arithmetic | numbers | 1.0000 | 0.8000 | 0.6000 | 0.4000 | - | -28.6 ± 181.5 % |"
        assert f"{row} **cannot tell** | 2 |" in text
        assert (
            "| plain | arithmetic | templates | 1.0000 | 1.2000 | 1.4000 | 1.6000 | - | +15.4 ± 97.7 % | - | 2 |"
            in text
        )
        assert "](iterations.png)" in text and (tmp_path / "iterations.png").stat().st_size > 10_000
        # A seed that one of the models lacks does not count, and one that diverged does not either.
        lacking = Run(scale, plain[1], 8e-3, 6).id
        assert (
            Evidence(scale, {id: each for id, each in known.items() if id != lacking}).trend(plain, "numbers").seeds
            == 1
        )
        diverged = known[lacking] | {"held_out": {"numbers": [[0, 6.0], [500, None]]}}
        assert Evidence(scale, known | {lacking: diverged}).trend(plain, "numbers").seeds == 1
        assert report.more_iterations(Evidence(scale, {}), tmp_path, tmp_path)[0].startswith("No series")

    def test_arithmetic_of_the_paper(self):
        for arm, millions in report.PAPER_PARAMETERS.items():
            config = report.paper_config(arm)
            counted = (config.total_parameters - config.embedding_parameters) / 2**20
            assert counted == pytest.approx(millions, abs=0.02)
        for arm, gigabytes in report.PAPER_MEMORY.items():
            assert report.memory_bytes(arm) / 2**30 == pytest.approx(gigabytes, abs=0.08)
        text = "\n".join(report.arithmetic())
        assert "| -17.7% |" in text and "| -42.2% |" in text
        assert comb(64, 4) ** 2 / comb(64, 8) == pytest.approx(91.2, abs=0.05) and "| 91.2x |" in text


class TestWorker:
    def lines(self, folder: Path, *runs: Run) -> dict[str, dict]:
        for made in runs:
            worker.main([f"--scale={made.scale.name}", f"--run={made.to_json()}", f"--results={folder}"])
        return results.load(results.path_of("smoke", folder))

    def test_a_run_from_scratch_is_the_same_again(self, few_texts, tmp_path):
        chain, single = Run(SMOKE, coe(OFFICIAL, 2, 4), 1e-3, 1), Run(SMOKE, moe(PRENORM), 1e-3, 1)
        first = self.lines(tmp_path / "first", chain, single)
        second = self.lines(tmp_path / "second", chain)
        assert results.differing_figures(first, second) == {chain.id: []}
        assert first[chain.id]["order_fingerprint"] == first[single.id]["order_fingerprint"]
        found, config = first[chain.id], config_of(chain)
        assert [step for step, _ in found["held_out"]["numbers"]] == [0, 2, 4]
        assert [step for step, _ in found["held_out"]["templates"]] == [4]
        assert len(found["training"]) == 4 and found["training_tokens"] == 4 * 2 * 32
        assert found["parameters"] == found["non_embedding_parameters"] + 2 * 300 * 16
        assert found["expert_flops_per_token"] == config.expert_flops_per_token == 2 * 3 * 16 * 11 * 2 * (4 + 1)
        assert len(found["routing"][0]["iterations"]) == 2 and 0 <= found["routing"][0]["transitions"][0]["reuse"] <= 1
        assert found["peak_memory"] > 0 and found["cpu_seconds_per_step"]["median"] > 0
        assert json.loads(json.dumps(found)) == found and len(json.dumps(found)) < 5000
        second[chain.id]["routing"] = []
        assert results.differing_figures(first, second) == {chain.id: ["routing"]}

    def test_timing(self, few_texts, tmp_path):
        made = Run(SMOKE, coe(PRENORM, 2, 4, variant=RENORM), 0.0, TIMING_SEED, kind="timing")
        found = self.lines(tmp_path, made)[made.id]
        assert found["ratio"]["min"] > 0 and len(found["seconds_per_step"]["reference"]) == SMOKE.timed_steps

    def test_the_runner_starts_it(self, tmp_path):
        settings = run.parse_settings(["--scale=smoke", f"--results={tmp_path}", "--nice=0"])
        made = Run(SMOKE, dense(PRENORM, 2), 1e-3, 1)
        with run.only_runner(tmp_path / "smoke") as lock:
            assert run.Processes(settings, lock).execute(made) is None
        assert list(results.load(results.path_of("smoke", tmp_path))) == [made.id]


class TestResults:
    def test_a_line_that_was_cut_short_costs_only_itself(self, tmp_path):
        path = tmp_path / "new" / "runs.jsonl"
        assert results.load(path) == {}
        results.append(path, {"id": "a", "loss": float("nan")})
        with open(path, "a") as file:
            file.write('{"id": "b", "lo')
        results.append(path, {"id": "c"})
        results.append(path, {"id": "a", "loss": 1.0})
        assert results.load(path) == {"a": {"id": "a", "loss": None}, "c": {"id": "c"}}


FAKE_WORKER = """
import argparse, os, pathlib, sys, time
from benchmarks.paper import results
from benchmarks.paper.runs import SCALES, Run

parser = argparse.ArgumentParser()
for name in ("scale", "run", "results", "data-root", "threads", "nice"):
    parser.add_argument("--" + name)
args = parser.parse_args()
run = Run.from_json(SCALES[args.scale], args.run)
time.sleep(float(os.environ.get("FAKE_SECONDS", 0.1)))
if run.label == os.environ.get("FAKE_FAILURE"):
    sys.exit("cannot do this one")
path = results.path_of(args.scale, pathlib.Path(args.results))
curve = [[0, 6.0], [run.scale.steps, 1 + run.lr]]
line = {"id": run.id, "split": "numbers", "held_out": {"numbers": curve}, "settings": run.settings, "seconds": 0.1}
results.append(path, line)
"""
START_RUNNER = (
    "import sys; from benchmarks.paper import run; run.Processes.module = 'fake_worker'; run.main(sys.argv[1:])"
)


class TestRunner:
    """With a worker that only writes its line."""

    @pytest.fixture
    def runner(self, tmp_path):
        (tmp_path / "fake_worker.py").write_text(FAKE_WORKER)
        environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        started = []

        def start(*options: str, **variables: str) -> subprocess.Popen:
            command = [sys.executable, "-c", START_RUNNER, "--scale=smoke", f"--results={tmp_path}", *options]
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            started.append(subprocess.Popen(command, env=environment | variables, **streams))
            return started[-1]

        yield start
        for process in started:
            process.kill()
            process.communicate()

    def ids(self, folder: Path) -> list[str]:
        path = results.path_of("smoke", folder)
        return [json.loads(text)["id"] for text in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, condition) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def test_nothing_is_lost_or_repeated_when_it_is_killed(self, runner, tmp_path):
        killed = runner()
        self.wait_for(lambda: len(self.ids(tmp_path)) >= 3)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        before = self.ids(tmp_path)
        output, _ = (again := runner()).communicate(timeout=120)
        assert again.returncode == 0, output
        after, known = self.ids(tmp_path), results.load(results.path_of("smoke", tmp_path))
        stages, complete = plan(SMOKE, known)
        assert complete and after[: len(before)] == before and len(set(after)) == len(after)
        assert set(after) == {made.id for stage in stages.values() for made in stage}
        assert {made.lr for made in stages["figure_3a"]} == {1e-3}
        output, _ = (third := runner()).communicate(timeout=120)
        assert third.returncode == 0 and self.ids(tmp_path) == after

    def test_a_run_that_fails_is_reported_and_made_again(self, runner, tmp_path):
        failing = Run(SMOKE, coe(PRENORM, 2, 4), 1e-3, 2)
        output, _ = (first := runner(FAKE_FAILURE=failing.label)).communicate(timeout=120)
        assert first.returncode == 1 and "cannot do this one" in output and "1 runs are missing" in output
        assert failing.id not in (before := self.ids(tmp_path))
        output, _ = (second := runner()).communicate(timeout=120)
        assert second.returncode == 0 and self.ids(tmp_path) == [*before, failing.id]

    def test_it_ends_its_runs_when_it_is_asked_to_end(self, runner, tmp_path):
        process = runner(FAKE_SECONDS="600")
        self.wait_for(lambda: (tmp_path / "smoke").exists())
        time.sleep(1.0)
        process.terminate()
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
        with run.only_runner(tmp_path / "smoke"):  # would wait for a run that is left
            assert self.ids(tmp_path) == []

    def test_time_and_data_that_are_missing(self, runner, tmp_path):
        output, _ = (process := runner("--minutes=0")).communicate(timeout=120)
        assert process.returncode == 1 and "the time is up" in output and self.ids(tmp_path) == []
        output, _ = runner("--only=second_data", "--seeds=1", f"--data-root={tmp_path}").communicate(timeout=120)
        assert f"not begun: MoE(8/64) inner, gsm8k, lr 0.001, seed 1: {tmp_path}/gsm8k/train.parquet" in output

    def test_dry_run(self, tmp_path, capsys):
        run.main(["--scale=cpu", f"--results={tmp_path}", "--dry-run"])
        output = capsys.readouterr().out
        assert (
            re.search(r"(\d{3}) of \1 runs to go", output) and "MoE(24/64) prenorm, gsm8k, lr 0.004, seed 3" in output
        )
        known = finished({moe(OFFICIAL): [1.0, 1.0]}, scale=CPU)
        for entry in known.values():
            results.append(results.path_of("cpu", tmp_path), entry)
        run.main(["--scale=cpu", f"--results={tmp_path}", "--dry-run", "--only", "figure_3a", "--seeds", "1"])
        output = capsys.readouterr().out
        assert "finished  MoE(8/64) inner, arithmetic, lr 0.001, seed 1" in output
        assert FIGURE_3A.title in output
