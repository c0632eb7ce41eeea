"""`benchmarks/gpu_model.py`: FLOPs by torch's count, bytes and tiles by hand, and what follows from them."""

import itertools
import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_model
from benchmarks.gpu_model import GPUS, IMPLEMENTATIONS, SHAPES, Gpu, Shape

from .helpers import tiny_config
from .test_megablocks import random_routing


SHAPE = Shape(tokens=6, hidden=16, width=8, experts=5, top_k=2, calls=3)


def total(operations, field: str) -> float:
    return sum(getattr(operation, field) for operation in operations)


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "megablocks"])
def test_flops_are_those_that_torch_counts(implementation):
    from modeling_coe.modeling_coe import CoeExperts

    config = tiny_config(
        **{"n_routed_experts": 5, "num_experts_per_tok": 2, "hidden_size": 16, "num_attention_heads": 1},
        moe_intermediate_size=8,
    )
    config._experts_implementation = "eager"
    experts = CoeExperts(config)
    torch.nn.init.normal_(experts.gate_up_proj)
    torch.nn.init.normal_(experts.down_proj)
    x = torch.randn(6, 16, requires_grad=True)
    forward, backward = IMPLEMENTATIONS[implementation]
    with FlopCounterMode(display=False) as counter:
        output = experts(x, *random_routing(6, 2, 5))
    assert counter.get_total_flops() == total(forward(SHAPE), "flops")
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == total(backward(SHAPE), "flops")


def test_blocks_compute_padding_too():
    assert SHAPE.padded_rows == pytest.approx(5 * 128 * (1 - 0.6**6))  # each expert has a block, or no token
    assert total(IMPLEMENTATIONS["megablocks"][0](SHAPE), "flops") == pytest.approx(6 * SHAPE.padded_rows * 16 * 8)
    large = Shape(tokens=1000, hidden=1, width=1, experts=4, top_k=1, calls=1)
    torch.manual_seed(0)
    samples = torch.distributions.Binomial(1000, torch.tensor(0.25)).sample((20_000,))
    assert large.padded_rows == pytest.approx(4 * 128 * (samples / 128).ceil().mean().item(), rel=5e-3)
    assert Shape(7, 1, 1, 1, 1, 1).padded_rows == 128


def test_bytes_by_hand():
    """Of `grouped_mm`, forward: 12 rows, 16 wide, experts of width 8, two bytes a number."""
    operations = {operation.name: operation for operation in IMPLEMENTATIONS["grouped_mm"][0](SHAPE)}
    hit = 5 * (1 - 0.6**6)
    assert operations["gather"].bytes == 2 * (12 * 16) * 2
    # rows into 16 gates and ups, 8 into 16, and the weights of the experts that are hit
    weights = hit * (2 * 8 * 16 + 16 * 8)
    assert operations["products"].bytes == pytest.approx(2 * (weights + 12 * 16 + 12 * 16 + 12 * 8 + 12 * 16))
    assert operations["activation"].bytes == 2 * (12 * 8 + 12 * 8 + 12 * 8 + 12 * 8 + 12 * 8)
    # times routing weights, in the tokens' order, summed, cast
    combine = 12 * 16 * (2 + 4) + 12 * 16 * (4 + 4) + (12 * 16 * 4 + 6 * 16 * 4) + 6 * 16 * (4 + 2)
    assert operations["combine"].bytes == combine
    # What cannot be done without: tokens in and out, and those weights.
    assert total(IMPLEMENTATIONS["fused"][0](SHAPE), "bytes") == pytest.approx(2 * (2 * 6 * 16 + weights))
    copies = next(each for each in IMPLEMENTATIONS["batched_mm"][0](SHAPE) if each.name == "copies of weights")
    assert copies.bytes == 2 * 12 * (3 * 16 * 8) * 2


@pytest.mark.parametrize(
    "rows, columns, expected",
    [(128, 128, 1 / 10), (129, 128, 2 / 10), (1280, 128, 1.0), (1281, 128, 11 / 20), (math.inf, 1, 1.0)],
)
def test_occupancy(rows, columns, expected):
    assert gpu_model.occupancy(rows, columns, multiprocessors=10) == pytest.approx(expected)


def test_an_estimate_by_hand():
    """One operation: computing takes 2 s, moving 1 s, and so the launch on top of 2 s, three times."""
    flops, moved = (
        total(IMPLEMENTATIONS["fused"][0](SHAPE), "flops"),
        total(IMPLEMENTATIONS["fused"][0](SHAPE), "bytes"),
    )
    machine = Gpu(flops / 2, moved, "device", 10, True, "")
    estimate = gpu_model.estimate("fused", SHAPE, machine, training=False)
    assert estimate.seconds == pytest.approx(3 * (2 + gpu_model.LAUNCH_SECONDS)) and estimate.bound == "computing"
    assert estimate[1:4] == pytest.approx((3 * flops, 3 * moved, 3))
    slower = machine._replace(bandwidth=moved / 5)
    assert gpu_model.estimate("fused", SHAPE, slower, training=False).bound == "memory"


@pytest.mark.parametrize("gpu, shape", list(itertools.product(GPUS.values(), SHAPES.values())))
def test_nothing_is_below_what_cannot_be_done_without(gpu, shape):
    for training in (False, True):
        estimates = {name: gpu_model.estimate(name, shape, gpu, training) for name in IMPLEMENTATIONS}
        assert min(estimates, key=lambda name: estimates[name].seconds) == "fused"
        assert all(each.flops >= 0.999 * estimates["fused"].flops for each in estimates.values())


def test_what_is_measured_stands_beside_it(tmp_path):
    folder = tmp_path / "results" / "nvidia-h200"
    folder.mkdir(parents=True)
    row = {"task": "forward T=8 N=63 I=704", "implementation": "grouped_mm", "ours_median": 1.25e-3}
    (folder / "experts-paper.json").write_text(json.dumps({"comparisons": [row]}))
    results = gpu_model.main(["--results", str(tmp_path / "results"), "--output", str(tmp_path)])
    found = [row for row in results["rows"] if row["measured"] is not None]
    assert [(row["gpu"], row["shape"], row["measured"]) for row in found] == [
        ("H200 SXM", "paper, decode (T = 8)", 1.25e-3)
    ]
    text = (tmp_path / "experts.md").read_text()
    assert text.count("1.25 |") == 1 and json.loads((tmp_path / "experts.json").read_text()) == results
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")
