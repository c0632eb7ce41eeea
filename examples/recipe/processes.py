# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""The processes of a run: one, or as many as `torchrun` or `accelerate launch` started."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from modeling_coe.command_line import InputError


Result = TypeVar("Result")


def processes() -> PartialState:
    """This process among all: `process_index`, `num_processes`, `is_main_process`, `wait_for_everyone`."""
    return PartialState(cpu=not torch.cuda.is_available())


def say(text: str) -> None:
    """Prints a line, once."""
    if processes().is_main_process:
        print(text)


def once(act: Callable[[], Result]) -> Result:
    """Has the main process do something when all have come here, and gives all of them what it found."""
    state = processes()
    state.wait_for_everyone()
    found = [act() if state.is_main_process else None]
    broadcast_object_list(found)
    return found[0]


def leave_others() -> None:
    """Ends what the processes have in common, when all have come here; the main process then goes on alone. A
    `DistributedDataParallel` that outlives the group may hang at the end of its process."""
    state = processes()
    if state.num_processes > 1:
        gc.collect()
        state.wait_for_everyone()
        state.destroy_process_group()


def check_alike(what: str, value: str) -> None:
    """Raises [`InputError`] where not all processes have the same value."""
    values = gather_object([value])
    if len(set(values)) > 1:
        raise InputError(
            f"{what} differ between the {len(values)} processes ({', '.join(sorted(set(values)))}). Give all of them "
            "the same files and the same releases of libraries."
        )
