# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Settings of training scripts as values: their options are made of these classes and read into them, and whatever
computes takes the part that it needs."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from modeling_coe.command_line import setting


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    _argument_group_name: ClassVar[str] = "run"
    output_dir: Path = setting(help="folder for everything the run writes")
    resume: bool = setting(False, "go on with the run of the output folder")
    overwrite: bool = setting(False, "delete the run of the output folder and start anew")
    seed: int = setting(0, "of the data, the weights and the order of training")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    _argument_group_name: ClassVar[str] = "data"
    data: str | None = setting(None, "parquet or JSON-lines file, folder or Hub name; built-in problems if not given")
    data_config: str | None = setting(None, "configuration of a Hub data set")
    train_split: str = setting("train", "split of a folder or Hub data set to train on")
    eval_data: str | None = setting(None, "held-out file, folder or Hub name; a part of the data if not given")
    eval_split: str = setting("test", "split of a held-out folder or Hub data set")
    eval_fraction: float = setting(0.05, "part held out if no --eval-data is given")
    prompt_column: str = setting("question", "column with the prompts")
    answer_column: str = setting("answer", "column with the answers")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model that a script tunes."""

    _argument_group_name: ClassVar[str] = "model"
    model: str = setting(help="folder or Hub name of a CoE model, with its tokenizer")
    dtype: str = setting(
        "float32",
        "of the weights: bfloat16 takes half the memory, and suits adapters, which stay in float32; of whole weights "
        "it loses small updates to rounding",
        choices=("float32", "bfloat16"),
    )


@dataclass(frozen=True, kw_only=True)
class BlockSettings:
    _argument_group_name: ClassVar[str] = "blocks"
    block_size: int = setting(128, "tokens in a training sequence")
    eval_blocks: int = setting(64, "blocks of each held-out split to evaluate")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    _argument_group_name: ClassVar[str] = "training"
    steps: int = setting(1200, "of the optimizer")
    batch_size: int = setting(16, "sequences per step, of all processes together")
    lr: float = setting(3e-3, "highest learning rate")
    schedule: str = setting("cosine", "of the learning rate", choices=("cosine", "constant_with_warmup"))
    warmup_steps: int = setting(50, "until the highest learning rate")
    weight_decay: float = setting(0.01, "of AdamW")
    beta2: float = setting(0.95, "of AdamW")
    log_steps: int = setting(10, "steps between two lines of the log")
    eval_steps: int = setting(100, "steps between two evaluations")
    save_steps: int = setting(200, "a multiple of --log-steps")


@dataclass(frozen=True, kw_only=True)
class ProcessSettings:
    """How a process computes its share of a batch, which a resumed run may change."""

    _argument_group_name: ClassVar[str] = "processes"
    micro_batch_size: int | None = setting(None, "sequences that a process computes at once; all of its if not given")


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """What is reported at the end, which a resumed run may change."""

    _argument_group_name: ClassVar[str] = "report"
    num_problems: int = setting(100, "problems of each split to solve at the end")
    num_samples: int = setting(2, "solutions of each split to print")
    max_new_tokens: int = setting(128, "of one solution")


@dataclass(frozen=True, kw_only=True)
class JobSettings(RunSettings, DataSettings, TrainingSettings, ProcessSettings, ReportSettings):
    """What every training script is told."""

    model: str | None = None  # whose option every script explains itself


@dataclass(frozen=True, kw_only=True)
class BlockJobSettings(JobSettings, BlockSettings):
    """Likewise, where texts are packed into blocks."""


# Where a run writes, how it starts and how the work is shared out, not what it computes.
START_SETTINGS = {"output_dir", "resume", "overwrite", *(each.name for each in fields(ProcessSettings))}
REPORT_SETTINGS = {each.name for each in fields(ReportSettings)}


def computing(settings: RunSettings) -> dict[str, Any]:
    """The settings that say what a run computes and reports, by name."""
    return {name: value for name, value in asdict(settings).items() if name not in START_SETTINGS}
