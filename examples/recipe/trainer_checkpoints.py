# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""The checkpoints that `Trainer` writes, by itself and with accelerate's engines: which are whole, and their weights.

    model.safetensors or shards, or an adapter; optimizer.pt                 one process, or DDP
    the same, pytorch_model_fsdp.bin, optimizer.bin                          FSDP with FULL_STATE_DICT
    pytorch_model_fsdp_0/, optimizer_0/                                      FSDP with SHARDED_STATE_DICT
    latest, which names a folder of states                                   DeepSpeed

and in all of them scheduler.pt, the random states of every process and, last, trainer_state.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import merge_fsdp_weights
from accelerate.utils.constants import FSDP_MODEL_NAME
from accelerate.utils.constants import OPTIMIZER_NAME as FSDP_OPTIMIZER_NAME
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from modeling_coe.command_line import InputError

from .processes import processes
from .run_folder import checkpoint_step, checkpoints_in, read_json


if TYPE_CHECKING:
    from peft import PeftModel

DEEPSPEED_TAG = "latest"


def engine_of(checkpoint: Path) -> str:
    """Which of accelerate's engines wrote a checkpoint, and alone can read it: "FSDP", "DeepSpeed", or "no engine"."""
    if (checkpoint / DEEPSPEED_TAG).is_file():
        return "DeepSpeed"
    is_fsdp = (checkpoint / f"{FSDP_MODEL_NAME}_0").is_dir() or (checkpoint / f"{FSDP_MODEL_NAME}.bin").is_file()
    return "FSDP" if is_fsdp else "no engine"


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written, and not yet deleted, in full.

    `Trainer` writes the weights first, then the optimizer, the scheduler, the random states and last, not atomically,
    its own state: what can be read there vouches for what the main process wrote before. Deletion takes the files in
    any order, so all of them must be there. Of random states those of the main process: `Trainer` does without others.
    """
    try:
        if not all((checkpoint / name).is_file() for name in (*_needed(checkpoint), TRAINER_STATE_NAME)):
            return False
        if not any((checkpoint / name).is_file() for name in ("rng_state.pth", "rng_state_0.pth")):
            return False
        state = read_json(checkpoint / TRAINER_STATE_NAME)
        return state["global_step"] == checkpoint_step(checkpoint)
    except (OSError, ValueError, KeyError, TypeError):  # not there, no JSON, or other JSON than `Trainer` writes
        return False


def _needed(checkpoint: Path) -> list[str]:
    """The files of weights, optimizer and scheduler that a checkpoint has to have.

    Raises:
        OSError, ValueError, KeyError or TypeError: A file that lists others cannot be read.
    """
    engine = engine_of(checkpoint)
    if engine == "DeepSpeed":
        folder = (checkpoint / DEEPSPEED_TAG).read_text(encoding="utf-8").strip()
        states = [str(path.relative_to(checkpoint)) for path in (checkpoint / folder).glob("*_states.pt")]
        return states or [folder]
    if engine == "FSDP" and (checkpoint / f"{FSDP_MODEL_NAME}_0").is_dir():
        return [*_sharded(checkpoint, FSDP_MODEL_NAME), *_sharded(checkpoint, FSDP_OPTIMIZER_NAME), SCHEDULER_NAME]
    if (checkpoint / ADAPTER_CONFIG_NAME).is_file():
        weights = [ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME]
    elif (checkpoint / SAFE_WEIGHTS_INDEX_NAME).is_file():
        index = read_json(checkpoint / SAFE_WEIGHTS_INDEX_NAME)
        weights = [CONFIG_NAME, *index["weight_map"].values()]
    else:
        weights = [CONFIG_NAME, SAFE_WEIGHTS_NAME]
    if engine == "FSDP":
        return [*weights, f"{FSDP_MODEL_NAME}.bin", f"{FSDP_OPTIMIZER_NAME}.bin", SCHEDULER_NAME]
    return [*weights, OPTIMIZER_NAME, SCHEDULER_NAME]


def _sharded(checkpoint: Path, name: str) -> list[str]:
    """The files of a folder of distributed tensors, as its own index lists them."""
    entries = dcp.FileSystemReader(checkpoint / f"{name}_0").read_metadata().storage_data.values()
    return [f"{name}_0/{file}" for file in {entry.relative_path for entry in entries}]


def newest_complete_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint to go on from. Others that are not complete, or not understood, are renamed, with a message, so
    that they are neither continued nor overwritten; nothing is deleted."""
    complete = []
    for checkpoint in checkpoints_in(output_dir):
        if is_complete(checkpoint):
            complete.append(checkpoint)
            continue
        aside, number = output_dir / f"incomplete-{checkpoint.name}", 1
        while aside.exists():
            aside, number = output_dir / f"incomplete-{checkpoint.name}-{number}", number + 1
        checkpoint.rename(aside)
        print(f"{checkpoint.name} was not written in full: it is now {aside.name}, for you to delete.")
    return complete[-1] if complete else None


def check_engine(trainer: Trainer, checkpoint: Path) -> None:
    """Raises [`InputError`] where a trainer cannot read a checkpoint, since another engine wrote it."""
    running = "no engine"
    if trainer.is_fsdp_enabled:
        running = "FSDP"
    elif trainer.is_deepspeed_enabled:
        running = "DeepSpeed"
    if running != (written := engine_of(checkpoint)):
        raise InputError(
            f"--resume: {checkpoint.name} was written with {written} and is read with {running}. Start the run as it "
            "was started first (accelerate's configuration), or another run in another folder."
        )


def load_weights(model: PreTrainedModel | PeftModel, checkpoint: Path) -> PreTrainedModel | PeftModel:
    """The model as a checkpoint has it; where that has an adapter alone, on the base model given. All processes have
    to call it."""
    if (checkpoint / f"{FSDP_MODEL_NAME}_0").is_dir():
        with tempfile.TemporaryDirectory() as folder:
            merge_fsdp_weights(str(checkpoint / f"{FSDP_MODEL_NAME}_0"), folder)
            if processes().is_main_process:
                weights = safetensors.torch.load_file(Path(folder) / SAFE_WEIGHTS_NAME)
                if isinstance(model, PreTrainedModel):
                    model.load_state_dict(weights)
                else:
                    from peft import set_peft_model_state_dict  # which an adapter needs, and pre-training does not

                    if unknown := set_peft_model_state_dict(model, weights).unexpected_keys:
                        raise RuntimeError(f"{checkpoint} has weights the model has not: {', '.join(unknown[:4])}.")
        return model
    if (checkpoint / ADAPTER_CONFIG_NAME).is_file():
        model.load_adapter(checkpoint, model.active_adapter, is_trainable=True)
        return model
    return AutoModelForCausalLM.from_pretrained(checkpoint)
