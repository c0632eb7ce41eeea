"""Runs in two processes: a parallel model against the same model in one process. Called by `test_distributed.py`."""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import modeling_coe  # noqa: F401

from .helpers import assert_equal_up_to_rounding, leave_process_group


LAYOUTS = {
    "tensor parallel": {"tp_size": 2},
    "expert parallel": {"tp_size": 2, "ep_size": 2},
    "sharded data and expert parallel": {"fsdp_size": 2, "ep_size": 2},
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_gradients(model) -> dict[str, torch.Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def compare(parallel, single, shares_batch: bool) -> None:
    """Logits in evaluation, then loss and all gradients of a training step with its auxiliary loss."""
    torch.manual_seed(0)
    input_ids = torch.randint(3, single.config.vocab_size, (2, 12))
    mine = input_ids if shares_batch else input_ids[dist.get_rank() :][:1]

    with torch.no_grad():
        expected = single.eval()(mine).logits
        assert_equal_up_to_rounding(whole(parallel.eval()(mine).logits), expected)

    num_items = torch.tensor(input_ids[:, 1:].numel())
    losses = {}
    for name, model, batch in (("single", single, input_ids), ("parallel", parallel, mine)):
        loss = model.train()(batch, labels=batch, num_items_in_batch=num_items).loss
        if batch.shape != input_ids.shape:  # as `Trainer` does: data parallel averages gradients that are to add up
            loss = loss * dist.get_world_size()
        loss.backward()
        losses[name] = loss.detach().clone()
    if not shares_batch:
        dist.all_reduce(losses["parallel"], op=dist.ReduceOp.SUM)
        losses["parallel"] /= dist.get_world_size()
    assert_equal_up_to_rounding(losses["parallel"], losses["single"])

    expected, actual = whole_gradients(single), whole_gradients(parallel)
    assert expected.keys() == actual.keys() == dict(single.named_parameters()).keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def check(folder: Path, layout: dict[str, int], backends: list[str]) -> None:
    """A saved model by every implementation of the experts, then saved by the parallel one."""
    parallel = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**layout))
    single = AutoModelForCausalLM.from_pretrained(folder)
    for backend in backends:
        for model in (parallel, single):
            model.set_experts_implementation(backend)
            model.zero_grad()
        compare(parallel, single, shares_batch="tp_size" in layout)

    saved = folder / "saved"
    parallel.save_pretrained(saved, is_main_process=dist.get_rank() == 0)
    reloaded = AutoModelForCausalLM.from_pretrained(saved)  # on every rank, at once
    for name, tensor in single.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name
    assert {file.stem for file in saved.glob("*.py")} == {
        *("modeling_coe", "configuration_coe", "adapters", "attention", "backbones", "balancing", "checkpoint"),
        *("cpu_kernels", "cpu_memory", "experts", "grouped_experts", "quantization", "quantized_linear"),
        *("quantized_weights", "releases", "staging", "state_dict"),
    }
    assert reloaded.config.auto_map["AutoModelForCausalLM"] == "modeling_coe.CoeForCausalLM"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--backends", nargs="+", required=True)
    args = parser.parse_args()
    for folder in args.models:
        check(folder, LAYOUTS[args.layout], args.backends)
    if dist.get_rank() == 0:
        models = [folder.name for folder in args.models]
        print(json.dumps({"models": models, "layout": args.layout, "backends": args.backends}))
    leave_process_group()


if __name__ == "__main__":
    main()
