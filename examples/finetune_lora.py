# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a Chain-of-Experts model with LoRA adapters and transformers' `Trainer`.

    python examples/finetune_lora.py --model runs/demo/model --output-dir runs/lora \
        --data train.parquet --eval-data test.parquet --r 4 --expert-r 1

Attention, shared experts and routed experts are adapted, the latter at a rank of their own, since there are many of
them. The scales of a converted chain are trained whole, and the log says how far they moved. Before training, saving,
loading and merging are tried with random adapters. Data, `--resume` and what is reported are those of `pretrain.py`.
The output folder holds

    run.json        the settings, and a fingerprint of data and model, that a resumed run must share
    tokenizer/      the tokenizer of the run
    checkpoint-N/   the two newest checkpoints, of the adapter alone
    adapter/        the trained adapter, to be loaded onto the model it was trained on
    model/          model and adapter merged: no more expensive than the model was
    results.json    held-out losses, exact match, sample solutions, the log of every step
    loss_curve.png  the losses as a picture
"""

from dataclasses import dataclass

import recipe.openmp  # noqa: F401  before torch


# isort: split
from recipe.adapter import AdaptedModelSettings, adapt, check_adapter_options, save_and_merge
from recipe.job import load_inputs, pack_inputs, run_job
from recipe.settings import BlockJobSettings
from recipe.training import check_options, given_model

from modeling_coe.command_line import check_positive, command, parse


@dataclass(frozen=True, kw_only=True)
class LoraSettings(AdaptedModelSettings, BlockJobSettings):
    r: int = 8
    steps: int = 400
    lr: float = 2e-3
    warmup_steps: int = 20


def parse_settings(argv: list[str] | None = None) -> LoraSettings:
    """Reads the command line and checks what can be checked without data."""
    settings = parse(LoraSettings, __doc__.splitlines()[0], argv)
    check_options(settings)
    check_positive(settings, "block_size", "eval_blocks")
    check_adapter_options(settings)
    return settings


def finetune(settings: LoraSettings) -> None:
    """The whole run, from data to report."""
    inputs = load_inputs(settings)
    data = pack_inputs(settings, inputs)
    base = given_model(settings.model, inputs.config, settings.dtype)
    model, data = adapt(settings, base, data)
    run_job(settings, inputs, data, model, title="Chain-of-Experts, LoRA fine-tuning", save=save_and_merge)


@command
def main(argv: list[str] | None = None) -> None:
    finetune(parse_settings(argv))


if __name__ == "__main__":
    main()
