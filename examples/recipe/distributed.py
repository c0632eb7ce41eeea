# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""A model on many devices in a loop of one's own, by transformers' `DistributedConfig`: the processes, who holds what,
optimizing what is sharded in different ways, and what a step costs."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from modeling_coe import CoeConfig
from modeling_coe.command_line import InputError, check_positive, one_line, setting


# Dense bfloat16 FLOP/s of a device, in 1e12, by a part of its name.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "GH200": 989, "A100": 312}


# ---- Processes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Processes:
    """The processes that torchrun started, or this one alone.

    Args:
        device (`torch.device`): Of this process.
        control (`dist.ProcessGroup`): All of them, for messages between their CPUs.
        saving (`dist.ProcessGroup`): The same, for the thread that saves checkpoints meanwhile.
    """

    device: torch.device
    control: dist.ProcessGroup
    saving: dist.ProcessGroup

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def count(self) -> int:
        return dist.get_world_size()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        dist.barrier(self.control)

    def gather(self, thing: Any) -> list[Any]:
        """What each process gives, on all of them."""
        things = [None] * self.count
        dist.all_gather_object(things, thing, group=self.control)
        return things

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raises the first [`InputError`] of any process in all of them, at the end of the block."""
        message = None
        try:
            yield
        except InputError as error:
            message = str(error)
        if messages := [each for each in self.gather(message) if each is not None]:
            raise InputError(messages[0])


def start_processes() -> Processes:
    """Joins the processes that torchrun started: gloo between CPUs, the accelerator's backend between others."""
    device = torch.device("cpu")
    if torch.accelerator.is_available() and torch.accelerator.current_accelerator().type != "mps":
        device = torch.device(torch.accelerator.current_accelerator().type, int(os.environ.get("LOCAL_RANK", 0)))
        torch.accelerator.set_device_index(device.index)
    options = {"backend": dist.get_default_backend_for_device(device), "timeout": timedelta(hours=2)}
    if "RANK" not in os.environ:  # no torchrun
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**options, device_id=None if device.type == "cpu" else device)
    return Processes(device, dist.new_group(backend="gloo"), dist.new_group(backend="gloo"))


# ---- Layout ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LayoutSettings:
    """Who holds what; a resumed run may have another layout."""

    _argument_group_name: ClassVar[str] = "layout"
    fsdp_size: int | None = setting(None, "processes that share parameters and optimizer; all others if not given")
    ep_size: int = setting(1, "processes that share the experts, of those that share the rest by FSDP and TP")
    tp_size: int = setting(1, "processes that share every layer, and a batch")
    replicate_size: int = setting(1, "copies of the whole, such as one per machine")
    micro_batch_size: int | None = setting(None, "sequences of a process in one forward; its whole part if not given")
    dtype: str = setting("float32", "of the computation; parameters stay in float32", choices=("float32", "bfloat16"))
    activation_checkpointing: bool = setting(False, "compute activations again in the backward pass")


def check_release() -> None:
    """Raises [`InputError`] where transformers has no such layouts."""
    if "dp_replicate_size" not in {each.name for each in fields(DistributedConfig)}:
        raise InputError(
            f"transformers {transformers.__version__} cannot share parameters and experts as this script does. "
            "Install 5.23 or newer."
        )


def choose_layout(settings: LayoutSettings, batch_size: int, num_processes: int) -> DistributedConfig:
    """The layout that the options ask for.

    Args:
        settings (`LayoutSettings`): Its sizes.
        batch_size (`int`): Sequences of a step, on all processes together.
        num_processes (`int`): That there are.

    Raises:
        InputError: The sizes are not those of so many processes, or do not divide the batch.
    """
    check_positive(settings, "ep_size", "tp_size", "replicate_size")
    for name in ("fsdp_size", "micro_batch_size"):
        if getattr(settings, name) is not None:
            check_positive(settings, name)
    fsdp_size = settings.fsdp_size or max(1, num_processes // (settings.tp_size * settings.replicate_size))
    if fsdp_size * settings.tp_size * settings.replicate_size != num_processes:
        raise InputError(
            f"--fsdp-size {fsdp_size} x --tp-size {settings.tp_size} x --replicate-size {settings.replicate_size} is "
            f"not the number of processes, {num_processes}. Change one of them, or torchrun's --nproc-per-node."
        )
    try:
        layout = DistributedConfig(
            fsdp_size=fsdp_size,
            tp_size=settings.tp_size,
            ep_size=settings.ep_size,
            dp_replicate_size=settings.replicate_size,
            # Gathers parameters and gradients in half precision; reduces gradients in float32.
            fsdp_mixed_precision=settings.dtype == "bfloat16",
        )
    except ValueError as error:
        raise InputError(f"--ep-size {settings.ep_size}: {one_line(error)}") from error
    if batch_size % layout.dp_size:
        raise InputError(
            f"--batch-size is {batch_size}, the sequences of all processes, which {layout.dp_size} of them cannot "
            f"share. Choose a multiple of {layout.dp_size}."
        )
    share = batch_size // layout.dp_size
    if share % (settings.micro_batch_size or share):
        raise InputError(
            f"--micro-batch-size is {settings.micro_batch_size}, which does not divide the {share} sequences of a "
            f"process. Choose a divisor of {share}."
        )
    return layout


def check_layout(layout: DistributedConfig, config: CoeConfig) -> None:
    """Raises [`InputError`] where a model cannot be trained in a layout."""
    experts = config.n_routed_experts if config.num_sparse_layers else 0
    if layout.ep_size > 1 and (not experts or experts % layout.ep_size):
        raise InputError(
            f"--ep-size is {layout.ep_size}, which cannot share the {experts} experts of the model "
            "(n_routed_experts). Choose a divisor."
        )


def rows_of(rank: int, layout: DistributedConfig, batch_size: int) -> range:
    """The rows of a batch that a process trains on. Processes that share layers (TP) share rows."""
    share = batch_size // layout.dp_size
    first = rank // layout.tp_size * share
    return range(first, first + share)


def reshard(model: nn.Module) -> None:
    """After forwards without backward, some modules hold whole parameters, which no optimizer or checkpoint knows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# ---- Optimizing -----------------------------------------------------------------------------------------------------


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Experts and the rest are sharded over different meshes, which no operation on lists of tensors may mix."""
    groups = defaultdict(list)
    for parameter in parameters:
        groups[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return list(groups.values())


def adamw(model: nn.Module, weight_decay: float, beta2: float) -> torch.optim.AdamW:
    """AdamW, with weight decay for matrices alone."""
    groups = [
        {"params": group, "weight_decay": decay}
        for decay, is_decayed in ((weight_decay, True), (0.0, False))
        for group in by_mesh(each for each in model.parameters() if (each.dim() > 1) == is_decayed)
    ]
    return torch.optim.AdamW(groups, betas=(0.9, beta2))


def clip_gradients(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scales all gradients so that their norm is at most `max_norm`, and returns the norm they had."""
    groups = by_mesh(each for each in model.parameters() if each.grad is not None)
    norms = [nn.utils.get_total_norm([each.grad for each in group]) for group in groups]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total


# ---- Costs ----------------------------------------------------------------------------------------------------------


def training_flops_per_token(config: CoeConfig, length: int) -> int:
    """FLOPs of a token, forward and backward, in sequences of a length: 6 for every multiplication by a parameter,
    embeddings' lookup left out, and attention to half of the sequence. What checkpointing computes again is no part.

    Experts, shared ones too, count as often as iterations use them, which a number of active parameters does not say.
    """
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    experts = sum(
        min(config.n_routed_experts, config.num_iterations(layer) * config.experts_per_iteration(layer)) * expert
        + 3 * config.hidden_size * config.shared_expert_width
        for layer in config.sparse_layers
    )
    head = config.vocab_size * config.hidden_size
    others = config.active_parameters - config.embedding_parameters - experts + head
    key_width = config.qk_head_dim if config.kv_lora_rank is not None else config.head_dim
    value_width = config.v_head_dim if config.kv_lora_rank is not None else config.head_dim
    attention = config.num_hidden_layers * config.num_attention_heads * (key_width + value_width) * length
    return 6 * others + 3 * config.expert_flops_per_token + 3 * attention


def exchanged_bytes(config: CoeConfig, layout: DistributedConfig, tokens: int, itemsize: int) -> int:
    """What expert parallelism sends to other processes per process and step, if all experts are chosen as often: every
    iteration of a layer sends each token to its experts and back, in the forward and in the backward pass.

    Args:
        config (`CoeConfig`): Of the model.
        layout (`DistributedConfig`): Of the processes.
        tokens (`int`): Of a step, on all processes together.
        itemsize (`int`): Bytes of one element of the hidden states.
    """
    if layout.ep_size == 1:
        return 0
    sent = sum(config.num_iterations(layer) * config.experts_per_iteration(layer) for layer in config.sparse_layers)
    tokens_here = tokens // (layout.dp_size * layout.tp_size)
    return 4 * sent * tokens_here * config.hidden_size * itemsize * (layout.ep_size - 1) // layout.ep_size


def peak_flops(peak_tflops: float | None, device: torch.device, dtype: str) -> float | None:
    """FLOP/s that a device can do: what is given, or what is known of it."""
    if peak_tflops is not None:
        return peak_tflops * 1e12
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next(
        (peak * 1e12 for part, peak in PEAK_TFLOPS.items() if all(word in name for word in part.split())), None
    )
