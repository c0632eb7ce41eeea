"""`benchmarks/`: what is counted, paired and derived, and that scripts report what they measured, at any speed."""

import gc
import importlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from benchmarks import experts, generate, measure, rows_per_expert, train_step
from modeling_coe import CoeConfig

from .helpers import save_chain


SCRIPTS = {"experts": experts, "generate": generate, "rows_per_expert": rows_per_expert, "train_step": train_step}


@pytest.fixture
def args():
    return measure.parse_settings(measure.BenchmarkSettings, "", ["--size", "tiny"])


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """The scripts set the number of threads, and how malloc of later processes works."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class TestCounts:
    CONFIG = CoeConfig(
        **{"hidden_size": 4, "num_attention_heads": 2, "q_lora_rank": None, "kv_lora_rank": 3, "qk_nope_head_dim": 2},
        **{"qk_rope_head_dim": 2, "v_head_dim": 5, "vocab_size": 7, "num_hidden_layers": 2, "n_routed_experts": 5},
        **{"moe_intermediate_size": 3, "num_experts_per_tok": 2, "inner_iter": 2, "n_shared_experts": 1},
    )
    ATTENTION = 4 * 8 + 4 * 5 + 3 * 2 * 7 + 10 * 4  # queries, latents, keys and values, output
    ROUTER, EXPERT, HEAD = 5 * 4, 3 * 4 * 3, 4 * 7

    def test_one_token(self):
        work = measure.forward_work(self.CONFIG, batch=1, length=1, context=0, logits=1, itemsize=4)
        products = self.ATTENTION + 2 * self.ROUTER + 2 * (2 + 1) * self.EXPERT + 2 * (4 + 5)
        assert work.flops == 2 * (2 * products + self.HEAD) == 1688
        chosen = 5 * (1 - (3 / 5) ** 2)  # an expert is missed by both iterations with 3/5 each
        weights = 2 * (self.ATTENTION + 2 * self.ROUTER + (chosen + 1) * self.EXPERT) + self.HEAD
        assert work.bytes == pytest.approx(4 * weights) == pytest.approx(2713.6)

    def test_batch_with_cache(self):
        work = measure.forward_work(self.CONFIG, batch=3, length=2, context=4, logits=1, itemsize=2)
        per_token = self.ATTENTION + 2 * self.ROUTER + 2 * (2 + 1) * self.EXPERT
        pairs = 3 * (5 + 6)  # the first new token sees 5, the second 6
        assert work.flops == 2 * (2 * (6 * per_token + pairs * 2 * (4 + 5)) + 3 * self.HEAD) == 11904
        chosen, latents = 5 * (1 - (3 / 5) ** 12), 3 * 4 * (3 + 2)
        weights = 2 * (self.ATTENTION + 2 * self.ROUTER + (chosen + 1) * self.EXPERT + latents) + self.HEAD
        assert work.bytes == pytest.approx(2 * weights)

    def test_torch_counts_the_same(self, args):
        native = measure.build(measure.native_config("tiny"), args)
        native.set_experts_implementation("eager")
        native.set_attn_implementation("eager")  # torch has no count for the fused one on the CPU
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            native(input_ids=torch.tensor([[1]]))
        config = measure.coe_config("tiny", measure.SINGLE)
        work = measure.forward_work(config, batch=1, length=1, context=0, logits=1, itemsize=4)
        assert counter.get_total_flops() == work.flops

    def test_training(self):
        forward = measure.Work(10, 100)
        assert measure.forward_and_backward(forward) == (30, 300)
        assert measure.adamw_work(self.CONFIG, 4) == (0, 28 * self.CONFIG.total_parameters)

    def test_least_time_is_the_slower_of_computing_and_reading(self):
        assert measure.Work(10, 100).seconds(flops_per_second=5, bytes_per_second=100) == 2
        assert measure.Work(10, 100).seconds(flops_per_second=5, bytes_per_second=10) == 10

    def test_experts(self):
        work = SCRIPTS["experts"].experts_work(self.CONFIG, 1, 4)
        assert work.flops == 2 * 4 * self.EXPERT
        assert work.bytes == pytest.approx(4 * 3.2 * self.EXPERT)

    def test_copies_that_do_not_fit(self):
        config = measure.coe_config("mid")
        assert measure.refusal("batched_mm", config, 8, training=False, itemsize=4) is None
        # 1024 tokens, 4 layers, 8 experts of 3 * 512 * 352 weights
        why = measure.refusal("batched_mm", config, 1024, training=True, itemsize=4)
        assert why == "would copy 66 GiB of expert weights"
        assert measure.refusal("grouped_mm", config, 1024, training=True, itemsize=4) is None


class TestPairs:
    def test_order_alternates(self):
        calls = []

        def run(name: str) -> float:
            calls.append(name)
            return float(len(calls))

        samples = measure.alternate({"a": lambda: run("a"), "b": lambda: run("b")}, rounds=3)
        assert "".join(calls) == "ab" + "ba" + "ab"
        assert samples == {"a": [1, 4, 5], "b": [2, 3, 6]}
        assert gc.isenabled() and gc.get_freeze_count() == 0

    def test_spread(self):
        assert measure.spread([4.0, 1.0, 2.0, 3.0, 10.0]) == (3, 2, 4, 1, 10)
        assert measure.spread([1.0, 2.0]) == (1.5, 1.25, 1.75, 1, 2)
        assert measure.spread([7.0]) == (7, 7, 7, 7, 7)

    def test_ratio_is_the_median_of_ratios(self, args):
        comparison = measure.Comparison("task", measure.CHAIN, "eager", "eager", [1.0, 6.0, 8.0], [2.0, 2.0, 8.0])
        figures = comparison.figures(args, {})
        assert figures["ratios"] == [0.5, 3.0, 1.0] and figures["ratio"]["median"] == 1.0
        assert figures["ours_median"] / figures["native_median"] == 3.0

    def test_fastest(self):
        assert measure.fastest({"a": [1.0, 5.0, 6.0], "b": [4.0, 3.0, 9.0]}) == "b"


class TestTargets:
    def figures(self, ours: float, *options: str, **fields: str) -> dict:
        names = {"task": "prefill", "variant": measure.CHAIN, "implementation": "grouped_mm"} | fields
        work = [measure.Work(10, 0)]
        comparison = measure.Comparison(**names, native_implementation="eager", ours=[ours], native=[10.0], work=work)
        comparison.tokens = 4
        args = measure.parse_settings(measure.BenchmarkSettings, "", ["--size", "mid", *options])
        return comparison.figures(args, {"flops_per_second": 2.0, "bytes_per_second": 1.0})

    def test_met_or_not(self):
        good, bad = self.figures(5.0), self.figures(9.0)
        assert good["ratio_target"] == 0.80 and good["ratio_met"] and not bad["ratio_met"]
        assert good["distance"] == 1.0 and good["distance_met"] and not bad["distance_met"]
        assert good["tokens_per_second"] == 0.8

    def test_single_iteration(self):
        figures = self.figures(10.2, variant=measure.SINGLE)
        assert figures["ratio_target"] == 1.03 and figures["ratio_met"] and "distance_target" not in figures

    def test_where_there_are_none(self):
        for figures in (
            self.figures(5.0, implementation="eager"),
            self.figures(5.0, "--device", "cuda"),
            self.figures(5.0, "--dtype", "bfloat16"),
        ):
            assert not [name for name in figures if name.endswith(("_target", "_met"))]


class TestModels:
    def test_single_iteration_is_the_native_model(self, args):
        native = measure.build(measure.native_config("tiny"), args).eval()
        model = measure.build(measure.coe_config("tiny", measure.SINGLE), args).eval()
        measure.copy_weights(native, model)
        ids = measure.random_ids(args, 2, 9)
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, native(input_ids=ids).logits)

    def test_equal_routed_flops(self):
        chain, single = (measure.coe_config("mid", variant, n_shared_experts=0) for variant in measure.VARIANTS)
        assert chain.expert_flops_per_token == single.expert_flops_per_token

    def test_native_runs_upstreams_kernel(self):
        assert ALL_EXPERTS_FUNCTIONS["grouped_mm"] is grouped_mm_experts_forward

    def test_unavailable_implementations_have_a_reason(self):
        args = measure.parse_settings(
            measure.BenchmarkSettings, "", ["--size", "tiny", "--implementations", "eager", "no_such_kernel"]
        )
        available, unavailable = measure.available_implementations(args)
        assert available == ["eager"]
        assert "no_such_kernel" in unavailable["no_such_kernel"]


OPTIONS = {
    "experts": ["--tokens", "1", "16", "--experts", "16", "--implementations", "grouped_mm", "eager"],
    "generate": ["--implementations", "grouped_mm"],
    "rows_per_expert": ["--batches", "1", "2"],
    "train_step": ["--implementations", "grouped_mm"],
}
GENERATION = ("prefill", "decode_b1", "decode_b8", "decode_b1_ctx1024")
ROWS = {  # tasks by model; the implementations of a single iteration follow from what the native model does best
    "experts": {
        measure.CHAIN: [
            f"{direction} T={t} N=16 I=16" for direction in ("forward", "forward_backward") for t in (1, 16)
        ]
    },
    "generate": {measure.CHAIN: GENERATION, measure.SINGLE: GENERATION},
    "rows_per_expert": {measure.CHAIN: ("train_step, 256 tokens", "train_step, 512 tokens")},
    "train_step": {
        measure.CHAIN: ("train_step", "forward_backward", "peak_memory", "peak_memory_above_weights"),
        measure.SINGLE: ("train_step", "forward_backward"),
    },
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name, tmp_path, capsys):
    argv = ["--size", "tiny", "--quick", "--date", "2026-01-31", "--output", str(tmp_path), *OPTIONS[name]]
    SCRIPTS[name].main(argv)
    results = json.loads((tmp_path / f"{name}-tiny.json").read_text())
    rows, rates, table = results["comparisons"], results["rates"], (tmp_path / f"{name}-tiny.md").read_text()
    assert results["machine"]["date"] == "2026-01-31" and results["machine"]["torch"] == torch.__version__
    assert {rate: max(samples) for rate, samples in results["rate_samples"].items()} == rates
    assert (tmp_path / f"{name}-tiny.png").read_bytes().startswith(b"\x89PNG")
    assert table in capsys.readouterr().out
    for variant, tasks in ROWS[name].items():
        found = {row["task"] for row in rows if row["variant"] == variant}
        if any(what.startswith("peak_memory") for what in results["skipped"]):  # not every system measures so little
            found |= {task for task in tasks if task.startswith("peak_memory")}
        assert found == set(tasks)
    if name == "experts":
        assert {row["implementation"] for row in rows} == {"grouped_mm", "eager"}
    for row in rows:
        assert row["ratios"] == [ours / native for ours, native in zip(row["ours"], row["native"], strict=True)]
        assert row["ratio"] == measure.spread(row["ratios"])._asdict()
        assert f"| {row['ratio']['median']:.3f} | {row['ratio']['q1']:.3f} to {row['ratio']['q3']:.3f}" in table
        if row["unit"] == "bytes":
            continue
        assert row["native_implementation"] == measure.fastest(results["native_samples"][row["task"]])
        phases = [max(f / rates["flops_per_second"], b / rates["bytes_per_second"]) for f, b in row["work"]]
        assert row["distance"] == pytest.approx(row["ours_median"] / sum(phases))
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["ours_median"])


def test_rows_per_expert():
    config = measure.coe_config("mid")
    assert rows_per_expert.rows_per_expert("mid", 1024) * config.n_routed_experts == 1024 * 4


def test_the_default_against_every_other_implementation(capsys):
    """A row for each shape and direction, with a ratio for every implementation that could run."""
    options = ["--hidden-sizes", "64", "--rows", "1", "4", "--experts", "3", "--top-k", "2"]
    rows = importlib.import_module("benchmarks.cpu_kernels").main([*options, "--pairs", "1", "--seconds", "0"])
    assert len(rows) == 2 * 2
    for ratios in rows:
        assert set(ratios) == {"torch_grouped_mm", "eager", "batched_mm"} and min(ratios.values()) > 0
    output = capsys.readouterr().out
    assert output.count("| forward |") == output.count("| forward and backward |") == 2
    assert "weight gradient, float32" in output


def test_a_conversion_is_measured(tmp_path, capsys):
    shape = {"layers": 2, "hidden-size": 64, "experts": 16, "width": 32, "heads": 2, "vocab-size": 128}
    options = [f"--{name}={value}" for name, value in shape.items()]
    importlib.import_module("benchmarks.conversion").main(
        [*options, "--work", str(tmp_path / "work"), "--output", str(tmp_path)]
    )
    results = json.loads((tmp_path / "conversion-deepseek_v3.json").read_text())
    experts = 2 * 16 * 3 * 64 * 32 * 2
    assert experts < results["source_bytes"] and results["layer_bytes_in_float32"] == experts + experts // 16
    assert results["peak_bytes"] > 1e8 and results["seconds"] > 0
    assert (tmp_path / "conversion-deepseek_v3.md").read_text() in capsys.readouterr().out
    assert not list((tmp_path / "work").iterdir())


def test_a_run_of_the_upcycling_benchmark_is_what_its_options_say(tmp_path, monkeypatch):
    """Results are looked up by all that decides them: other options, data or another model make another run."""
    upcycling = importlib.import_module("benchmarks.upcycling")
    made = []

    def run(script: Path, option: str, folder: Path, *options: str) -> None:
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"options": options}))
        made.append(folder)

    monkeypatch.setattr(upcycling, "run", run)
    settings = upcycling.parse_settings(["--work", str(tmp_path)])
    others = [replace(settings, eval_steps=7), replace(settings, data=["--data=other.jsonl"])]
    options = ("--model", tmp_path / "split", "--steps", 3, "--lr", 0.5)
    first = upcycling.pretrain(settings, "split-1", *options)
    assert upcycling.pretrain(settings, "split-1", *options) == first and len(made) == 1
    for index in (1, 3, 5):
        changed = (*options[:index], "other", *options[index + 1 :])
        assert upcycling.pretrain(settings, "split-1", *changed)[0]["options"][-6 + index] == "other"
    for other in others:
        upcycling.pretrain(other, "split-1", *options)
    assert len(set(made)) == len(made) == 6


def test_dense_sources(tmp_path, capsys):
    """Every candidate for a router and every chain has its figures, and a dense model is as fast as itself."""
    module = importlib.import_module("benchmarks.dense_sources")
    results = module.main(["--output", str(tmp_path), "--tokens", "40", "--seeds", "2", "--pairs", "1"])
    assert json.loads((tmp_path / "dense-random.json").read_text())["routers"].keys() == results["routers"].keys()
    assert capsys.readouterr().out == (tmp_path / "dense-random.md").read_text() + "\n"
    assert results["decoding"].keys() == {"dense", *module.CHAINS}
    assert results["decoding"]["dense"]["ratios"] == [1.0]
    for figures in results["routers"].values():
        assert all(len(layers) == 4 for layers in figures.values())
    # Equal scores: all tokens choose the same experts.
    assert results["routers"]["zero"]["dead"] == [0.75] * 4


def test_quantized(tmp_path, capsys):
    """A model of every form with its size, times and predictions; float32 is as fast as itself, and agrees."""
    pytest.importorskip("torchao")
    module = importlib.import_module("benchmarks.quantized")
    save_chain(tmp_path / "model", length=600)
    rows = [{"question": "How many apples?" * 20, "answer": "Three." * 20}] * 10
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.jsonl"), "--output", str(tmp_path)]
    results = module.main([*places, "--tokens", "512", "--quick"])
    text = (tmp_path / "quantized-model.md").read_text()
    assert capsys.readouterr().out == text + "\n" and str(tmp_path) not in text
    saved = (tmp_path / "quantized-model.json").read_text()
    assert json.loads(saved)["rows"] == results["rows"] and str(tmp_path) not in saved
    assert (tmp_path / "quantized-model.png").stat().st_size > 0
    assert [row["model"] for row in results["rows"]] == list(module.OPTIONS) and results["tokens"] == 512
    first, *others = results["rows"]
    assert first["agreement"] == 1 and all(task["ratio"]["median"] == 1 for task in first["tasks"].values())
    for row in others:
        assert tuple(row["tasks"]) == module.TASKS[:-1] and row["bytes"] < first["bytes"] and row["agreement"] > 0.5
        assert abs(row["perplexity"] / first["perplexity"] - 1) < 0.2
        for task, figures in row["tasks"].items():
            ratios = [one / two for one, two in zip(figures["samples"], first["tasks"][task]["samples"], strict=True)]
            assert figures["ratio"] == measure.spread(ratios)._asdict() and min(figures["samples"]) > 0


def test_training_by_autocast(tmp_path):
    pytest.importorskip("torchao")
    module = importlib.import_module("benchmarks.quantized")
    settings = ["--size", "tiny", "--quick", "--tasks", "train_step", "--output", str(tmp_path)]
    training = module.main(settings)["training"]
    assert tuple(training) == module.TRAINED and training[module.FLOAT32]["ratio"]["median"] == 1
    assert all(min(figures["samples"]) > 0 for figures in training.values())


def test_balance_of_a_router():
    """Two experts by the sign of one number, and a third that nobody chooses."""
    module = importlib.import_module("benchmarks.dense_sources")
    router = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    figures = module.balance(router, torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0], [-1.0, 5.0]]), top_k=1)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(3)
    assert figures == pytest.approx({"dead": 1 / 3, "largest": 2.25, "entropy": entropy})
