# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: sizes and targets, models, counts, timing, the machine's own rates, and the report.

Chain-of-Experts with C=2 iterations of K=4 experts is compared with transformers' own `DeepseekV2ForCausalLM` with
K=8, of the same widths and so of equal routed FLOPs. A third model, Chain-of-Experts with C=1, K=8 and the pre-norm
residual, computes the logits of the native one with the same kernel, and so shows what our layer itself costs.
"""

import datetime
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar


# Read by torch's OpenMP when it loads: threads that wait for each other spin for a moment only, see wait_policy.py.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import transformers
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DeepseekV2Config, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from benchmarks.markdown import table
from modeling_coe import CoeConfig
from modeling_coe.command_line import check_device, check_folder, check_positive, parse, setting


# ---- Sizes and targets ----------------------------------------------------------------------------------------------


class Size(NamedTuple):
    """Fields of both configurations, and the (batch, length) of a training step."""

    fields: dict[str, int]
    train: tuple[int, int] = (4, 256)
    dtype: str = "float32"


def _fields(hidden: int, width: int, vocab: int, latent: int, head: int, **fields: int) -> dict[str, int | None]:
    return {
        "hidden_size": hidden,
        "moe_intermediate_size": width,
        "vocab_size": vocab,
        "q_lora_rank": None,
        "kv_lora_rank": latent,
        "qk_nope_head_dim": head,
        "qk_rope_head_dim": head // 2,
        "v_head_dim": head,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "n_routed_experts": 63,
        "n_shared_experts": 1,
        **fields,
    }


TINY = {"num_hidden_layers": 1, "num_attention_heads": 2, "n_routed_experts": 15}
SIZES = {
    "tiny": Size(_fields(hidden=32, width=16, vocab=64, latent=16, head=16, **TINY), train=(2, 16)),
    "small": Size(_fields(hidden=256, width=176, vocab=4096, latent=128, head=32)),
    "mid": Size(_fields(hidden=512, width=352, vocab=8192, latent=256, head=64)),
    "paper": Size(_fields(hidden=1024, width=704, vocab=102_400, latent=512, head=128), (64, 512), "bfloat16"),
    # The shape of experts that kernels are published for: 32,768 tokens, 8 of 128 experts. One layer fits a device.
    "published": Size(
        _fields(
            hidden=4096,
            width=1024,
            vocab=8192,
            latent=512,
            head=128,
            num_hidden_layers=1,
            num_attention_heads=32,
            n_routed_experts=128,
        ),
        (8, 4096),
        "bfloat16",
    ),
}

NATIVE = {"num_experts_per_tok": 8}
CHAIN, SINGLE = "CoE C=2 K=4", "CoE C=1 K=8"
VARIANTS = {
    CHAIN: {"num_experts_per_tok": 4, "inner_iter": 2},
    SINGLE: {"num_experts_per_tok": 8, "inner_iter": 1, "prenorm_residual": True},
}


class Target(NamedTuple):
    """Upper bounds of the chain's figures, on the CPU in fp32 and with the default implementation: of its ratio to the
    native model by size, and of its distance to what the machine's own rates allow."""

    small: float | None = None
    mid: float | None = None
    distance: float | None = None


TARGETS = {
    "train_step": Target(small=0.85, mid=0.85, distance=1.10),
    "forward_backward": Target(distance=1.10),
    "prefill": Target(small=0.80, mid=0.80, distance=1.0),
    "decode_b1": Target(small=0.80, mid=0.70, distance=2.5),
    "decode_b8": Target(small=0.85, mid=0.55, distance=2.5),
    "decode_b1_ctx1024": Target(small=0.45, mid=0.30, distance=2.5),
    "peak_memory": Target(mid=0.97),
    SINGLE: Target(small=1.03, mid=1.03),  # in every task
}

NATIVE_IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
DEFAULT_IMPLEMENTATION = "grouped_mm"
# "batched_mm" copies the weights of every chosen expert for every token: above this it would only exhaust the memory.
BATCHED_MM_LIMIT = 2 * 2**30
SLOW = 2.0  # times the other: not measured to the last digit

Settings = TypeVar("Settings", bound="BenchmarkSettings")
TimedCall = Callable[[], float]  # does the work once and returns its seconds


# ---- Models ---------------------------------------------------------------------------------------------------------


def coe_config(size: str, variant: str = CHAIN, **overrides) -> CoeConfig:
    """Configuration of a Chain-of-Experts variant."""
    return CoeConfig(**SIZES[size].fields | VARIANTS[variant] | overrides)


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """What all scripts are told."""

    _argument_group_name: ClassVar[str] = "benchmark"
    size: str = setting("small", "of the models", choices=tuple(SIZES))
    device: str = setting("cpu", "what torch calls it")
    dtype: str | None = setting(None, "of weights; the size's if not given", choices=("float32", "bfloat16"))
    threads: int = setting(1, "on the CPU; more than one gives wall time")
    batch_size: int | None = setting(None, "sequences of a training step; the size's if not given")
    implementations: list[str] = setting([], "of CoE's experts; all that can run here if not given")
    pairs: int = setting(7, "of runs, ours and native's, for one figure")
    quick: bool = setting(False, "two pairs: to try a script, not to measure")
    seed: int = setting(0, "of weights and tokens")
    date: str = setting(datetime.date.today().isoformat(), "to write into the results")
    label: str = setting("", "that the names of results end with")
    output: Path = setting(Path("runs/benchmarks"), "folder of results and plots")

    @property
    def train_shape(self) -> tuple[int, int]:
        """Batch and length of a training step."""
        batch, length = SIZES[self.size].train
        return self.batch_size or batch, length


def native_config(size: str, **overrides) -> DeepseekV2Config:
    """Configuration of transformers' own DeepSeek-V2 of the same size and routed FLOPs."""
    return DeepseekV2Config(**SIZES[size].fields | NATIVE | overrides)


def build(config: PreTrainedConfig, settings: BenchmarkSettings) -> PreTrainedModel:
    """A model with random weights, on the device and in the dtype of the run."""
    torch.manual_seed(settings.seed)
    with torch.device(settings.device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype))


@torch.no_grad()
def copy_weights(native: PreTrainedModel, model: PreTrainedModel) -> None:
    """Gives a Chain-of-Experts model the native one's weights; routers after the first keep their own."""
    weights = native.state_dict()
    for name, parameter in model.named_parameters():
        source = weights.get(name.replace(".gate.0.", ".gate."))
        if source is not None:
            parameter.copy_(source)


def random_ids(settings: BenchmarkSettings, batch: int, length: int) -> torch.Tensor:
    """Token ids (batch, length) on the device of the run, the same at every call."""
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(SIZES[settings.size].fields["vocab_size"], (batch, length), generator=generator)
    return ids.to(settings.device)


def reason(error: Exception) -> str:
    """The beginning of an error's message, for a table."""
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line[:160]}"


def available_implementations(settings: BenchmarkSettings) -> tuple[list[str], dict[str, str]]:
    """The experts implementations that can train one layer of this size here, and why the others cannot."""
    names = settings.implementations or [DEFAULT_IMPLEMENTATION, "eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]
    model = build(coe_config(settings.size, num_hidden_layers=1, vocab_size=64), settings).train()
    ids = torch.arange(16, device=settings.device).view(2, 8)
    available, unavailable = [], {}
    for name in dict.fromkeys(names):
        try:
            model.set_experts_implementation(name)
            model(input_ids=ids, labels=ids).loss.backward()
            available.append(name)
        except Exception as error:  # a missing package, kernel or device shows in any of them
            unavailable[name] = reason(error)
    return available, unavailable


def same_kernel(native_implementation: str, available: list[str]) -> str:
    """Our name of the implementation that the native model runs under `native_implementation`."""
    ours = "torch_" + native_implementation
    return ours if ours in available else native_implementation


# ---- Counting -------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """Floating-point operations (2 per multiply-add) that a result needs, and bytes that must be moved for it."""

    flops: float
    bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least time it takes a machine with these rates."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def distinct_experts(config: CoeConfig, tokens: int) -> float:
    """Expected number of routed experts of a layer that `tokens` tokens reach if every choice is equally likely."""
    missed = 1 - config.num_experts_per_tok / config.n_routed_experts
    return config.n_routed_experts * (1 - missed ** (tokens * config.inner_iter))


def forward_work(config: CoeConfig, batch: int, length: int, context: float, logits: int, itemsize: int) -> Work:
    """Work of one forward pass of a model without dense layers and query compression.

    Attention is causal, in its expanded form. Weights are read once per pass, of the routed experts only the chosen
    ones, and so are the latents in the cache; norms, embedded rows and activations are not counted.

    Args:
        batch (`int`): Number of sequences.
        length (`int`): New tokens of each sequence.
        context (`float`): Tokens of each sequence in the cache, a mean where it grows.
        logits (`int`): Positions of each sequence whose logits are computed.
        itemsize (`int`): Bytes of one weight.
    """
    hidden, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    tokens, latent = batch * length, config.kv_lora_rank + config.qk_rope_head_dim
    attention = hidden * heads * config.qk_head_dim + hidden * latent
    attention += config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    attention += heads * config.v_head_dim * hidden
    pairs = batch * (length * context + length * (length + 1) // 2)
    router = config.n_routed_experts * hidden
    head = hidden * config.vocab_size

    flops = 2 * layers * tokens * (attention + config.inner_iter * router)
    flops += 2 * layers * pairs * heads * (config.qk_head_dim + config.v_head_dim)
    flops += tokens * config.expert_flops_per_token + 2 * batch * logits * head

    routers = (config.inner_iter if config.use_igate else 1) * router
    experts = (distinct_experts(config, tokens) + config.n_shared_experts) * 3 * hidden * config.moe_intermediate_size
    read = layers * (attention + routers + experts + batch * context * latent) + head
    return Work(flops, read * itemsize)


def forward_and_backward(forward: Work) -> Work:
    """Every product of the forward pass has two in the backward pass, and every weight gets a gradient."""
    return Work(3 * forward.flops, 3 * forward.bytes)


def adamw_work(config: CoeConfig, itemsize: int) -> Work:
    """AdamW reads weights, gradients and both moments, and writes all but the gradients."""
    return Work(0, 7 * config.total_parameters * itemsize)


def refusal(implementation: str, config: PreTrainedConfig, tokens: int, training: bool, itemsize: int) -> str | None:
    """Why an experts implementation should not even be tried on this many tokens at once, or `None`."""
    calls = config.num_hidden_layers * getattr(config, "inner_iter", 1) if training else 1
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    copied = calls * tokens * config.num_experts_per_tok * expert * itemsize
    if implementation == "batched_mm" and copied > BATCHED_MM_LIMIT:
        return f"would copy {copied / 2**30:.0f} GiB of expert weights"
    return None


# ---- Timing ---------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that a call takes: CUDA events on a GPU, CPU time with one thread, else wall time.

    CPU time of one thread does not count what other processes do in the meantime.
    """

    def __init__(self, device: str, threads: int):
        self.device, self.threads = device, threads

    def __call__(self, function: Callable[[], Any]) -> float:
        if self.device.startswith("cuda"):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            return begin.elapsed_time(end) / 1e3
        now = time.process_time if self.threads == 1 else time.perf_counter
        start = now()
        function()
        return now() - start


@contextmanager
def quiet_collector() -> Iterator[None]:
    """No garbage collection but the explicit one, which then only looks at what is new."""
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def alternate(runs: dict[str, TimedCall], rounds: int, label: str = "") -> dict[str, list[float]]:
    """Runs all of them in every round, in reverse order in every second one.

    Returns:
        `dict[str, list[float]]`: Seconds of each by round; equal positions were measured next to each other.
    """
    samples = {name: [] for name in runs}
    with quiet_collector():
        for index in tqdm(range(rounds), desc=label, leave=False, disable=None):
            for name in list(runs)[:: -1 if index % 2 else 1]:
                gc.collect()
                samples[name].append(runs[name]())
    return samples


def fastest(samples: dict[str, list[float]]) -> str:
    """Name of the samples with the least median."""
    return min(samples, key=lambda name: statistics.median(samples[name]))


class Spread(NamedTuple):
    """Order statistics of samples."""

    median: float
    q1: float
    q3: float
    min: float
    max: float


def spread(samples: list[float]) -> Spread:
    """Median, quartiles (linearly interpolated) and range."""
    if len(samples) == 1:
        return Spread(*samples * 5)
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, q1, q3, min(samples), max(samples))


# ---- The machine ----------------------------------------------------------------------------------------------------


def measure_rates(settings: BenchmarkSettings, clock: Clock, repeats: int = 3) -> dict[str, list[float]]:
    """Samples of the FLOP/s of a large square matrix product, in the dtype of the run, and of the bytes/s of reading a
    buffer far larger than the caches, by a sum and by a matrix-vector product."""
    gemm_size, buffer_bytes, columns = 2048, 2**30, 2**14
    if settings.device.startswith("cuda"):
        gemm_size, buffer_bytes = 8192, 2**32
    if settings.size == "tiny":
        gemm_size, buffer_bytes, columns = 128, 2**20, 2**10
    kwargs = {"dtype": getattr(torch, settings.dtype), "device": settings.device}
    left, right = (torch.randn(gemm_size, gemm_size, **kwargs) for _ in range(2))
    product = torch.empty_like(left)
    buffer = torch.ones(buffer_bytes // (columns * left.element_size()), columns, **kwargs)
    vector = torch.ones(columns, **kwargs)
    runs = {
        "gemm": lambda: clock(lambda: torch.mm(left, right, out=product)),
        "sum": lambda: clock(buffer.sum),
        "mv": lambda: clock(lambda: torch.mv(buffer, vector)),
    }
    times = alternate(runs, repeats, "machine rates")
    return {
        "flops_per_second": [2 * gemm_size**3 / seconds for seconds in times["gemm"]],
        "bytes_per_second": [buffer.nbytes / seconds for name in ("sum", "mv") for seconds in times[name]],
    }


def describe_machine(device: str, threads: int, date: str) -> dict[str, Any]:
    """What a reader needs to place the figures."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "clock": "CUDA events" if device.startswith("cuda") else "CPU" if threads == 1 else "wall",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date,
    }


# ---- One run of a script --------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """Something both models do.

    Args:
        name (`str`): In tables and targets.
        tokens (`int`): Tokens that one run gets done.
        work (`Callable`): Configuration -> phases of work, one after the other, of one run.
        start (`Callable`): Model -> run.
        training (`bool`): Whether it keeps activations for a backward pass.
    """

    name: str
    tokens: int
    work: Callable[[CoeConfig], list[Work]]
    start: Callable[[PreTrainedModel], TimedCall]
    training: bool = False


@dataclass
class Comparison:
    """Paired samples, in seconds or bytes, of one of our models and of the native one.

    `work` is what one of our samples has to do at least, `tokens` how many tokens it gets done.
    """

    task: str
    variant: str
    implementation: str
    native_implementation: str
    ours: list[float]
    native: list[float]
    unit: str = "s"
    work: list[Work] | None = None
    tokens: int | None = None

    @property
    def ratios(self) -> list[float]:
        return [ours / native for ours, native in zip(self.ours, self.native, strict=True)]

    def targets(self, settings: BenchmarkSettings) -> dict[str, float]:
        """Those of ratio and distance that there are."""
        target = TARGETS.get(SINGLE if self.variant == SINGLE else self.task)
        has_targets = settings.device == "cpu" and settings.dtype == "float32" and settings.size in Target._fields
        is_default = self.variant == SINGLE or self.implementation == DEFAULT_IMPLEMENTATION
        if target is None or not has_targets or not is_default:
            return {}
        bounds = {"ratio": getattr(target, settings.size), "distance": target.distance}
        return {name: bound for name, bound in bounds.items() if bound is not None}

    def figures(self, settings: BenchmarkSettings, rates: dict[str, float]) -> dict[str, Any]:
        """Samples and everything derived from them, for the results."""
        ours, ratio = statistics.median(self.ours), spread(self.ratios)
        figures = asdict(self) | {
            "ratios": self.ratios,
            "ratio": ratio._asdict(),
            "ours_median": ours,
            "native_median": statistics.median(self.native),
        }
        values = {"ratio": ratio.median}
        if self.work is not None:
            figures["tokens_per_second"] = self.tokens / ours
            figures["least_seconds"] = sum(phase.seconds(**rates) for phase in self.work)
            figures["flops_per_second"] = sum(phase.flops for phase in self.work) / ours
            figures["distance"] = values["distance"] = ours / figures["least_seconds"]
        for name, target in self.targets(settings).items():
            figures |= {f"{name}_target": target, f"{name}_met": values[name] <= target}
        return figures


class Benchmark:
    """Collects the comparisons of one script and writes them as JSON, Markdown table and plot."""

    def __init__(self, name: str, settings: BenchmarkSettings):
        check_device(settings.device)
        torch.set_num_threads(settings.threads)
        self.name, self.settings = name, settings
        self.clock = Clock(settings.device, settings.threads)
        self.itemsize = getattr(torch, settings.dtype).itemsize
        self.rate_samples = measure_rates(settings, self.clock)
        self.implementations, self.skipped = available_implementations(settings)
        self.native_samples: dict[str, dict[str, list[float]]] = {}
        self.comparisons: list[Comparison] = []
        self.notes: list[str] = []

    def possible(self, label: str, implementation: str, config: PreTrainedConfig, task: Task, run: TimedCall) -> bool:
        """Whether an implementation can do a task, which is tried; notes why where it cannot."""
        why = refusal(implementation, config, task.tokens, task.training, self.itemsize)
        if why is None:
            try:
                run()
            except Exception as error:  # out of memory, or whatever a kernel raises on this shape
                why = reason(error)
        if why is not None:
            self.skipped[label] = why
        return why is None

    def native_best(self, task: Task, native: PreTrainedModel, run: TimedCall) -> str:
        """Name of the native model's fastest implementation in a short run, which is made once per task."""
        if task.name not in self.native_samples:
            runs = {name: using(native, name, run) for name in NATIVE_IMPLEMENTATIONS}
            possible = {
                name: run
                for name, run in runs.items()
                if self.possible(f"{task.name}, native, {name}", name, native.config, task, run)
            }
            label = f"{task.name}: native's best"
            samples = alternate(possible, 1, label)
            least = min(samples[name][0] for name in possible)
            close = {name: run for name, run in possible.items() if samples[name][0] < SLOW * least}
            for name, more in alternate(close, 2, label).items():
                samples[name] += more
            self.native_samples[task.name] = samples
        return fastest(self.native_samples[task.name])

    def compare_models(
        self,
        tasks: list[Task],
        variants: Iterable[str] = tuple(VARIANTS),
        prepare: Callable[[PreTrainedModel], PreTrainedModel] = lambda model: model,
        **overrides,
    ) -> None:
        """Times the tasks on the native model and on variants of ours: the chain with every implementation, the single
        iteration with the native model's kernel. `overrides` are fields of the configurations; our models
        are run as `prepare` makes them."""
        native = build(native_config(self.settings.size, **overrides), self.settings)
        native_runs = {task.name: task.start(native) for task in tasks}
        for variant in variants:
            config = coe_config(self.settings.size, variant, **overrides)
            model = build(config, self.settings)
            copy_weights(native, model)
            model = prepare(model)
            for task in tasks:
                best = self.native_best(task, native, native_runs[task.name])
                native_run, start = using(native, best, native_runs[task.name]), task.start(model)
                single = (same_kernel(best, self.implementations), DEFAULT_IMPLEMENTATION)
                for name in self.implementations if variant == CHAIN else dict.fromkeys(single):
                    label, run = f"{task.name}, {variant}, {name}", using(model, name, start)
                    if self.possible(label, name, config, task, run):
                        samples = self.pairs(run, native_run, label)
                        work = task.work(config)
                        self.add(Comparison(task.name, variant, name, best, *samples, work=work, tokens=task.tokens))

    def pairs(self, ours: TimedCall, native: TimedCall, label: str) -> tuple[list[float], list[float]]:
        """Paired samples of two runs that are warm; few where ours is so slow that nobody needs its third digit."""
        runs, few = {"ours": ours, "native": native}, min(2, self.settings.pairs)
        samples = alternate(runs, few, label)
        if min(samples["ours"]) < SLOW * max(samples["native"]):
            for name, more in alternate(runs, self.settings.pairs - few, label).items():
                samples[name] += more
        return samples["ours"], samples["native"]

    def add(self, comparison: Comparison) -> None:
        """Keeps a comparison, writes what there is by now, and prints its ratio."""
        self.comparisons.append(comparison)
        self.save()
        ratio = spread(comparison.ratios)
        print(
            f"{comparison.task:<20} {comparison.variant} {comparison.implementation:<18} "
            f"{ratio.median:.3f} of native's {comparison.native_implementation} ({ratio.q1:.3f} to {ratio.q3:.3f})",
            flush=True,
        )

    def save(self) -> dict[str, Any]:
        """Writes results and table."""
        rates = {name: max(samples) for name, samples in self.rate_samples.items()}
        results = {
            "benchmark": self.name,
            "machine": describe_machine(self.settings.device, self.settings.threads, self.settings.date),
            "settings": {name: value for name, value in asdict(self.settings).items() if name != "output"},
            "rates": rates,
            "rate_samples": self.rate_samples,
            "native_samples": self.native_samples,
            "skipped": self.skipped,
            "notes": self.notes,
            "comparisons": [comparison.figures(self.settings, rates) for comparison in self.comparisons],
        }
        write_tables(results, self.path, markdown(results))
        return results

    @property
    def path(self) -> Path:
        """Of the results, without the ending of a file."""
        return self.settings.output / "-".join(filter(None, (self.name, self.settings.size, self.settings.label)))

    def write(self, draw: Callable[[dict[str, Any], Path], None] | None = None) -> dict[str, Any]:
        """Measures the machine's rates once more, and writes results, table and plot, which `draw` draws."""
        for name, samples in measure_rates(self.settings, self.clock).items():
            self.rate_samples[name] += samples
        results = self.save()
        (draw or plot)(results, self.path.with_suffix(".png"))
        print(f"\n{markdown(results)}\nwritten to {self.path}.json, .md and .png")
        return results


def using(model: PreTrainedModel, implementation: str, run: TimedCall) -> TimedCall:
    """The run with an experts implementation, chosen outside of the time that is measured."""

    def run_with_implementation() -> float:
        model.set_experts_implementation(implementation)
        return run()

    return run_with_implementation


def parse_settings(kind: type[Settings], description: str, argv: list[str] | None) -> Settings:
    """Reads a command line.

    Raises:
        InputError: An option has no such value.
    """
    settings = parse(kind, description, argv)
    check_positive(settings, "pairs", "threads", *(["batch_size"] if settings.batch_size is not None else []))
    check_folder("output", settings.output)
    dtype = settings.dtype or SIZES[settings.size].dtype
    return replace(settings, dtype=dtype, pairs=2 if settings.quick else settings.pairs)


# ---- Report ---------------------------------------------------------------------------------------------------------


def write_tables(results: dict[str, Any], path: Path, tables: str) -> None:
    """Writes results as `.json` and their tables as `.md`; `path` is without the ending, and its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(tables)


def write_results(
    results: dict[str, Any],
    path: Path,
    markdown: Callable[[dict[str, Any]], str],
    plot: Callable[[dict[str, Any], Path], None],
) -> dict[str, Any]:
    """Writes results as `.json`, their tables as `.md` and what is drawn of them as `.png`, and prints the tables.

    Args:
        path (`Path`): Without the ending of a file; its folder is made.
    """
    tables = markdown(results)
    write_tables(results, path, tables)
    plot(results, path.with_suffix(".png"))
    print(tables)
    return results


def draw_ratios(ratios: dict[str, dict[str, float]], reference: str, title: str, path: Path) -> None:
    """Draws bars from 1 in groups, on a logarithmic axis.

    Args:
        ratios (`dict[str, dict[str, float]]`): Model -> what is compared -> ratio to the reference.
        reference (`str`): What the ratios are to.
    """
    figure = Figure(figsize=(9, 3.5))  # drawn by Agg, which needs no display
    axes = figure.subplots()
    groups = list(next(iter(ratios.values())))
    width = 0.8 / len(ratios)
    for position, (name, of_model) in enumerate(ratios.items()):
        places = [index + (position - (len(ratios) - 1) / 2) * width for index in range(len(groups))]
        axes.bar(places, [of_model[group] - 1 for group in groups], width, bottom=1, label=name)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xticks(range(len(groups)), groups)
    axes.set(ylabel=f"relative to {reference}", title=title)
    axes.legend(fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def quantity(value: float, unit: str) -> str:
    """A time in milliseconds or a size in MiB."""
    return f"{value * 1e3:,.4g} ms" if unit == "s" else f"{value / 2**20:,.1f} MiB"


def target_note(row: dict[str, Any], name: str) -> str:
    """The target of a figure and whether it is met."""
    if f"{name}_target" not in row:
        return ""
    return f"<= {row[f'{name}_target']:.2f}: {'met' if row[f'{name}_met'] else 'not met'}"


def ratio_cells(row: dict[str, Any]) -> list[str]:
    ratio, unit = row["ratio"], row["unit"]
    return [
        row["task"],
        row["variant"],
        row["implementation"],
        quantity(row["ours_median"], unit),
        f"{quantity(row['native_median'], unit)} ({row['native_implementation']})",
        f"{ratio['median']:.3f}",
        f"{ratio['q1']:.3f} to {ratio['q3']:.3f}",
        f"{ratio['min']:.3f} to {ratio['max']:.3f}",
        target_note(row, "ratio"),
    ]


def distance_cells(row: dict[str, Any], rates: dict[str, float]) -> list[str]:
    return [
        row["task"],
        row["variant"],
        row["implementation"],
        f"{row['tokens_per_second']:,.0f}",
        f"{row['flops_per_second'] / 1e9:,.4g} ({row['flops_per_second'] / rates['flops_per_second']:.0%})",
        quantity(row["least_seconds"], "s"),
        f"{row['distance']:.2f}",
        target_note(row, "distance"),
    ]


def markdown(results: dict[str, Any]) -> str:
    """The results as tables: ratios, distances to the machine, what could not run."""
    machine, settings, rates = results["machine"], results["settings"], results["rates"]
    lines = [
        f"# {results['benchmark']}, size {settings['size']}, {settings['dtype']}",
        "",
        f"{machine['device']}, {machine['threads']} of {machine['cores']} CPU cores, {machine['clock']} time, torch "
        f"{machine['torch']}, transformers {machine['transformers']}, {machine['date']}. The machine's own rates: "
        f"{rates['flops_per_second'] / 1e9:,.1f} GFLOP/s in a matrix product, "
        f"{rates['bytes_per_second'] / 1e9:,.1f} GB/s read from memory.",
        "",
        f"Ratio: CoE over native's best, median over {settings['pairs']} pairs of runs. Below 1 is better.",
        "",
    ]
    lines += table(
        ("task", "model", "experts", "CoE", "native (experts)", "ratio", "quartiles", "range", "target"),
        map(ratio_cells, results["comparisons"]),
        "lllrrrlll",
    )
    lines += [
        "",
        "Distance to the machine: CoE's time over the least time its FLOPs and bytes take at the machine's own rates.",
        "",
    ]
    lines += table(
        ("task", "model", "experts", "tokens/s", "GFLOP/s (of a product's)", "least time", "distance", "target"),
        (distance_cells(row, rates) for row in results["comparisons"] if "distance" in row),
        "lllrrrrl",
    )
    lines += [line for note in results["notes"] for line in ("", note)]
    if results["skipped"]:
        lines += ["", "Not measured:", ""]
        lines += [f"- {what}: {why}" for what, why in results["skipped"].items()]
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws the ratios as bars from 1, on a logarithmic axis, with their quartiles; targets are marked."""
    rows = results["comparisons"][::-1]  # the axis runs upwards
    names = list(dict.fromkeys(row["implementation"] for row in results["comparisons"]))
    figure = Figure(figsize=(9, 1.5 + 0.3 * len(rows)))  # drawn by Agg, which needs no display
    axes = figure.subplots()
    for position, row in enumerate(rows):
        ratio = row["ratio"]
        error = [[ratio["median"] - ratio["q1"]], [ratio["q3"] - ratio["median"]]]
        color = f"C{names.index(row['implementation'])}"
        axes.barh(position, ratio["median"] - 1, left=1, xerr=error, color=color, error_kw={"capsize": 2})
        if "ratio_target" in row:
            axes.plot(row["ratio_target"], position, "k|", markersize=14, markeredgewidth=2)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_ylim(-0.8, len(rows) - 0.2)
    axes.set_yticks(
        range(len(rows)), [f"{row['task']}, {row['variant']}, {row['implementation']}" for row in rows], fontsize=8
    )
    axes.set_xscale("log", base=2)
    low = min([0.5, *(row["ratio"]["min"] for row in rows), *(row.get("ratio_target", 1) for row in rows)])
    axes.set_xlim(0.9 * low, 1.1 * max([2, *(row["ratio"]["max"] for row in rows)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    machine, settings = results["machine"], results["settings"]
    axes.set(
        xlabel="CoE / native (left of 1: CoE needs less); bars: medians and quartiles, |: target",
        title=f"{results['benchmark']}, {settings['size']}, {settings['dtype']}, {machine['device']}",
    )
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150, bbox_inches="tight")
