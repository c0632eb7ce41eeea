# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Pre-trains a Chain-of-Experts model from scratch with transformers' `Trainer`.

    python examples/pretrain.py --output-dir runs/demo
    python examples/pretrain.py --output-dir runs/gsm8k --data train.parquet --eval-data test.parquet
    python examples/pretrain.py --output-dir runs/gsm8k --data train.parquet --eval-data test.parquet --resume
    python examples/pretrain.py --output-dir runs/more --model runs/demo/model --seed 1

Data are pairs of a prompt and an answer: the built-in word problems of `arithmetic.py`, a parquet or JSON-lines file,
or a data set of the Hub. The pairs are tokenised, joined by the end-of-sequence token and cut into blocks; the trained
model is saved, loaded again and asked to solve held-out problems.

A run that was killed at any moment goes on with `--resume` and, on the same machine with the same number of threads,
computes bit for bit what it would have computed without the interruption. The output folder holds

    run.json        the settings, and a fingerprint of the data, that a resumed run must share
    tokenizer/      the tokenizer of the run
    checkpoint-N/   the two newest checkpoints
    model/          the trained model with its tokenizer
    results.json    held-out losses, exact match, sample solutions, the log of every step
    loss_curve.png  the losses as a picture
"""

from dataclasses import dataclass, fields
from typing import ClassVar

import recipe.openmp  # noqa: F401  before torch


# isort: split
from huggingface_hub.errors import StrictDataclassError
from recipe.job import load_inputs, pack_inputs, run_job
from recipe.processes import say
from recipe.report import unigram_losses
from recipe.settings import BlockJobSettings
from recipe.training import check_options, given_model
from transformers import PreTrainedTokenizerBase, set_seed

from configuration_coe import RESIDUAL_RULES, CoeConfig
from modeling_coe import CoeForCausalLM
from modeling_coe.command_line import (
    InputError,
    check_not_negative,
    check_positive,
    check_range,
    command,
    one_line,
    option,
    parse,
    setting,
)


# The rules of new chains; the others are for converted models, and `none` for comparison with the official code.
RESIDUALS = ("inner", "outer", "both", "init", "prenorm")
# Options that stabilise a chain, settings and fields of the same names.
STABILISERS = ("iteration_norm", "branch_norm", "residual_scale", "reinject")


# ---- Settings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model, and its tokenizer; all but `model` are what a given model answers."""

    _argument_group_name: ClassVar[str] = "model"
    model: str | None = setting(None, "folder or Hub name of a CoE model to go on with; its shape is then given")
    tokenizer: str | None = setting(None, "folder or Hub name; a byte-level BPE is trained if not given")
    vocab_size: int = setting(1024, "of the tokenizer that is trained")
    hidden_size: int = setting(128, "width of the residual stream")
    num_layers: int = setting(2, "all of them sparse")
    num_heads: int = setting(4, "of attention")
    num_experts: int = setting(8, "routed experts (n_routed_experts)")
    shared_experts: int = setting(1, "experts for every token (n_shared_experts)")
    expert_width: int = setting(64, "of one expert (moe_intermediate_size)")
    top_k: int = setting(2, "experts per token and iteration (num_experts_per_tok)")
    iterations: int = setting(2, "length of the chain (inner_iter)")
    residual: str = setting("inner", "rule of the chain", choices=sorted(RESIDUALS))
    shared_router: bool = setting(False, "one router for all iterations (use_igate=False)")
    iteration_norm: bool = setting(False, "a norm for every iteration of the chain (iteration_norm)")
    branch_norm: bool = setting(False, "norms on what iterations add (branch_norm)")
    residual_scale: float | None = setting(None, "scale of what iterations add (residual_scale); none if not given")
    reinject: float | None = setting(None, "how much of its input the chain reads again (reinject); none if not given")
    aux_loss: float = setting(0.001, "weight of the balancing loss (aux_loss_alpha)")
    init_range: float | None = setting(None, "initializer_range; sqrt(2 / (5 hidden_size)) if not given")


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(ModelSettings, BlockJobSettings):
    pass


def parse_settings(argv: list[str] | None = None) -> PretrainSettings:
    """Reads the command line and checks what can be checked without data."""
    settings = parse(PretrainSettings, __doc__.splitlines()[0], argv)
    if settings.model is not None:
        for each in fields(ModelSettings):
            if each.name != "model" and getattr(settings, each.name) != each.default:
                raise InputError(
                    f"{option(each.name)} is {getattr(settings, each.name)}, but --model {settings.model} has a shape "
                    "and a tokenizer already. Leave one of the two out."
                )
    check_settings(settings)
    return settings


def check_settings(settings: PretrainSettings) -> None:
    """Raises [`InputError`] where options have no meaning, alone or together."""
    check_options(settings)
    check_positive(settings, "block_size", "eval_blocks", "hidden_size", "num_layers", "num_heads")
    check_positive(settings, "num_experts", "expert_width", "top_k", "iterations")
    check_not_negative(settings, "shared_experts")
    check_range(settings, "aux_loss", 0)
    for name in ("init_range", "residual_scale", "reinject"):
        if getattr(settings, name) is not None:
            check_range(settings, name, 0, exclusive=True)
    # The rotary part of a head is half as wide as the rest, and even.
    if settings.hidden_size % (4 * settings.num_heads):
        raise InputError(
            f"--hidden-size is {settings.hidden_size}, which --num-heads {settings.num_heads} heads cannot share in "
            f"multiples of 4. Choose a multiple of {4 * settings.num_heads}."
        )


# ---- Model ----------------------------------------------------------------------------------------------------------


def build_config(settings: PretrainSettings, tokenizer: PreTrainedTokenizerBase) -> CoeConfig:
    """The configuration that the options ask for, with heads as wide as in the paper next to the hidden size."""
    head_dim = settings.hidden_size // settings.num_heads
    fields = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": max(2048, settings.block_size),
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "q_lora_rank": None,
        "kv_lora_rank": settings.hidden_size // 2,
        "qk_nope_head_dim": head_dim,
        "qk_rope_head_dim": head_dim // 2,
        "v_head_dim": head_dim,
        "n_routed_experts": settings.num_experts,
        "n_shared_experts": settings.shared_experts,
        "moe_intermediate_size": settings.expert_width,
        "num_experts_per_tok": settings.top_k,
        "inner_iter": settings.iterations,
        "use_igate": not settings.shared_router,
        **{name: getattr(settings, name) for name in STABILISERS},
        "aux_loss_alpha": settings.aux_loss,
        "initializer_range": settings.init_range or (2 / (5 * settings.hidden_size)) ** 0.5,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    try:
        return CoeConfig(**fields, **RESIDUAL_RULES[settings.residual])
    except (ValueError, StrictDataclassError) as error:
        raise InputError(f"{one_line(error)} (--help tells which option sets which field.)") from error


def build_model(settings: PretrainSettings, config: CoeConfig) -> CoeForCausalLM:
    """The given model, or a new one."""
    set_seed(settings.seed)
    return CoeForCausalLM(config) if settings.model is None else given_model(settings.model, config)


def pretrain(settings: PretrainSettings) -> None:
    """The whole run, from data to report."""
    inputs = load_inputs(settings)
    config = inputs.config or build_config(settings, inputs.tokenizer)
    data = pack_inputs(settings, inputs)
    model = build_model(settings, config)
    say(f"{config.total_parameters:,} parameters, {config.active_parameters:,} of them active for a token")
    baselines = {"unigram": unigram_losses(data, len(inputs.tokenizer))}
    run_job(settings, inputs, data, model, title="Chain-of-Experts pre-training", baselines=baselines)


@command
def main(argv: list[str] | None = None) -> None:
    pretrain(parse_settings(argv))


if __name__ == "__main__":
    main()
