# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a sharded run, which another number of processes can go on from: each process writes its part, with
`torch.distributed.checkpoint`, while training goes on.

    checkpoint-N/            N steps are done
        state/               model and optimizer, by the names of parameters
        progress.json        what else the run needs, written by the first process
    checkpoint-N.partial/    the same while it is written
"""

import re
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._pytree import tree_map

from modeling_coe.command_line import InputError

from .distributed import Processes
from .run_folder import checkpoints_in, read_json, write_json


STATE, PROGRESS = "state", "progress.json"
# Optimizer state by parameter: its groups are others in another layout.
_BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


def is_complete(checkpoint: Path) -> bool:
    """Whether a folder is a checkpoint of ours in full: it gets its name last. Others are left alone."""
    return (checkpoint / STATE / ".metadata").is_file() and (checkpoint / PROGRESS).is_file()


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Oldest first."""
    return [path for path in checkpoints_in(output_dir) if is_complete(path)]


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """What a run wrote beside its model and optimizer.

    Raises:
        InputError: It cannot be read.
    """
    try:
        return dict(read_json(checkpoint / PROGRESS))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{checkpoint / PROGRESS} is damaged ({type(error).__name__}: {error}). Move {checkpoint.name} out of its "
            "folder to go on from the one before it."
        ) from error


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=_BY_NAME),
    }


class CopyingStager(BlockingAsyncStager):
    """Copies to the CPU, before training goes on, what is then written. torch's own stagers fail for DTensors that are
    on the CPU already."""

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return tree_map(lambda each: each.detach().to("cpu", copy=True) if torch.is_tensor(each) else each, state_dict)


class Checkpoints:
    """The checkpoints of a run. All processes make the same calls.

    Args:
        output_dir (`Path`): Folder of the run.
        processes (`Processes`): Of the run.
        keep (`int`): How many complete ones are left there.
    """

    def __init__(self, output_dir: Path, processes: Processes, keep: int = 2):
        self.output_dir, self.processes, self.keep = output_dir, processes, keep
        self.pending: tuple[Path, Future] | None = None

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
        """Begins a checkpoint, once the one before is done: copies the state to memory, writes it in a thread.

        Args:
            step (`int`): Steps done.
            model, optimizer: Sharded or not, between two steps.
            progress (`dict[str, Any]`): What else the run needs, as JSON has it; that of the first process is written.
        """
        # transformers' part of it is private: two of its functions write one file each, and wait for it.
        from transformers.distributed.checkpoint import _redistribute_state_dict

        self.wait()
        folder = self.output_dir / f"checkpoint-{step}"
        partial = folder.with_suffix(".partial")
        if self.processes.is_first:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
            partial.mkdir()
            write_json(partial / PROGRESS, progress)
        self.processes.wait()
        # Strided shards, such as TP's of experts, whose two projections are one tensor, have no place in DCP's files.
        state = _redistribute_state_dict(_state(model, optimizer))
        options = {"async_stager": CopyingStager(), "process_group": self.processes.saving}
        future = dcp.async_save(state, checkpoint_id=partial / STATE, **options)
        self.pending = folder, future

    def poll(self) -> None:
        """Gives a checkpoint its name once it is written. To be called now and then."""
        # The first process is done after it has heard of all others that they are.
        if self.pending is not None and self.pending[1].done():
            self._finish()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self.pending is not None:
            self._finish()
        self.processes.wait()

    def _finish(self) -> None:
        folder, future = self.pending
        future.result()
        self.pending = None
        if self.processes.is_first:
            if folder.exists():  # and is none of ours, or the run would have gone on from it
                folder.rename(_free_name(folder.with_suffix(".replaced")))
            folder.with_suffix(".partial").rename(folder)
            for old in complete_checkpoints(self.output_dir)[: -self.keep]:
                # Under another name first: one that is killed here leaves no half of a checkpoint.
                removed = _free_name(old.with_suffix(".removed"))
                old.rename(removed)
                shutil.rmtree(removed)

    def newest(self) -> Path | None:
        """The checkpoint to go on from, as the first process sees it."""
        complete = complete_checkpoints(self.output_dir) if self.processes.is_first else []
        return self.processes.gather(complete[-1] if complete else None)[0]


def _free_name(path: Path) -> Path:
    """This name, or one with a number that nothing has."""
    number = 0
    while path.exists():
        number += 1
        path = path.with_suffix(re.sub(r"\d*$", str(number), path.suffix))
    return path


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads a checkpoint of any number of processes, in place. All processes call it."""
    from transformers.distributed.checkpoint import _redistribute_state_dict

    own = _state(model, optimizer)
    state = _redistribute_state_dict(own)
    dcp.load(state, checkpoint_id=checkpoint / STATE)
    state = _redistribute_state_dict(state, reference_state_dict=own)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_BY_NAME)
