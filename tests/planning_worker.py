"""Runs under torchrun: what a process of a parallel model holds and sends. Called by `test_planning.py`."""

import argparse
import json
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--layouts", type=json.loads, required=True)
    args = parser.parse_args()
    reports = []
    for layout in args.layouts:
        model = AutoModelForCausalLM.from_pretrained(args.model, distributed_config=DistributedConfig(**layout))
        sizes = [each.to_local() if isinstance(each, DTensor) else each for each in model.parameters()]
        report = {"held": sum(each.numel() for each in sizes), "sent": 0}
        if layout.get("ep_size", 1) > 1:
            torch.manual_seed(dist.get_rank())
            input_ids = random_ids(2, 16)
            with SentBytes() as sent:
                model.train()(input_ids, labels=input_ids).loss.backward()
            total = torch.tensor(sent.total)
            dist.all_reduce(total)
            report["sent"] = total.item()
        reports.append(report)
    if dist.get_rank() == 0:
        print(json.dumps(reports))
    leave_process_group()


if __name__ == "__main__":
    main()
