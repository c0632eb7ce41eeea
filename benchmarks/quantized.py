# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Models in bfloat16, 8 and 4 bits next to float32: bytes, decoding, reading a prompt, and what they predict.

    python -m benchmarks.quantized --size mid
    python -m benchmarks.quantized --model runs/demo/model --text ../shared/data/gsm8k/test.parquet

All models are alive in one process and run in turn; ratios are those of neighbouring runs, to float32. "int8 by
torchao" are the same weights as int8, multiplied as torchao does: every weight is widened whenever it is used. Without
`--model` the weights are random and nothing is predicted, and a training step is timed in float32 and under autocast,
which before left the experts in float32.
"""

import copy
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from datasets import load_dataset
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from benchmarks.markdown import table
from benchmarks.measure import (
    SIZES,
    BenchmarkSettings,
    Clock,
    TimedCall,
    alternate,
    build,
    coe_config,
    describe_machine,
    draw_ratios,
    parse_settings,
    quantity,
    random_ids,
    spread,
    write_results,
)
from benchmarks.train_step import adamw, training_step
from modeling_coe import int4_weight_only, int8_weight_only, quantization_report
from modeling_coe.command_line import command, setting
from modeling_coe.quantized_linear import QuantizedLinear
from modeling_coe.releases import CACHE


FLOAT32, BFLOAT16, INT8, INT4, BY_TORCHAO = "float32", "bfloat16", "int8", "int4", "int8 by torchao"
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    FLOAT32: lambda: {"dtype": torch.float32},
    BFLOAT16: lambda: {"dtype": torch.bfloat16},
    INT8: lambda: {"dtype": torch.float32, "quantization_config": int8_weight_only()},
    INT4: lambda: {"dtype": torch.float32, "quantization_config": int4_weight_only()},
    BY_TORCHAO: lambda: {"dtype": torch.float32, "quantization_config": int8_weight_only()},
}
DECODE = {"decode_b1": (1, 128), "decode_b8": (8, 128)}  # batch, context
PREFILL = (4, 512)  # batch, length
TASKS = (*DECODE, "prefill", "train_step")
AUTOCAST, LINEAR_AUTOCAST = "bfloat16 by autocast", "bfloat16 by autocast, experts in float32"
TRAINED = (FLOAT32, AUTOCAST, LINEAR_AUTOCAST)
STEPS = 8  # of decoding, in one run
TARGETS = {INT8: 0.60, INT4: 0.45}  # of decode_b1, at size mid


@dataclass(frozen=True, kw_only=True)
class QuantizedOptions:
    _argument_group_name: ClassVar[str] = "quantised models"
    model: Path | None = setting(None, "folder of a model; random weights of the size if not given")
    text: Path | None = setting(None, "parquet or JSON-lines file of questions and answers to predict")
    tokens: int = setting(8192, "of the text")
    tasks: list[str] = setting(list(TASKS), "what to time", choices=TASKS)


@dataclass(frozen=True, kw_only=True)
class QuantizedSettings(QuantizedOptions, BenchmarkSettings):
    pass


def load(folder: Path, name: str) -> PreTrainedModel:
    """The model of a folder in one of its forms."""
    model = AutoModelForCausalLM.from_pretrained(folder, **OPTIONS[name]()).eval()
    if name == BY_TORCHAO:
        model.set_experts_implementation("eager")
        for module in model.modules():
            if type(module) is QuantizedLinear:
                module.__class__ = nn.Linear
    return model


# ---- Time -----------------------------------------------------------------------------------------------------------


def token_ids(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def decoder(model: PreTrainedModel, clock: Clock, batch: int, context: int, steps: int) -> TimedCall:
    """Seconds of a greedy step after a prompt that is in the cache."""
    prompt_cache = DynamicCache(config=model.config)
    ids = token_ids(model, batch, context)
    first = model(ids, **{CACHE: prompt_cache}, use_cache=True, logits_to_keep=1).logits.argmax(dim=-1)

    @torch.no_grad()
    def decode(cache: DynamicCache, token: torch.Tensor) -> None:
        for _ in range(steps):
            token = model(token, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits.argmax(dim=-1)

    def run() -> float:
        cache = copy.deepcopy(prompt_cache)
        return clock(lambda: decode(cache, first)) / steps

    return run


def reader(model: PreTrainedModel, clock: Clock) -> TimedCall:
    """Seconds of reading prompts."""
    ids = token_ids(model, *PREFILL)

    @torch.no_grad()
    def read() -> None:
        model(ids, use_cache=True, logits_to_keep=1)

    return lambda: clock(read)


def measure_times(models: dict[str, PreTrainedModel], settings: QuantizedSettings) -> dict[str, Any]:
    """Task -> model -> seconds of each run."""
    clock, steps = Clock("cpu", settings.threads), 2 if settings.quick else STEPS
    samples = {}
    for task in settings.tasks:
        if task == "train_step":
            continue
        if task == "prefill":
            runs = {name: reader(model, clock) for name, model in models.items()}
        else:
            runs = {name: decoder(model, clock, *DECODE[task], steps) for name, model in models.items()}
        alternate(runs, 1, "warm-up")
        samples[task] = alternate(runs, settings.pairs, task)
    return samples


def measure_training(folder: Path, settings: QuantizedSettings) -> dict[str, list[float]]:
    """Seconds of a training step with its optimizer, by how it computes."""
    clock, ids = Clock("cpu", settings.threads), random_ids(settings, *SIZES[settings.size].train)

    def start(name: str) -> TimedCall:
        model = load(folder, FLOAT32).train()
        optimizer = adamw(model)

        def run() -> float:
            with ExitStack() as stack:
                if name != FLOAT32:
                    stack.enter_context(torch.autocast("cpu", torch.bfloat16))
                if name == LINEAR_AUTOCAST:
                    stack.enter_context(mock.patch("modeling_coe.experts._autocast_dtype", return_value=None))
                return clock(lambda: training_step(model, ids, optimizer))

        return run

    runs = {name: start(name) for name in TRAINED}
    alternate(runs, 1, "warm-up")
    return alternate(runs, settings.pairs, "train_step")


# ---- What is predicted ----------------------------------------------------------------------------------------------


def read_text(settings: QuantizedSettings) -> torch.Tensor:
    """(blocks, 256) token ids of questions and answers, one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    kind = "parquet" if settings.text.suffix == ".parquet" else "json"
    rows = load_dataset(kind, data_files=str(settings.text), split="train")
    ids: list[int] = []
    for row in rows:
        ids += tokenizer("\n".join(map(str, row.values())) + "\n\n")["input_ids"]
        if len(ids) >= settings.tokens:
            break
    ids = ids[: settings.tokens]
    length = min(256, len(ids))
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


@torch.no_grad()
def predict(model: PreTrainedModel, blocks: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Perplexity, and the token that is predicted at every place."""
    losses, best = [], []
    for block in blocks.split(4):
        logits = model(block).logits.float()
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), block[:, 1:].flatten(), reduction="none"))
        best.append(logits.argmax(dim=-1))
    return torch.cat(losses).mean().exp().item(), torch.cat(best)


# ---- Report ---------------------------------------------------------------------------------------------------------


def with_ratio(samples: dict[str, list[float]], name: str) -> dict[str, Any]:
    ratios = [one / first for one, first in zip(samples[name], samples[FLOAT32], strict=True)]
    return {"samples": samples[name], "ratio": spread(ratios)._asdict()}


def rows_of(
    models: dict[str, PreTrainedModel], times: dict[str, Any], blocks: torch.Tensor | None, has_targets: bool
) -> Iterator[dict[str, Any]]:
    """The figures of each model."""
    reference = None
    for name, model in models.items():
        row: dict[str, Any] = {"model": name, "bytes": quantization_report(model).total.bytes}
        row["tasks"] = {task: with_ratio(samples, name) for task, samples in times.items()}
        if has_targets and name in TARGETS and "decode_b1" in times:
            row |= {"target": TARGETS[name], "met": row["tasks"]["decode_b1"]["ratio"]["median"] <= TARGETS[name]}
        if blocks is not None:
            row["perplexity"], best = predict(model, blocks)
            reference = best if reference is None else reference
            row["agreement"] = (best == reference).float().mean().item()
        yield row


def ratio_text(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})"


def cells(row: dict[str, Any], first: dict[str, Any]) -> Iterator[str]:
    yield row["model"]
    yield quantity(row["bytes"], "bytes")
    yield f"{row['bytes'] / first['bytes']:.3f}"
    for figures in row["tasks"].values():
        yield quantity(statistics.median(figures["samples"]), "s")
        yield ratio_text(figures["ratio"])
    if "perplexity" in row:
        yield f"{row['perplexity']:.3f}"
        yield f"{row['agreement']:.1%}"
    yield f"<= {row['target']:.2f}: {'met' if row['met'] else 'not met'}" if "target" in row else ""


def markdown(results: dict[str, Any]) -> str:
    machine, rows = results["machine"], results["rows"]
    header = ["model", "size", "ratio"]
    for task in rows[0]["tasks"]:
        header += [task, "ratio"]
    if "perplexity" in rows[0]:
        header += ["perplexity", "same token"]
    lines = [
        f"# quantised, {results['name']}",
        "",
        f"{machine['device']}, {machine['threads']} of {machine['cores']} CPU cores, {machine['clock']} time, "
        f"{machine['capability']}, torch {machine['torch']}, transformers {machine['transformers']}, "
        f"{machine['date']}.",
        "",
        f"Ratios: to float32, median (quartiles) over {results['settings']['pairs']} runs of all models in turn. "
        "Below 1 is better.",
        "",
        *(
            [f'Predicted: {results["tokens"]:,} tokens. "Same token": as float32 thinks most likely.', ""]
            if results["tokens"]
            else []
        ),
        *table([*header, "target of decode_b1"], (list(cells(row, rows[0])) for row in rows)),
    ]
    if results["training"]:
        trained = (
            (name, quantity(statistics.median(figures["samples"]), "s"), ratio_text(figures["ratio"]))
            for name, figures in results["training"].items()
        )
        lines += ["", *table(("training step", "median", "ratio"), trained)]
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws size and times of every model, relative to float32."""
    rows = results["rows"]
    ratios = {
        row["model"]: {"size": row["bytes"] / rows[0]["bytes"]}
        | {task: figures["ratio"]["median"] for task, figures in row["tasks"].items()}
        for row in rows
    }
    draw_ratios(ratios, FLOAT32, f"quantised, {results['name']}, {results['machine']['device']}", path)


@command
def main(argv: list[str] | None = None) -> dict[str, Any]:
    settings = parse_settings(QuantizedSettings, __doc__.splitlines()[0], argv)
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = settings.model
        if folder is None:
            folder = Path(temporary)
            build(coe_config(settings.size), settings).save_pretrained(folder)
        models = {name: load(folder, name) for name in OPTIONS}
        has_training = settings.model is None and "train_step" in settings.tasks
        training = measure_training(folder, settings) if has_training else {}
    times = measure_times(models, settings)
    blocks = read_text(settings) if settings.model is not None and settings.text is not None else None
    name = f"size {settings.size}" if settings.model is None else settings.model.resolve().name
    is_mid = settings.model is None and settings.size == "mid" and settings.threads == 1
    own = {key: value for key, value in asdict(settings).items() if key not in ("output", "model", "text")}
    results = {
        "benchmark": "quantized",
        "name": name,
        "machine": describe_machine("cpu", settings.threads, settings.date),
        "settings": own,
        "tokens": 0 if blocks is None else blocks.numel(),
        "training": {name: with_ratio(training, name) for name in training},
        "rows": list(rows_of(models, times, blocks, is_mid)),
    }
    path = settings.output / f"quantized-{name.removeprefix('size ')}"
    return write_results(results, path, markdown, plot)


if __name__ == "__main__":
    main()
