# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What training runs have in common: their options, the model they are given, their speed, what they return."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from modeling_coe import CoeConfig, CoeForCausalLM
from modeling_coe.callbacks import CpuKernelsCallback
from modeling_coe.command_line import InputError, check_not_negative, check_positive, check_range, loading

from .corpus import Blocks, check_data_options
from .run_folder import check_run_options
from .settings import JobSettings


if TYPE_CHECKING:
    from peft import PeftModel

WHOLE_MODEL = "Give a folder with the config.json, the weights and the tokenizer of one model."


def check_options(settings: JobSettings) -> None:
    """Raises [`InputError`] where they have no meaning, alone or together."""
    check_run_options(settings)
    check_data_options(settings)
    check_positive(settings, "steps", "batch_size", "log_steps", "eval_steps", "save_steps")
    check_positive(settings, "num_problems", "max_new_tokens")
    check_not_negative(settings, "warmup_steps", "num_samples")
    check_range(settings, "lr", 0, exclusive=True)
    check_range(settings, "weight_decay", 0)
    check_range(settings, "beta2", 0, 1)
    # A checkpoint holds no part of an average, so a resumed run could not log the same one.
    if settings.save_steps % settings.log_steps:
        raise InputError(
            f"--save-steps is {settings.save_steps}, which is not a multiple of --log-steps {settings.log_steps}: a "
            "resumed run would log another average. Choose a multiple."
        )


def given_config(source: str) -> CoeConfig:
    """The configuration of the model that `--model` names.

    Raises:
        InputError: It cannot be loaded, or is not that of a Chain-of-Experts model.
    """
    with loading(f"--model {source}", WHOLE_MODEL):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if not isinstance(config, CoeConfig):
        raise InputError(
            f"--model {source} is a {config.model_type!r} model, not a chain of experts. Convert it with "
            "`coe-convert`."
        )
    return config


def given_model(source: str, config: CoeConfig) -> CoeForCausalLM:
    """The model that `--model` names, in float32.

    Raises:
        InputError: It cannot be loaded.
    """
    with loading(f"--model {source}", WHOLE_MODEL):
        return CoeForCausalLM.from_pretrained(source, config=config, dtype=torch.float32)


class Stopwatch(TrainerCallback):
    """Times the training steps of this process; evaluation and saving happen between them."""

    def __init__(self):
        self.steps = 0
        self.seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self.begin
        self.steps += 1


def training_arguments(settings: JobSettings, evaluate_first: bool) -> dict[str, Any]:
    """The options as fields of [`TrainingArguments`].

    Args:
        settings (`JobSettings`): Of the run and of training.
        evaluate_first (`bool`): Log the loss before training, which a resumed run finds in its checkpoint's log.
    """
    cuda = torch.cuda.is_available()
    return {
        "output_dir": str(settings.output_dir),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "learning_rate": settings.lr,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "adam_beta2": settings.beta2,
        "bf16": cuda and torch.cuda.is_bf16_supported(),
        "use_cpu": not cuda,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "logging_steps": settings.log_steps,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps",
        "eval_steps": settings.eval_steps,
        "eval_on_start": evaluate_first,
        "save_steps": settings.save_steps,
        "save_total_limit": 2,
        "report_to": "none",
    }


@torch.no_grad()
def logit_difference(model: PreTrainedModel | PeftModel, other: PreTrainedModel | PeftModel) -> float:
    """The largest difference of a logit between two models in evaluation mode, on 128 tokens of their vocabulary."""
    tokens = torch.arange(0, 128 * 97, 97)[None] % model.config.vocab_size
    logits = (each.eval()(tokens.to(each.device)).logits for each in (model, other))
    return torch.sub(*logits).abs().max().item()


def save_and_reload(
    model: CoeForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> tuple[CoeForCausalLM, PreTrainedTokenizerBase]:
    """Saves model and tokenizer, loads them from disk, and checks that the model computes the same logits.

    Returns:
        The loaded model, on the device of the given one, and the loaded tokenizer.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).to(model.device)
    difference = logit_difference(model, loaded)
    if not difference < 1e-3:  # as large as rounding may be, and far less than a wrong weight
        raise RuntimeError(f"The model loaded from {folder} differs from the trained one by {difference} in a logit.")
    print(f"The model loaded from disk agrees with the trained one: logits differ by at most {difference:.1e}.")
    return loaded, AutoTokenizer.from_pretrained(folder)


class FinishedRun(NamedTuple):
    """A finished training run: the model, the whole log, and the speed of the part this process did, if any."""

    model: PreTrainedModel | PeftModel
    log: list[dict[str, float]]
    tokens_per_second: float | None


def finished_run(model: PreTrainedModel | PeftModel, checkpoint: Path) -> FinishedRun:
    """The run whose last checkpoint this is; `Trainer` would take one step more.

    Args:
        model (`PreTrainedModel` or `PeftModel`): Loaded from the checkpoint.
        checkpoint (`Path`): A complete one.
    """
    return FinishedRun(model, TrainerState.load_from_json(checkpoint / TRAINER_STATE_NAME).log_history, None)


def train_on_blocks(
    settings: JobSettings,
    model: PreTrainedModel | PeftModel,
    train_blocks: torch.Tensor,
    held_out_blocks: dict[str, torch.Tensor],
    checkpoint: Path | None,
) -> FinishedRun:
    """Trains with `Trainer`, from the start or from a checkpoint, to the last step.

    Args:
        settings (`JobSettings`): Of the run and of training.
        model (`PreTrainedModel` or `PeftModel`): What to train, in place.
        train_blocks (`torch.Tensor`): Token ids (blocks, block_size).
        held_out_blocks (`dict[str, torch.Tensor]`): Likewise, by split.
        checkpoint (`Path`, *optional*): Where to go on from.
    """
    stopwatch = Stopwatch()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**training_arguments(settings, evaluate_first=checkpoint is None)),
        train_dataset=Blocks(train_blocks),
        eval_dataset={split: Blocks(blocks) for split, blocks in held_out_blocks.items()},
        callbacks=[stopwatch, CpuKernelsCallback()],
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    tokens = stopwatch.steps * train_blocks[: settings.batch_size].numel()
    return FinishedRun(model, trainer.state.log_history, tokens / stopwatch.seconds)
