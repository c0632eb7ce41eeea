"""Runs in two processes: models that FSDP has sharded, against one process. Called by `test_distributed.py`."""

import argparse
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from modeling_coe.modeling_coe import CoeRouter

from .helpers import assert_equal_up_to_rounding, leave_process_group, random_ids, tiny_model


def train(sharded, single, num_steps: int = 3) -> None:
    """Steps of both on the same batches, half of one on each rank: equal losses."""
    models = {"sharded": sharded.train(), "single": single.train()}
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.01) for name, model in models.items()}
    for _ in range(num_steps):
        input_ids = random_ids(2, 12)
        losses = {}
        for name, model in models.items():
            batch = input_ids[dist.get_rank() :][:1] if name == "sharded" else input_ids
            loss = model(batch, labels=batch).loss
            loss.backward()
            losses[name] = loss.detach().clone()
            optimizers[name].step()
            optimizers[name].zero_grad()
        dist.all_reduce(losses["sharded"])
        torch.testing.assert_close(losses["sharded"] / dist.get_world_size(), losses["single"], atol=1e-5, rtol=0)


def assert_saved(folder: Path, single) -> None:
    """The folder holds the trained weights and the code of the model."""
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in single.state_dict().items():
        assert_equal_up_to_rounding(loaded.state_dict()[name], tensor)
    assert {"modeling_coe.py", "configuration_coe.py", "experts.py"} <= {file.name for file in folder.iterdir()}


def router_dtypes(model) -> set[torch.dtype]:
    """The dtypes of the routers' weights in a step of training."""
    seen = set()
    for router in model.modules():
        if isinstance(router, CoeRouter):
            router.register_forward_hook(lambda module, *_: seen.add(module.weight.dtype))
    input_ids = random_ids(1, 12)
    model.train()(input_ids, labels=input_ids).loss.backward()
    return seen


def native(folder: Path) -> None:
    """`from_pretrained(distributed_config=...)`."""
    # Tied embeddings whose shards are padded.
    sharded = AutoModelForCausalLM.from_pretrained(folder / "tied", distributed_config=DistributedConfig(fsdp_size=2))
    single = AutoModelForCausalLM.from_pretrained(folder / "tied")
    assert single.lm_head.weight is single.model.embed_tokens.weight and single.config.vocab_size % 2
    train(sharded, single)
    sharded.save_pretrained(folder / "gathered")
    assert_saved(folder / "gathered", single)
    sharded.save_pretrained(folder / "distributed", distributed_checkpoint=True)
    if dist.get_rank() == 0:
        torch.save(single.state_dict(), folder / "single.pt")

    for dtype in (torch.float32, torch.bfloat16):
        layout = DistributedConfig(fsdp_size=2, fsdp_mixed_precision=True)
        mixed = AutoModelForCausalLM.from_pretrained(folder / "tied", dtype=dtype, distributed_config=layout)
        assert router_dtypes(mixed) == {torch.float32}


def accelerated(folder: Path) -> None:
    """accelerate's FSDP2."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "CoeDecoderLayer",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    from accelerate import Accelerator, DistributedType, PartialState
    from accelerate.state import AcceleratorState

    def prepare(model, mixed_precision: str = "no"):
        # Told that these are GPUs: on the CPU, accelerate shards nothing.
        AcceleratorState._reset_state()
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        accelerator = Accelerator(mixed_precision=mixed_precision)
        return accelerator.prepare(model, torch.optim.SGD(model.parameters()))[0]

    sharded, single = prepare(tiny_model()), tiny_model()
    assert isinstance(sharded, FSDPModule)
    train(sharded, single)
    with pytest.raises(ValueError, match=r"`distributed_checkpoint=True` needs .*`from_pretrained"):
        sharded.save_pretrained(folder / "refused", distributed_checkpoint=True)
    dist.barrier()
    assert not (folder / "refused").exists()
    sharded.save_pretrained(folder / "gathered")
    assert_saved(folder / "gathered", single)

    assert router_dtypes(prepare(tiny_model(), "bf16")) == {torch.bfloat16}
    model = tiny_model()
    model.shard_routers(dist.device_mesh.init_device_mesh("cpu", (2,)))
    assert router_dtypes(prepare(model, "bf16")) == {torch.float32}


def fsdp1(folder: Path) -> None:
    wrapped = FullyShardedDataParallel(tiny_model(), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ValueError, match=r"FSDP1 .*`state_dict=accelerator.get_state_dict"):
        wrapped.module.save_pretrained(folder / "refused")
    dist.barrier()
    assert not (folder / "refused").exists()


CASES = {"native": native, "accelerate": accelerated, "FSDP1": fsdp1}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    CASES[args.case](args.folder)
    leave_process_group()


if __name__ == "__main__":
    main()
