"""Runs in two processes: what a process of a parallel model holds and sends. Called by `test_planning.py`."""

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import modeling_coe  # noqa: F401

from .helpers import leave_process_group, random_ids


class SentBytes(TorchDispatchMode):
    """Bytes of the rows that all-to-all collectives send, this process's own included; not of their counts."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "all_to_all_single" in str(function) and args[0].is_floating_point():
            self.total += args[0].nbytes
        return function(*args, **(kwargs or {}))


def peak_bytes(step: Callable[[], object]) -> int:
    """Most bytes that were allocated at once, and not before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--layouts", type=json.loads, required=True)
    args = parser.parse_args()
    reports = []
    torch.manual_seed(0)
    input_ids = random_ids(1, 128)
    for layout in args.layouts:
        model = AutoModelForCausalLM.from_pretrained(
            args.model, distributed_config=DistributedConfig(**layout)
        ).train()
        model.set_experts_implementation("torch_grouped_mm")

        def step(model=model):
            model(input_ids, labels=input_ids, use_cache=False).loss.backward()

        tensors = [each.to_local() if isinstance(each, DTensor) else each for each in model.parameters()]
        report = {"held": sum(each.numel() for each in tensors)}
        with SentBytes() as sent:
            step()  # there are gradients from here on
        total = torch.tensor(sent.total)
        dist.all_reduce(total)
        gc.collect()  # what is freed meanwhile was there before
        # Collectives of the CPU end when they please, and with them what they read.
        reports.append(report | {"sent": total.item(), "peak": min(peak_bytes(step) for _ in range(3))})
    if dist.get_rank() == 0:
        print(json.dumps(reports))
    leave_process_group()


if __name__ == "__main__":
    main()
