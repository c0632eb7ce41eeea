# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Training with `Trainer`: its options, the model and data it is given, its speed, what it returns."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

import model_cards
from modeling_coe import CoeConfig
from modeling_coe.callbacks import CpuKernelsCallback
from modeling_coe.command_line import InputError, check_not_negative, check_positive, check_range, load_config, loading

from .corpus import check_data_options
from .processes import processes
from .run_folder import check_run_options, checkpoint_step
from .settings import JobSettings
from .trainer_checkpoints import check_engine, load_weights


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
    if settings.micro_batch_size is not None:
        check_positive(settings, "micro_batch_size")
    sequences_at_once(settings)
    check_range(settings, "lr", 0, exclusive=True)
    check_range(settings, "weight_decay", 0)
    check_range(settings, "beta2", 0, 1)
    # A checkpoint holds no part of an average, so a resumed run could not log the same one.
    if settings.save_steps % settings.log_steps:
        raise InputError(
            f"--save-steps is {settings.save_steps}, which is not a multiple of --log-steps {settings.log_steps}: a "
            "resumed run would log another average. Choose a multiple."
        )


def given_config(source: str, chains_only: bool = True) -> PreTrainedConfig:
    """The configuration of the model that `--model` names. Where every token uses all experts there is nothing to
    balance, and a chain trains without a balancing loss.

    Args:
        source (`str`): Folder or Hub name.
        chains_only (`bool`, defaults to `True`): Refuse models that are no Chain-of-Experts.

    Raises:
        InputError: It cannot be loaded, or is refused.
    """
    if chains_only:
        config = load_config(source, "--model", WHOLE_MODEL)
    else:
        with loading(f"--model {source}", WHOLE_MODEL):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if isinstance(config, CoeConfig) and config.uses_all_experts:
        config.aux_loss_alpha = 0.0
    return config


def given_model(source: str, config: PreTrainedConfig, dtype: str = "float32") -> PreTrainedModel:
    """The model that `--model` names.

    Args:
        source (`str`): Folder or Hub name.
        config (`PreTrainedConfig`): What [`given_config`] returned.
        dtype (`str`, defaults to `"float32"`): Of the weights.

    Raises:
        InputError: It cannot be loaded.
    """
    with loading(f"--model {source}", WHOLE_MODEL):
        return AutoModelForCausalLM.from_pretrained(source, config=config, dtype=getattr(torch, dtype))


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


class LogLines(TrainerCallback):
    """Prints what is logged, a line each, where no terminal shows a progress bar."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_local_process_zero:
            shown = [f"{name} {value:.5g}" for name, value in logs.items() if isinstance(value, int | float)]
            print(f"step {state.global_step:>6} of {state.max_steps}  " + "  ".join(shown))


def sequences_at_once(settings: JobSettings) -> tuple[int, int]:
    """How many sequences of a step this process computes, and how many of them at once.

    Raises:
        InputError: The processes cannot share the batch, or a process its part, equally.
    """
    num_processes = processes().num_processes
    share, rest = divmod(settings.batch_size, num_processes)
    if rest:
        raise InputError(
            f"--batch-size is {settings.batch_size}, which {num_processes} processes cannot share equally. Choose a "
            f"multiple of {num_processes}."
        )
    at_once = settings.micro_batch_size or share
    if share % at_once:
        raise InputError(
            f"--micro-batch-size is {at_once}, no divisor of the {share} sequences that each of {num_processes} "
            f"processes has of --batch-size {settings.batch_size}. Choose a divisor."
        )
    return share, at_once


def training_arguments(settings: JobSettings, evaluate_first: bool) -> dict[str, Any]:
    """The options as fields of [`TrainingArguments`].

    Args:
        settings (`JobSettings`): Of the run and of training.
        evaluate_first (`bool`): Log the loss before training, which a resumed run finds in its checkpoint's log.
    """
    cuda = torch.cuda.is_available()
    share, at_once = sequences_at_once(settings)
    return {
        "output_dir": str(settings.output_dir),
        "max_steps": settings.steps,
        "per_device_train_batch_size": at_once,
        "per_device_eval_batch_size": at_once,
        "gradient_accumulation_steps": share // at_once,
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
        "disable_tqdm": not sys.stderr.isatty(),
        "ddp_find_unused_parameters": False,  # all are used, those of experts without tokens too
    }


class LogitDifference(NamedTuple):
    """The largest difference of a logit between two models, and the largest logit."""

    difference: float
    largest: float

    @classmethod
    def between(cls, logits: torch.Tensor, others: torch.Tensor) -> LogitDifference:
        return cls((logits - others).abs().max().item(), logits.abs().max().item())

    @property
    def is_rounding(self) -> bool:
        """Whether it is no more than rounding makes it, which is far less than what a wrong weight does."""
        return self.difference < 1e-4 * max(10.0, self.largest)


@torch.no_grad()
def probe_logits(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    """What a model computes in evaluation mode of 128 tokens of its vocabulary."""
    tokens = torch.arange(0, 128 * 97, 97)[None] % model.config.vocab_size
    return model.eval()(tokens.to(model.device)).logits


def card_details(settings: JobSettings) -> dict[str, Any]:
    """What the card of a trained model says of where it comes from, as arguments of [`model_cards.write`]."""
    is_on_hub = settings.data is not None and not Path(settings.data).exists()
    return {"made_from": settings.model, "dataset": settings.data if is_on_hub else None}


def save_and_reload(
    settings: JobSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Saves model and tokenizer as `model/`, loads them from disk, and checks that the model computes the same logits.

    Returns:
        The loaded model, on the device of the given one, and the loaded tokenizer.
    """
    folder = settings.output_dir / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if isinstance(model.config, CoeConfig):
        model_cards.write(model, folder, name=folder.name, **card_details(settings))
    loaded = AutoModelForCausalLM.from_pretrained(folder).to(model.device)
    difference = LogitDifference.between(probe_logits(model), probe_logits(loaded))
    if not difference.is_rounding:
        raise RuntimeError(
            f"The model loaded from {folder} differs from the trained one by {difference.difference} in a logit; the "
            f"largest is {difference.largest}."
        )
    print(
        "The model loaded from disk agrees with the trained one: logits differ by at most "
        f"{difference.difference:.1e}."
    )
    return loaded, AutoTokenizer.from_pretrained(folder)


class TrainingData(NamedTuple):
    """What a model trains and is evaluated on, a short hash of it, and the tokens of a step where all have as many."""

    train: Dataset
    held_out: dict[str, Dataset]
    fingerprint: str
    tokens_per_step: int | None = None


class FinishedRun(NamedTuple):
    """A finished training run: the model, in the main process, the whole log, and the speed of the part that was done
    now, if any."""

    model: PreTrainedModel | PeftModel
    log: list[dict[str, float]]
    tokens_per_second: float | None


def block_trainer(
    model: PreTrainedModel | PeftModel, arguments: dict[str, Any], data: TrainingData, callbacks: list[TrainerCallback]
) -> Trainer:
    """A trainer on packed blocks.

    Args:
        model (`PreTrainedModel` or `PeftModel`): What to train, in place.
        arguments (`dict[str, Any]`): Fields of [`TrainingArguments`].
        data (`TrainingData`): Blocks.
        callbacks (`list[TrainerCallback]`): Of this run.
    """
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        callbacks=callbacks,
    )


def train(
    settings: JobSettings,
    model: PreTrainedModel | PeftModel,
    data: TrainingData,
    make_trainer: Callable[..., Trainer],
    checkpoint: Path | None,
) -> FinishedRun:
    """Trains from the start, or from a checkpoint, to the last step.

    Args:
        settings (`JobSettings`): Of the run and of training.
        model (`PreTrainedModel` or `PeftModel`): What to train, in place.
        data (`TrainingData`): What on.
        make_trainer (`Callable[..., Trainer]`): As [`block_trainer`].
        checkpoint (`Path`, *optional*): Where to go on from.
    """
    if checkpoint is not None and checkpoint_step(checkpoint) == settings.steps:
        # `Trainer` would take one step more.
        log = TrainerState.load_from_json(checkpoint / TRAINER_STATE_NAME).log_history
        return FinishedRun(load_weights(model, checkpoint), log, None)
    stopwatch = Stopwatch()
    arguments = training_arguments(settings, evaluate_first=checkpoint is None)
    trainer = make_trainer(model, arguments, data, [stopwatch, CpuKernelsCallback()])
    if trainer.args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(LogLines)
    if checkpoint is not None:
        check_engine(trainer, checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    log = trainer.state.log_history
    if data.tokens_per_step is not None:
        tokens = data.tokens_per_step * stopwatch.steps
    else:
        tokens = [entry["eval_num_tokens"] for entry in log if "eval_num_tokens" in entry][-1]  # as TRL counts them
    return FinishedRun(whole_model(trainer), log, tokens / stopwatch.seconds)


def whole_model(trainer: Trainer) -> PreTrainedModel | PeftModel:
    """The trained model as it is without an engine, in the main process; all processes have to ask for it."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    sharded = trainer.model
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(sharded.config), dtype=sharded.dtype)
    if not isinstance(sharded, PreTrainedModel):
        from peft import get_peft_model  # which an adapter needs, and pre-training does not

        model = get_peft_model(model, sharded.active_peft_config)
    if processes().is_main_process:
        model.load_state_dict(state_dict)
        model.to(trainer.args.device)
    return model
