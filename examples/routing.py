# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Draws which experts follow on which in a Chain-of-Experts model, and in the same model before training.

    python examples/routing.py --model runs/demo/model --output-dir runs/routing

Both models read the same held-out texts. The output folder holds

    transitions_untrained.png, transitions_trained.png    the heat maps of figure 8 of the paper
    load_untrained.png, load_trained.png                  the load of every expert
"""

import argparse
from pathlib import Path

import recipe.openmp  # noqa: F401  before torch


# isort: split
from recipe.corpus import add_block_options, add_data_options, check_data_options, load_corpus, load_tokenizer, pack
from recipe.training import given_config, given_model
from tqdm import tqdm
from transformers import set_seed

from modeling_coe import CoeForCausalLM
from modeling_coe.command_line import (
    InputError,
    OptionParser,
    check_folder,
    check_positive,
    check_range,
    command,
    make_folder,
)
from modeling_coe.diagnostics import measure_routing
from modeling_coe.diagnostics.plots import plot_load, plot_transitions


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line and checks what can be checked without data."""
    parser = OptionParser(__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or Hub name of a CoE model, with its tokenizer")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the untrained weights")
    add_data_options(parser)
    add_block_options(parser)
    args = parser.parse_args(argv)
    check_data_options(args)
    check_positive(args, "block_size", "eval_blocks")
    check_range(args, "seed", 0, 2**32)
    check_folder("output_dir", args.output_dir)
    return args


def draw(args: argparse.Namespace) -> None:
    """Measures both models, prints the statistics and draws them."""
    config, tokenizer = given_config(args.model), load_tokenizer(args.model, "--model")
    if config.inner_iter < 2:
        raise InputError(
            f"--model {args.model} has one iteration (`inner_iter` is {config.inner_iter}): no expert follows on "
            "another. Give a chain."
        )
    split, examples = next(iter(load_corpus(args).held_out.items()))
    blocks = pack(examples, tokenizer, args.block_size, args.eval_blocks)
    if len(blocks) == 0:
        raise InputError(
            f"The split {split!r} does not fill one block of --block-size {args.block_size} tokens. Choose smaller "
            "blocks, or give more data."
        )
    set_seed(args.seed)
    models = {"untrained": CoeForCausalLM(config), "trained": given_model(args.model, config)}
    make_folder("output_dir", args.output_dir)
    for name, model in models.items():
        routing = measure_routing(model, ({"input_ids": batch} for batch in tqdm(blocks.split(8), desc=name)))
        print(f"\n{name}: {routing}")
        plot_transitions(routing, args.output_dir / f"transitions_{name}.png")
        plot_load(routing, args.output_dir / f"load_{name}.png")


@command
def main(argv: list[str] | None = None) -> None:
    draw(parse_arguments(argv))


if __name__ == "__main__":
    main()
