"""Runs in two processes: DeepSpeed ZeRO-3, with its own engine, against one. Called by `test_distributed.py`."""

import argparse
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist

from .helpers import leave_process_group, random_ids, tiny_model


ENGINE = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,  # 1.0 unless given
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    # Every parameter is shared out, and gone between the calls that need it.
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
    },
}


def shard(model: torch.nn.Module) -> deepspeed.DeepSpeedEngine:
    # Not AdamW, which divides what rounding moves by its own size.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return deepspeed.initialize(model=model, config=ENGINE, optimizer=optimizer)[0]


def compare(**overrides) -> None:
    """Losses of four steps, and all gradients of the first."""
    single, sharded = (tiny_model(aux_loss_alpha=0.5, **overrides).train() for _ in range(2))
    for model in (single, sharded):
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "iteration_scale" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    optimizer = torch.optim.SGD(single.parameters(), lr=0.01)
    engine = shard(sharded)
    assert all(parameter.numel() == 0 for parameter in sharded.parameters())
    for step in range(4):
        input_ids = random_ids(2, 12)
        expected = single(input_ids, labels=input_ids).loss
        expected.backward()
        mine = input_ids[dist.get_rank() :][:1]
        loss = engine(mine, labels=mine).loss
        engine.backward(loss)
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / dist.get_world_size(), expected.detach(), atol=1e-6, rtol=1e-6)
        if step == 0:
            for (name, parameter), partner in zip(single.named_parameters(), sharded.parameters(), strict=True):
                gradient = deepspeed.utils.safe_get_full_grad(partner)
                torch.testing.assert_close(
                    gradient, parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
                )
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
    engine.destroy()


def assert_refusals(folder: Path) -> None:
    """What does not work is told in one line, before anything is computed or written."""
    model = tiny_model(experts_implementation="eager")
    engine = shard(model)
    with pytest.raises(ValueError, match=r"ZeRO-3 .*`state_dict=accelerator.get_state_dict"):
        model.save_pretrained(folder / "refused")
    dist.barrier()
    assert not (folder / "refused").exists()
    with deepspeed.zero.GatheredParameters(model.parameters()):
        model.save_pretrained(folder / "saved")
    with pytest.raises(ValueError, match=r'`experts_implementation="eager"` .*ZeRO-3.* Set `experts_implementation='):
        engine(random_ids(1, 12))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    deepspeed.init_distributed("gloo")
    for overrides in ({"upcycling": "split"}, {"upcycling": "refine"}, {}):
        compare(**overrides)
    assert_refusals(args.folder)
    leave_process_group()


if __name__ == "__main__":
    main()
