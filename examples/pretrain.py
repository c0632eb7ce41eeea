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

import argparse
from pathlib import Path

import recipe.openmp  # noqa: F401  before torch


# isort: split
import torch
from huggingface_hub.errors import StrictDataclassError
from recipe.answers import solve
from recipe.corpus import (
    Corpus,
    add_block_options,
    choose_tokenizer,
    encode_prompts,
    fingerprint_of,
    load_corpus,
    pack_corpus,
)
from recipe.report import held_out_table, report, unigram_loss
from recipe.run_folder import check_output_dir, checkpoint_step, open_run
from recipe.training import (
    FinishedRun,
    add_options,
    check_options,
    finished_run,
    given_config,
    given_model,
    save_and_reload,
    train_on_blocks,
)
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    set_seed,
)

from configuration_coe import RESIDUAL_RULES, CoeConfig
from modeling_coe import CoeForCausalLM
from modeling_coe.command_line import (
    InputError,
    OptionParser,
    check_not_negative,
    check_positive,
    check_range,
    command,
    one_line,
    option,
)


# The rules of new chains; the others are for converted models, and `none` for comparison with the official code.
RESIDUALS = ("inner", "outer", "both", "init", "prenorm")
# Options that a given model answers.
SHAPE_OPTIONS = (
    *("tokenizer", "vocab_size", "hidden_size", "num_layers", "num_heads", "num_experts", "shared_experts"),
    *("expert_width", "top_k", "iterations", "residual", "shared_router", "aux_loss", "init_range"),
)


# ---- Options --------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line and checks what can be checked without data."""
    parser = OptionParser(__doc__.splitlines()[0])
    add_block_options(parser)
    tokens = parser.add_argument_group("tokenizer")
    tokens.add_argument("--tokenizer", help="folder or Hub name; a byte-level BPE is trained if not given")
    tokens.add_argument("--vocab-size", type=int, default=1024, help="of the tokenizer that is trained")

    model = parser.add_argument_group("model")
    model.add_argument("--model", help="folder or Hub name of a CoE model to go on with; its shape is then given")
    model.add_argument("--hidden-size", type=int, default=128)
    model.add_argument("--num-layers", type=int, default=2)
    model.add_argument("--num-heads", type=int, default=4)
    model.add_argument("--num-experts", type=int, default=8, help="routed experts (n_routed_experts)")
    model.add_argument("--shared-experts", type=int, default=1, help="experts for every token (n_shared_experts)")
    model.add_argument("--expert-width", type=int, default=64, help="of one expert (moe_intermediate_size)")
    model.add_argument("--top-k", type=int, default=2, help="experts per token and iteration (num_experts_per_tok)")
    model.add_argument("--iterations", type=int, default=2, help="length of the chain (inner_iter)")
    model.add_argument("--residual", choices=sorted(RESIDUALS), default="inner", help="rule of the chain")
    model.add_argument("--shared-router", action="store_true", help="one router for all iterations (use_igate=False)")
    model.add_argument("--aux-loss", type=float, default=0.001, help="weight of the balancing loss (aux_loss_alpha)")
    model.add_argument("--init-range", type=float, help="initializer_range; sqrt(2 / (5 hidden_size)) if not given")

    add_options(parser)

    args = parser.parse_args(argv)
    if args.model is not None:
        for name in SHAPE_OPTIONS:
            if getattr(args, name) != parser.get_default(name):
                raise InputError(
                    f"{option(name)} is {getattr(args, name)}, but --model {args.model} has a shape and a tokenizer "
                    "already. Leave one of the two out."
                )
    check_arguments(args)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raises [`InputError`] where options have no meaning, alone or together."""
    check_options(args)
    check_positive(args, "block_size", "eval_blocks", "hidden_size", "num_layers", "num_heads")
    check_positive(args, "num_experts", "expert_width", "top_k", "iterations")
    check_not_negative(args, "shared_experts")
    check_range(args, "aux_loss", 0)
    if args.init_range is not None:
        check_range(args, "init_range", 0, exclusive=True)
    # The rotary part of a head is half as wide as the rest, and even.
    if args.hidden_size % (4 * args.num_heads):
        raise InputError(
            f"--hidden-size is {args.hidden_size}, which --num-heads {args.num_heads} heads cannot share in multiples "
            f"of 4. Choose a multiple of {4 * args.num_heads}."
        )


# ---- Model and training ---------------------------------------------------------------------------------------------


def build_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> CoeConfig:
    """The configuration of the given model, or the one that the options ask for, with the head sizes in the paper's
    proportions to the hidden size."""
    if args.model is not None:
        return given_config(args.model)
    head_dim = args.hidden_size // args.num_heads
    fields = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": max(2048, args.block_size),
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": args.num_heads,
        "q_lora_rank": None,
        "kv_lora_rank": args.hidden_size // 2,
        "qk_nope_head_dim": head_dim,
        "qk_rope_head_dim": head_dim // 2,
        "v_head_dim": head_dim,
        "n_routed_experts": args.num_experts,
        "n_shared_experts": args.shared_experts,
        "moe_intermediate_size": args.expert_width,
        "num_experts_per_tok": args.top_k,
        "inner_iter": args.iterations,
        "use_igate": not args.shared_router,
        "aux_loss_alpha": args.aux_loss,
        "initializer_range": args.init_range or (2 / (5 * args.hidden_size)) ** 0.5,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    try:
        return CoeConfig(**fields, **RESIDUAL_RULES[args.residual])
    except (ValueError, StrictDataclassError) as error:
        raise InputError(f"{one_line(error)} (--help tells which option sets which field.)") from error


def build_model(args: argparse.Namespace, config: CoeConfig) -> CoeForCausalLM:
    """The given model, or a new one."""
    set_seed(args.seed)
    return CoeForCausalLM(config) if args.model is None else given_model(args.model, config)


def train(
    args: argparse.Namespace,
    model: CoeForCausalLM,
    train_blocks: torch.Tensor,
    held_out_blocks: dict[str, torch.Tensor],
    checkpoint: Path | None,
) -> FinishedRun:
    """Trains from the start, or from a checkpoint, to the last step."""
    config = model.config
    print(f"{config.total_parameters:,} parameters, {config.active_parameters:,} of them active for a token")
    if checkpoint is not None and checkpoint_step(checkpoint) == args.steps:
        return finished_run(AutoModelForCausalLM.from_pretrained(checkpoint), checkpoint)
    return train_on_blocks(args, model, train_blocks, held_out_blocks, checkpoint)


def report_run(
    args: argparse.Namespace,
    run: FinishedRun,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    train_blocks: torch.Tensor,
    held_out_blocks: dict[str, torch.Tensor],
) -> None:
    """Saves the model, solves held-out problems with the saved one and reports."""
    model, tokenizer = save_and_reload(run.model, tokenizer, args.output_dir / "model")
    unigram = {split: unigram_loss(train_blocks, blocks, len(tokenizer)) for split, blocks in held_out_blocks.items()}
    report(
        args,
        run,
        held_out_table(run.log, held_out_blocks, unigram=unigram),
        corpus,
        lambda problems: solve(model, tokenizer, encode_prompts(tokenizer, problems), args.max_new_tokens),
        title="Chain-of-Experts pre-training",
        parameters={"total": model.config.total_parameters, "active": model.config.active_parameters},
        training_tokens=args.steps * args.batch_size * args.block_size,
    )


def pretrain(args: argparse.Namespace) -> None:
    """The whole run, from data to report."""
    check_output_dir(args)
    corpus = load_corpus(args)
    tokenizer = choose_tokenizer(args, corpus)
    config = build_config(args, tokenizer)
    train_blocks, held_out_blocks = pack_corpus(args, corpus, tokenizer)
    model = build_model(args, config)
    checkpoint = open_run(args, tokenizer, fingerprint_of(train_blocks, held_out_blocks))
    run = train(args, model, train_blocks, held_out_blocks, checkpoint)
    report_run(args, run, corpus, tokenizer, train_blocks, held_out_blocks)


@command
def main(argv: list[str] | None = None) -> None:
    pretrain(parse_arguments(argv))


if __name__ == "__main__":
    main()
