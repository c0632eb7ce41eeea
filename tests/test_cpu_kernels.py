"""Which kernel computes the experts' products on the CPU, and that each of them computes them."""

import json
import subprocess
import sys
import threading

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from modeling_coe import cpu_kernels
from modeling_coe.callbacks import CpuKernelsCallback
from modeling_coe.cpu_kernels import (
    KERNELS,
    KINDS,
    Product,
    add_grouped_product,
    grouped_outer_product,
    grouped_product,
    kernel_for,
)

from .helpers import random_ids, tiny_model


COUNTS = {
    "uneven": [5, 0, 1, 17, 33, 0],
    "one row": [0, 0, 1],
    "all on one": [0, 40, 0],
    "none": [0, 0, 0],
    "one expert": [7],
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
PRODUCT = Product.of("output", torch.float32, 16, 32, 4)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As at the beginning of a process."""
    monkeypatch.delenv("COE_CPU_KERNEL", raising=False)
    monkeypatch.setattr(cpu_kernels, "_chosen", {})
    monkeypatch.setattr(cpu_kernels, "_given", {})


@pytest.fixture
def times(monkeypatch):
    """What measuring says, to be filled by the test; `measured` counts how often it was asked."""

    class Times(dict):
        measured = 0

    def measure(product, kernels):
        times.measured += 1
        return {kernel: times.get(kernel, 1.0) for kernel in kernels}

    times = Times()
    monkeypatch.setattr(cpu_kernels, "_time", measure)
    monkeypatch.setattr(cpu_kernels, "KERNELS", dict.fromkeys(KERNELS, lambda product: None))
    return times


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype and actual.shape == expected.shape
    error = (actual.double() - expected).abs().max().item() if actual.numel() else 0.0
    assert error <= TOLERANCE[dtype] * max(expected.abs().max().item() if expected.numel() else 0.0, 1.0)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("widths", [(16, 32), (5, 7)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernel", KERNELS)
class TestAgainstTheLoop:
    """Every kernel, also where another one has to take its place."""

    @pytest.fixture(autouse=True)
    def fixed(self, kernel, monkeypatch):
        monkeypatch.setenv("COE_CPU_KERNEL", kernel)

    @pytest.mark.parametrize("in_place", [False, True])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_products(self, dtype, widths, counts, transposed, in_place):
        torch.manual_seed(0)
        height, width = widths
        inputs = torch.randn(sum(counts), height).to(dtype)
        weight = torch.randn(len(counts), *((width, height) if transposed else widths)).to(dtype)
        weight = weight.mT if transposed else weight
        expected = torch.empty(sum(counts), width, dtype=torch.float64)
        experts = [expert for expert, count in enumerate(counts) for _ in range(count)]
        for row, expert in enumerate(experts):
            expected[row] = inputs[row].double() @ weight[expert].double()
        out = torch.full(expected.shape, torch.nan, dtype=dtype) if in_place else None
        actual = grouped_product(inputs, weight, torch.tensor(counts), sum(counts) / len(counts), out)
        assert actual is out or not in_place
        assert_close(actual, expected, dtype)

    def test_products_that_are_added(self, dtype, widths, counts):
        torch.manual_seed(0)
        inputs, output = (torch.randn(sum(counts), width).to(dtype) for width in widths)
        weight = torch.randn(len(counts), *widths).to(dtype)
        expected = output.double()
        experts = [expert for expert, count in enumerate(counts) for _ in range(count)]
        for row, expert in enumerate(experts):
            expected[row] += inputs[row].double() @ weight[expert].double()
        add_grouped_product(output, inputs, weight, torch.tensor(counts))
        assert_close(output, expected, dtype)

    @pytest.mark.parametrize("in_place", [False, True])
    def test_outer_products(self, dtype, widths, counts, in_place):
        torch.manual_seed(0)
        left, right = (torch.randn(sum(counts), width).to(dtype) for width in widths)
        expected = torch.zeros(len(counts), *widths, dtype=torch.float64)
        experts = [expert for expert, count in enumerate(counts) for _ in range(count)]
        for row, expert in enumerate(experts):
            expected[expert] += torch.outer(left[row].double(), right[row].double())
        out = torch.full(expected.shape, torch.nan, dtype=dtype) if in_place else None
        actual = grouped_outer_product(left, right, torch.tensor(counts), sum(counts) / len(counts), out)
        assert actual is out or not in_place
        assert_close(actual, expected, dtype)
        if in_place:
            grouped_outer_product(left, right, torch.tensor(counts), sum(counts) / len(counts), out, add=True)
            assert_close(out, 2 * expected, dtype)


@pytest.mark.parametrize("kernel", KERNELS)
def test_views_and_inference_tensors(kernel, monkeypatch):
    monkeypatch.setenv("COE_CPU_KERNEL", kernel)
    counts = torch.tensor([3, 20])
    whole = torch.randn(3, 16, 32)
    inputs, unaligned = torch.randn(23, 16), torch.randn(2 * 16 * 32 + 1)[1:].view(2, 16, 32)
    with torch.inference_mode():
        made_in_inference = whole.clone()
        for weight in (whole[1:], made_in_inference[:2], unaligned):
            expected = torch.cat((inputs[:3] @ weight[0], inputs[3:] @ weight[1]))
            torch.testing.assert_close(grouped_product(inputs, weight, counts, 11.5), expected)


class TestClasses:
    def test_follow_from_the_shape(self):
        rows = [Product.of("output", torch.float32, 64, 64, load).rows for load in (0.1, 1, 1.1, 2, 5, 64, 65, 1e6)]
        assert rows == [1, 1, 2, 2, 8, 64, 128, 256]
        wide = Product.of("output", torch.float32, 4096, 14336, 1e6)
        assert wide.shape == (1024, 1024) and wide.rows < 256
        assert Product.of("output", torch.float32, 4097, 64, 1).shape == (1025, 64)

    def test_tell_apart(self):
        names = {
            str(Product.of(kind, dtype, *shape, load))
            for kind in KINDS
            for dtype in TOLERANCE
            for shape in ((16, 32), (32, 16))
            for load in (1, 8)
        }
        assert len(names) == len(KINDS) * len(TOLERANCE) * 4

    def test_threads(self):
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(before + 1)
            assert Product.of("output", torch.float32, 16, 32, 4) != PRODUCT._replace(threads=before)
        finally:
            torch.set_num_threads(before)

    def test_routing_does_not_decide(self, times):
        weight = torch.randn(4, 16, 32)
        for counts in ([3, 5, 4, 4], [16, 0, 0, 0], [0, 0, 0, 1]):  # the last with another rank's rows left out
            grouped_product(torch.randn(sum(counts), 16), weight, torch.tensor(counts), 4.0)
        assert times.measured == 1


class TestChoice:
    @pytest.mark.parametrize(
        "seconds, expected",
        [
            ((1.0, 1.0, 1.0), "grouped_mm"),
            ((1.04, 1.0, 1.0), "grouped_mm"),
            ((1.06, 1.0, 1.0), "mm"),
            ((2.0, 1.06, 1.0), "onednn"),
            ((2.0, 1.04, 1.0), "mm"),
            (("RuntimeError: no", 1.0, 1.01), "mm"),
            (("RuntimeError: no", 3.0, "RuntimeError: no"), "mm"),
            (("RuntimeError: no",) * 3, "mm"),
        ],
    )
    def test_the_first_unless_another_is_clearly_faster(self, times, seconds, expected):
        times.update(zip(KERNELS, seconds, strict=True))
        assert kernel_for(PRODUCT) == expected

    def test_stays(self, times):
        times.update(grouped_mm=1.0, mm=2.0, onednn=3.0)
        assert kernel_for(PRODUCT) == "grouped_mm"
        times.update(grouped_mm=3.0)
        assert kernel_for(PRODUCT) == "grouped_mm" and times.measured == 1
        assert kernel_for(PRODUCT._replace(rows=8)) == "mm" and times.measured == 2

    def test_nothing_to_choose(self, times, monkeypatch):
        monkeypatch.setattr(cpu_kernels, "KERNELS", KERNELS)
        assert kernel_for(PRODUCT._replace(dtype=torch.float64)) == "mm" and times.measured == 0

    def test_threads_agree(self, monkeypatch):
        """The first one measures, and the others wait for it."""
        barrier, chosen, measured = threading.Barrier(4), [], []

        def measure(product, kernels):
            measured.append(product)
            return {kernel: float(len(measured) != position) for position, kernel in enumerate(kernels)}

        monkeypatch.setattr(cpu_kernels, "_time", measure)
        monkeypatch.setattr(cpu_kernels, "KERNELS", dict.fromkeys(KERNELS, lambda product: None))

        def choose():
            barrier.wait()
            chosen.append(kernel_for(PRODUCT))

        threads = [threading.Thread(target=choose) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert chosen == ["mm"] * 4 and len(measured) == 1

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_variable(self, times, monkeypatch, kernel):
        times.update(dict.fromkeys(KERNELS, 2.0) | {"mm": 1.0})
        monkeypatch.setenv("COE_CPU_KERNEL", kernel)
        assert kernel_for(PRODUCT) == kernel and times.measured == 0
        monkeypatch.setenv("COE_CPU_KERNEL", "auto")
        assert kernel_for(PRODUCT) == "mm" and times.measured == 1

    def test_bad_variable(self, monkeypatch):
        monkeypatch.setenv("COE_CPU_KERNEL", "mkl")
        with pytest.raises(
            ValueError, match=r"^COE_CPU_KERNEL is 'mkl'; choose one of auto, grouped_mm, mm, onednn, packed, "
        ):
            kernel_for(PRODUCT)

    def test_a_kernel_that_cannot_run(self, monkeypatch):
        monkeypatch.delattr(F, "grouped_mm", raising=False)
        assert "has no `torch.nn.functional.grouped_mm`" in cpu_kernels.measure(PRODUCT)["grouped_mm"]
        monkeypatch.setenv("COE_CPU_KERNEL", "grouped_mm")
        assert kernel_for(PRODUCT) == "mm"
        grouped_product(torch.randn(4, 16), torch.randn(2, 16, 32), torch.tensor([1, 3]), 2.0)


class TestMeasuring:
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("kind", KINDS)
    def test_times_or_reasons(self, kind, dtype):
        for shape, load in (((16, 32), 1), ((16, 32), 40), ((5, 7), 3)):
            outcome = cpu_kernels.measure(Product.of(kind, dtype, *shape, load))
            assert list(outcome) == list(KERNELS)
            able = [result for result in outcome.values() if isinstance(result, float)]
            assert isinstance(outcome["mm"], float)
            assert len(able) == 1 or all(0 < seconds < float("inf") for seconds in able)
            assert all(isinstance(result, float) or result for result in outcome.values())

    def test_minima_of_turns(self, monkeypatch):
        """A fake clock: the first kernel is disturbed twice, the last one drops out after the first turns."""
        seconds = {"grouped_mm": [0, 9, 9, 1, 9, 9, 9], "mm": [0, *[2] * 9], "onednn": [0, 5, 5, 5]}
        calls, now = [], [0.0]

        def example(product):
            def compute(kernel):
                calls.append(kernel)
                now[0] += seconds[kernel][calls.count(kernel) - 1]

            return compute

        monkeypatch.setattr(cpu_kernels, "_example", example)
        monkeypatch.setattr(cpu_kernels, "_clock", lambda threads: lambda: now[0])
        monkeypatch.setattr(cpu_kernels, "SECONDS", 1e9)
        monkeypatch.setattr(cpu_kernels, "ROUNDS", 6)
        assert cpu_kernels._time(PRODUCT, list(KERNELS)) == {"grouped_mm": 1.0, "mm": 2.0, "onednn": 5.0}
        assert calls[3:9] == ["grouped_mm", "mm", "onednn"] * 2
        assert calls.count("onednn") == 1 + cpu_kernels.LEAST_ROUNDS and calls.count("grouped_mm") == 7

    def test_a_kernel_that_raises(self, monkeypatch):
        def refuse(*args, **kwargs):
            raise RuntimeError("could not create a primitive\nand more")

        monkeypatch.setattr(cpu_kernels, "_onednn_mm", refuse)
        monkeypatch.setattr(cpu_kernels, "_onednn_obstacle", lambda product: None)
        monkeypatch.setitem(KERNELS, "onednn", lambda product: None)
        assert cpu_kernels.measure(PRODUCT)["onednn"] == "RuntimeError: could not create a primitive"
        assert kernel_for(PRODUCT) != "onednn"

    def test_is_not_seen(self):
        """Whatever surrounds the first call."""

        class Refuse(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                raise AssertionError(func)

        state = torch.get_rng_state()
        modes = (torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"), torch.enable_grad(), Refuse())
        for load, mode in enumerate(modes):
            with mode:
                outcome = cpu_kernels.measure(Product.of("output", torch.float32, 16, 32, 2**load))
            assert all(isinstance(outcome[kernel], float) for kernel in ("grouped_mm", "mm") if hasattr(F, kernel))
        assert torch.equal(torch.get_rng_state(), state)

    def test_not_under_compile(self, times):
        torch._dynamo.reset()
        model = tiny_model(num_hidden_layers=1)
        model.set_experts_implementation("grouped_mm")
        torch.compile(model, backend="eager")(random_ids(1, 6))
        assert times.measured == 0
        model(random_ids(1, 6))
        assert times.measured > 0


class TestChoices:
    def test_round_trip(self, times):
        times.update(grouped_mm=2.0, mm=1.0, onednn=2.0)
        kernel_for(PRODUCT)
        choices = json.loads(json.dumps(cpu_kernels.choices()))
        assert choices == {"output, float32, 16 x 32, rows 4, threads " + str(PRODUCT.threads): "mm"}
        cpu_kernels._chosen.clear()
        times.update(grouped_mm=1.0, mm=2.0)
        cpu_kernels.use(choices)
        assert kernel_for(PRODUCT) == "mm" and times.measured == 1
        assert cpu_kernels.choices() == choices

    def test_replace_what_was_chosen(self, times):
        other = PRODUCT._replace(rows=8)
        assert kernel_for(PRODUCT) == kernel_for(other) == "grouped_mm"
        cpu_kernels.use({str(PRODUCT): "onednn", "of another time": "mm"})
        assert kernel_for(PRODUCT) == "onednn" and kernel_for(other) == "grouped_mm"
        assert cpu_kernels.choices()["of another time"] == "mm"

    def test_unknown_kernel(self):
        with pytest.raises(
            ValueError, match=r"^'a class' has the unknown CPU kernel 'mkl'; choose one of grouped_mm, "
        ):
            cpu_kernels.use({"a class": "mkl"})
        assert cpu_kernels.choices() == {}

    def test_a_kernel_that_cannot_run_here(self):
        product = PRODUCT._replace(dtype=torch.float64)
        cpu_kernels.use({str(product): "onednn"})
        assert kernel_for(product) == "mm"


def test_a_resumed_run_has_the_kernels_of_the_interrupted_one(tmp_path, times):
    """Although measuring would choose others by then: the losses are the same, bit for bit."""
    torch.manual_seed(1)
    data = [{"input_ids": ids, "labels": ids} for ids in random_ids(12, 8)]
    times.update(grouped_mm=2.0, mm=1.0, onednn=2.0)

    def train(checkpoint=None):
        options = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2}
        arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, **options)
        trainer = Trainer(tiny_model(), arguments, train_dataset=data, callbacks=[CpuKernelsCallback()])
        trainer.train(resume_from_checkpoint=checkpoint)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    losses, choices = train(), cpu_kernels.choices()
    assert set(choices.values()) == {"mm"}
    cpu_kernels._chosen.clear()
    measured = times.measured
    times.update(grouped_mm=1.0)
    assert train(str(tmp_path / "checkpoint-2")) == losses
    assert cpu_kernels.choices() == choices and times.measured == measured


class TestDoctor:
    def test_table(self, capsys):
        assert cpu_kernels._doctor(["--hidden-size", "20", "--expert-width", "6", "--rows", "1", "3"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("processor: ") and f"torch {torch.__version__}" in out
        assert out.count("output, float32, 20 x 12, rows") == 2
        assert "weight gradient in place, float32, 20 x 6, rows 4" in out
        assert "grouped_mm: it needs rows of whole 16 bytes" in out or "grouped_mm: torch" in out

    def test_model_folder(self, tmp_path, capsys):
        tiny_model().to(torch.float64).save_pretrained(tmp_path)
        assert cpu_kernels._doctor([str(tmp_path), "--rows", "2"]) == 0
        out = capsys.readouterr().out
        assert "hidden size 32," in out and "onednn: torch itself takes oneDNN for torch.float64" in out

    @pytest.mark.parametrize("bits", [8, 4])
    def test_quantized_weights(self, capsys, bits):
        options = ["--hidden-size", "64", "--expert-width", "24", "--rows", "1", "--bits", str(bits)]
        assert cpu_kernels._doctor(options) == 0
        out = capsys.readouterr().out
        assert f"output of {bits}-bit weights, float32, 64 x 48, rows 1" in out and "bfloat16_mm" in out
        assert ("multiple of 16 features" if bits == 8 else "in groups of 32") in out

    def test_fixed_kernel(self, capsys, monkeypatch):
        monkeypatch.setenv("COE_CPU_KERNEL", "mm")
        cpu_kernels._doctor(["--hidden-size", "16", "--expert-width", "8", "--rows", "1"])
        rows = [line for line in capsys.readouterr().out.splitlines() if "rows 1," in line]
        assert len(rows) == 8 and all(line.endswith(" mm") for line in rows)

    def test_bad_option(self, capsys):
        with pytest.raises(SystemExit):
            cpu_kernels._doctor(["--rows", "0"])
        assert "must be more than 0" in capsys.readouterr().err

    def test_as_a_command(self):
        command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "modeling_coe.cpu_kernels"]
        options = ["--hidden-size", "16", "--expert-width", "8", "--rows", "1", "--threads", "1"]
        run = subprocess.run(command + options, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "threads: 1" in run.stdout
