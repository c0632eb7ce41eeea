# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What the routed experts of a layer should take on a GPU, on paper: FLOPs, bytes and launches of each implementation.

    python -m benchmarks.gpu_model

Each implementation is written down as the operations that it launches, one after the other. An operation takes the
longer of its FLOPs at the peak rate of matrix products and its bytes at the memory's bandwidth, and every kernel a
fixed time to launch. Products of one expert at a time leave multiprocessors idle: they reach the share of the peak
that their tiles of 128 x 128 occupy. Operands are read once, results written once, and nothing stays in a cache
between two operations: a measurement can be below this where it does, and is above it where a kernel does not reach
the peak.

Where `benchmarks/gpu.py` has measured a device, its figures stand beside the model's.
"""

import datetime
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.gpu import slug
from benchmarks.markdown import table
from benchmarks.measure import write_results
from modeling_coe.command_line import check_folder, command, parse, setting


RESULTS = Path(__file__).resolve().parent / "results"
BLOCK = 128  # rows of a block of MegaBlocks, and of a tile of a product
LAUNCH_SECONDS = 4e-6  # an assumption: what a host needs for a small operation of torch is more, a graph's replay less


class Gpu(NamedTuple):
    """Peaks of a GPU from its data sheet: dense bf16 products with sums in fp32, and the memory's bandwidth.

    Args:
        flops (`float`): Per second, without sparsity.
        bandwidth (`float`): Bytes per second.
        device (`str`): As the driver calls it.
        multiprocessors (`int`): That it has.
        has_grouped_mm (`bool`): Whether torch has a grouped kernel for bf16 there, rather than a loop.
        source (`str`): Of the figures.
    """

    flops: float
    bandwidth: float
    device: str
    multiprocessors: int
    has_grouped_mm: bool
    source: str


GPUS = {
    "H100 SXM": Gpu(989e12, 3.35e12, "NVIDIA H100 80GB HBM3", 132, True, "NVIDIA H100 Tensor Core GPU data sheet"),
    "H200 SXM": Gpu(989e12, 4.8e12, "NVIDIA H200", 132, True, "NVIDIA H200 Tensor Core GPU data sheet"),
    "A100 SXM": Gpu(312e12, 2.039e12, "NVIDIA A100-SXM4-80GB", 108, False, "NVIDIA A100 Tensor Core GPU data sheet"),
}


class Shape(NamedTuple):
    """One layer's routed experts: T tokens go C times through K of N experts of width I; the stream is H wide."""

    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int
    calls: int
    itemsize: int = 2

    @property
    def rows(self) -> int:
        """R = T * K of one call."""
        return self.tokens * self.top_k

    @property
    def expert(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.hidden * self.width

    @property
    def hit(self) -> float:
        """Expected number of experts that one call reaches, if every choice is equally likely."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** self.tokens)

    @property
    def padded_rows(self) -> float:
        """Expected rows of one call when every expert's are padded to whole blocks."""
        share = self.top_k / self.experts  # rows of an expert are binomial
        if share == 1:
            return self.experts * math.ceil(self.tokens / BLOCK) * BLOCK
        spread = 12 * math.sqrt(self.tokens * share * (1 - share)) + 12
        least = max(0, math.floor(self.tokens * share - spread))
        most = min(self.tokens, math.ceil(self.tokens * share + spread))
        total = 0.0
        for rows in range(least, most + 1):
            choices = math.lgamma(self.tokens + 1) - math.lgamma(rows + 1) - math.lgamma(self.tokens - rows + 1)
            log_odds = rows * math.log(share) + (self.tokens - rows) * math.log1p(-share)
            total += math.exp(choices + log_odds) * math.ceil(rows / BLOCK) * BLOCK
        return self.experts * total


SHAPES = {
    "paper, training (T = 32,768)": Shape(32_768, 1024, 704, 63, 4, 2),
    "paper, prefill (T = 2,048)": Shape(2048, 1024, 704, 63, 4, 2),
    "paper, decode (T = 8)": Shape(8, 1024, 704, 63, 4, 2),
    "paper, decode (T = 1)": Shape(1, 1024, 704, 63, 4, 2),
    "published, training (T = 32,768)": Shape(32_768, 4096, 1024, 128, 4, 2),
    "published, one call of 8 (T = 32,768)": Shape(32_768, 4096, 1024, 128, 8, 1),
    "published, decode (T = 8)": Shape(8, 4096, 1024, 128, 4, 2),
}


class Operation(NamedTuple):
    """What is launched together: FLOPs of matrix products, bytes moved, and kernels.

    `one_by_one` are the results of products that are launched one an expert: (share of the FLOPs, rows, columns).
    """

    name: str
    flops: float
    bytes: float
    launches: float = 1
    one_by_one: tuple[tuple[float, float, float], ...] = ((1.0, math.inf, math.inf),)

    def computing(self, gpu: Gpu) -> float:
        """Seconds of the products."""
        return sum(
            share * self.flops / (gpu.flops * occupancy(rows, columns, gpu.multiprocessors))
            for share, rows, columns in self.one_by_one
        )


def occupancy(rows: float, columns: float, multiprocessors: int) -> float:
    """Share of the multiprocessors that the tiles of a product keep busy, over all of their rounds."""
    tiles = math.inf if math.inf in (rows, columns) else math.ceil(rows / BLOCK) * math.ceil(columns / BLOCK)
    return 1.0 if tiles == math.inf else tiles / (math.ceil(tiles / multiprocessors) * multiprocessors)


# ---- Operations of one call -----------------------------------------------------------------------------------------
# Bytes are elements read and written, times the size of an element: `s` is that of the weights' dtype, and 4 that of
# float32, in which routing weights are multiplied and summed.


def gate(rows: float, shape: Shape) -> Operation:
    """silu of one half (read, write), times the other (two read, one written)."""
    return Operation("activation", 0, 5 * rows * shape.width * shape.itemsize, 2)


def gate_backward(rows: float, shape: Shape) -> Operation:
    """Two products of two (6), the activation's (3), and both halves put together (4)."""
    return Operation("activation", 0, 13 * rows * shape.width * shape.itemsize, 5)


def products(rows: float, weights: float, shape: Shape) -> Operation:
    """Gate and up as one product, then down: operands, results and each weight once."""
    moved = weights * shape.expert + rows * (2 * shape.hidden + 3 * shape.width)
    return Operation("products", 2 * rows * shape.expert, moved * shape.itemsize, 2)


def products_backward(rows: float, weights: float, written: float, shape: Shape) -> Operation:
    """Gradients of inputs, as the forward pass, and of weights, which `written` experts are written for."""
    forward = products(rows, weights, shape)
    moved = written * shape.expert + rows * (2 * shape.hidden + 3 * shape.width)
    return Operation("products", 2 * forward.flops, forward.bytes + moved * shape.itemsize, 4)


def one_by_one(operation: Operation, shape: Shape, backward: bool = False) -> Operation:
    """The products of an operation, launched one an expert."""
    rows, hidden, width = shape.rows / shape.hit, shape.hidden, shape.width
    results = ((2 / 3, rows, 2 * width), (1 / 3, rows, hidden))
    if backward:
        results = ((1 / 3, rows, hidden), (1 / 6, rows, width), (1 / 3, 2 * width, hidden), (1 / 6, hidden, width))
    return operation._replace(one_by_one=results, launches=(2 + 2 * backward) * shape.hit)


def combine(rows: float, shape: Shape, gathers: int) -> Operation:
    """Rows times routing weights (read in s, written in 4), gathers of them in 4, their sum over K, and its cast."""
    weighted = rows * shape.hidden * (shape.itemsize + 4)
    reduced = rows * shape.hidden * 4 + shape.tokens * shape.hidden * (4 + 4 + shape.itemsize)
    return Operation("combine", 0, weighted + gathers * 8 * rows * shape.hidden + reduced, 3 + gathers)


def eager(shape: Shape) -> Iterator[Operation]:
    rows, hit, s = shape.rows, shape.hit, shape.itemsize
    yield Operation("routing", 0, hit * 2 * rows * 8, 6 + 6 * hit)
    yield Operation("gather", 0, 2 * rows * shape.hidden * s, hit)
    yield one_by_one(products(rows, hit, shape), shape)
    yield gate(rows, shape)._replace(launches=2 * hit)
    # Times routing weights into float32, and added to the output, which is read and written.
    yield Operation(
        "combine", 0, rows * shape.hidden * (s + 4 + 12) + shape.tokens * shape.hidden * (4 + s), 3 * hit + 2
    )


def eager_backward(shape: Shape) -> Iterator[Operation]:
    rows, hit, s = shape.rows, shape.hit, shape.itemsize
    yield Operation("combine", 0, rows * shape.hidden * (8 + 4 + s + 4 + s), 5 * hit)
    yield gate_backward(rows, shape)._replace(launches=5 * hit)
    yield one_by_one(products_backward(rows, hit, hit, shape), shape, backward=True)
    # The gradient of an expert taken from the stack is a stack of zeros with it in its place, and all are added.
    yield Operation("stacking", 0, hit * 5 * shape.experts * shape.expert * s, 6 * hit)
    yield Operation("gather", 0, 3 * rows * shape.hidden * s, 2 * hit)


def batched_mm(shape: Shape) -> Iterator[Operation]:
    rows, s = shape.rows, shape.itemsize
    yield Operation("gather", 0, 2 * rows * shape.hidden * s, 3)
    yield Operation("copies of weights", 0, 2 * rows * shape.expert * s, 2)
    yield products(rows, rows, shape)
    yield gate(rows, shape)
    yield combine(rows, shape, 0)


def batched_mm_backward(shape: Shape) -> Iterator[Operation]:
    rows, s = shape.rows, shape.itemsize
    yield Operation("combine", 0, rows * shape.hidden * (8 + 4 + 2 * s), 4)
    yield gate_backward(rows, shape)
    yield products_backward(rows, rows, rows, shape)
    yield Operation("sums of copies", 0, (2 * rows + 2 * shape.experts) * shape.expert * s, 8)
    yield Operation("gather", 0, (rows + shape.tokens) * shape.hidden * s, 1)


def grouped_mm(shape: Shape) -> Iterator[Operation]:
    rows, s = shape.rows, shape.itemsize
    yield Operation("routing", 0, 10 * rows * 8, 10)
    yield Operation("gather", 0, 2 * rows * shape.hidden * s)
    yield products(rows, shape.hit, shape)
    yield gate(rows, shape)
    yield combine(rows, shape, 1)


def grouped_mm_backward(shape: Shape) -> Iterator[Operation]:
    rows, s = shape.rows, shape.itemsize
    yield Operation("combine", 0, rows * shape.hidden * (4 + 12 + 4 + 2 * s), 6)
    yield gate_backward(rows, shape)
    yield products_backward(rows, shape.hit, shape.experts, shape)
    yield Operation("gather", 0, (rows + 2 * shape.tokens) * shape.hidden * s, 3)


def loop(shape: Shape) -> Iterator[Operation]:
    """torch's `grouped_mm` without a kernel: one product an expert, and the counts of rows read by the host."""
    for operation in grouped_mm(shape):
        yield one_by_one(operation, shape) if operation.name == "products" else operation


def loop_backward(shape: Shape) -> Iterator[Operation]:
    for operation in grouped_mm_backward(shape):
        yield one_by_one(operation, shape, backward=True) if operation.name == "products" else operation


def megablocks(shape: Shape) -> Iterator[Operation]:
    rows, padded, s = shape.rows, shape.padded_rows, shape.itemsize
    yield Operation("routing", 0, 30 * padded * 8, 45)
    yield Operation("gather", 0, 4 * padded * shape.hidden * s, 3)  # copied, and padding filled with zeros
    yield products(padded, shape.hit, shape)
    # Products are blocks; what follows reads rows.
    yield Operation("blocks to rows", 0, 2 * padded * (shape.hidden + 2 * shape.width) * s, 2)
    yield gate(padded, shape)
    yield Operation("gather", 0, 4 * rows * shape.hidden * s, 3)
    yield combine(rows, shape, 0)


def megablocks_backward(shape: Shape) -> Iterator[Operation]:
    rows, padded, s = shape.rows, shape.padded_rows, shape.itemsize
    yield Operation("combine", 0, rows * shape.hidden * (8 + 4 + 2 * s), 4)
    yield Operation("gather", 0, 4 * padded * shape.hidden * s, 4)
    yield Operation("rows to blocks", 0, 2 * padded * (shape.hidden + 2 * shape.width) * s, 24)
    yield gate_backward(padded, shape)
    # Gradients of weights begin as zeros.
    zeros = Operation("zeros", 0, shape.experts * shape.expert * s, 2)
    yield products_backward(padded, shape.hit, shape.experts, shape)
    yield zeros
    yield Operation("gather", 0, (5 * rows + shape.tokens) * shape.hidden * s, 4)


def fused(shape: Shape) -> Iterator[Operation]:
    """What cannot be done without: tokens, the weights that are used and the output, each once."""
    moved = 2 * shape.tokens * shape.hidden + shape.hit * shape.expert
    yield Operation("all", 2 * shape.rows * shape.expert, moved * shape.itemsize)


def fused_backward(shape: Shape) -> Iterator[Operation]:
    """Gradients of tokens and weights, with gate and up read again as they were saved."""
    moved = 3 * shape.tokens * shape.hidden + (shape.hit + shape.experts) * shape.expert + 2 * shape.rows * shape.width
    yield Operation("all", 4 * shape.rows * shape.expert, moved * shape.itemsize)


Counted = Callable[[Shape], Iterator[Operation]]
IMPLEMENTATIONS: dict[str, tuple[Counted, Counted]] = {
    "eager": (eager, eager_backward),
    "batched_mm": (batched_mm, batched_mm_backward),
    "grouped_mm": (grouped_mm, grouped_mm_backward),
    "megablocks": (megablocks, megablocks_backward),
    "fused": (fused, fused_backward),
}


class Estimate(NamedTuple):
    """All calls of a layer on a GPU: totals, and the time that computing, moving and launching would take alone."""

    seconds: float
    flops: float
    bytes: float
    launches: float
    bound: str


def estimate(implementation: str, shape: Shape, gpu: Gpu, training: bool) -> Estimate:
    """The time of an implementation, forward or forward and backward, and what most of it is due to."""
    forward, backward = IMPLEMENTATIONS[implementation]
    if implementation == "grouped_mm" and not gpu.has_grouped_mm:
        forward, backward = loop, loop_backward
    operations = [*forward(shape), *(backward(shape) if training else ())] * shape.calls
    due = {"computing": 0.0, "memory": 0.0, "launches": 0.0}
    for each in operations:
        due["launches"] += each.launches * LAUNCH_SECONDS
        compute, move = each.computing(gpu), each.bytes / gpu.bandwidth
        due["computing" if compute > move else "memory"] += max(compute, move)
    totals = (sum(getattr(each, name) for each in operations) for name in ("flops", "bytes", "launches"))
    return Estimate(sum(due.values()), *totals, max(due, key=due.get))


def fastest(estimates: dict[str, Estimate]) -> str:
    """The implementation of least time that exists."""
    return min((name for name in estimates if name != "fused"), key=lambda name: estimates[name].seconds)


# ---- Report ---------------------------------------------------------------------------------------------------------


def measured(results: Path) -> dict[tuple[str, str, str], float]:
    """Medians of `experts.py` on the GPUs: (GPU, task, implementation) -> seconds."""
    found = {}
    for name, gpu in GPUS.items():
        for path in sorted((results / slug(gpu.device)).glob("experts-*.json")):
            for row in json.loads(path.read_text())["comparisons"]:
                found[name, row["task"], row["implementation"]] = row["ours_median"]
    return found


def rows_of(results: Path) -> list[dict[str, Any]]:
    """A row for every GPU, shape, direction and implementation."""
    rows, seconds = [], measured(results)
    for name, gpu in GPUS.items():
        for title, shape in SHAPES.items():
            for direction in ("forward", "forward_backward") if "decode" not in title else ("forward",):
                estimates = {each: estimate(each, shape, gpu, direction != "forward") for each in IMPLEMENTATIONS}
                task = f"{direction} T={shape.tokens} N={shape.experts} I={shape.width}"
                is_measured = shape.calls == 2  # the chain is what `experts.py` runs
                for implementation, each in estimates.items():
                    rows.append(
                        {
                            **{"gpu": name, "shape": title, "direction": direction, "implementation": implementation},
                            **each._asdict(),
                            "fastest": implementation == fastest(estimates),
                            "measured": seconds.get((name, task, implementation)) if is_measured else None,
                        }
                    )
    return rows


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:,.4g}"


def markdown(results: dict[str, Any]) -> str:
    lines = [
        "# Routed experts of a layer on a GPU, on paper",
        "",
        f"bf16, {LAUNCH_SECONDS * 1e6:g} microseconds a launch, {results['date']}. Times are in milliseconds. In "
        "bold: the fastest that exists; `fused` is what cannot be done without. Peaks of dense products and memory:",
        "",
    ]
    peaks = [
        (name, f"{gpu.flops / 1e12:,.0f} TFLOP/s", f"{gpu.bandwidth / 1e12:g} TB/s", gpu.source)
        for name, gpu in GPUS.items()
    ]
    lines += table(("GPU", "products", "memory", "source"), peaks, "lrrl")
    for gpu in GPUS:
        lines += ["", f"## {gpu}", ""]
        cells = []
        for row in results["rows"]:
            if row["gpu"] == gpu:
                name = f"`{row['implementation']}`"
                cells.append(
                    (
                        *(row["shape"], row["direction"].replace("_", " and ")),
                        f"**{name}**" if row["fastest"] else name,
                        *(milliseconds(row["seconds"]), row["bound"], f"{row['flops'] / 1e9:,.4g}"),
                        *(f"{row['bytes'] / 1e6:,.4g}", f"{row['launches']:,.0f}", milliseconds(row["measured"])),
                    )
                )
        header = ("shape", "direction", "experts", "expected", "due to", "GFLOP", "MB", "launches", "measured")
        lines += table(header, cells, "lllrlrrrr")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Expected time over that of what cannot be done without, on the first GPU; crosses are measured."""
    gpu = next(iter(GPUS))
    rows = [row for row in results["rows"] if row["gpu"] == gpu]
    groups = list(dict.fromkeys((row["shape"], row["direction"]) for row in rows))
    names = [name for name in IMPLEMENTATIONS if name != "fused"]
    figure = Figure(figsize=(9, 0.6 * len(groups) + 1))
    axes = figure.subplots()
    least = {(row["shape"], row["direction"]): row["seconds"] for row in rows if row["implementation"] == "fused"}
    for row in rows:
        if row["implementation"] == "fused":
            continue
        group = row["shape"], row["direction"]
        index = names.index(row["implementation"])
        y = -groups.index(group) - 0.2 * index
        axes.barh(
            y, row["seconds"] / least[group] - 1, left=1, height=0.18, color=f"C{index}", label=row["implementation"]
        )
        if row["measured"] is not None:
            axes.plot(row["measured"] / least[group], y, "kx")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(dict(zip(labels, handles, strict=True)).values(), dict.fromkeys(labels), fontsize=8)
    axes.set_yticks([-place - 0.3 for place in range(len(groups))])
    axes.set_yticklabels([f"{shape}\n{direction.replace('_', ' and ')}" for shape, direction in groups], fontsize=7)
    axes.set_xscale("log")
    axes.set(
        xlabel="expected time / that of a perfectly fused kernel", title=f"Routed experts of a layer, {gpu}, bf16"
    )
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150, bbox_inches="tight")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    results: Path = setting(RESULTS, "folder of what was measured")
    date: str = setting(datetime.date.today().isoformat(), "to write into the results")
    output: Path = setting(RESULTS / "on-paper", "folder of results and plot")


@command
def main(argv: list[str] | None = None) -> dict[str, Any]:
    settings = parse(ModelSettings, __doc__.splitlines()[0], argv)
    check_folder("output", settings.output)
    results = {
        "benchmark": "gpu_model",
        "date": settings.date,
        "launch_seconds": LAUNCH_SECONDS,
        "gpus": {name: gpu._asdict() for name, gpu in GPUS.items()},
        "shapes": {name: shape._asdict() for name, shape in SHAPES.items()},
        "rows": rows_of(settings.results),
    }
    return write_results(results, settings.output / "experts", markdown, plot)


if __name__ == "__main__":
    main()
