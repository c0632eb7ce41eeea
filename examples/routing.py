# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Draws which experts follow on which in a Chain-of-Experts model, and in the same model before training.

    python examples/routing.py --model runs/demo/model --output-dir runs/routing

Both models read the same held-out texts. The output folder holds

    transitions_untrained.png, transitions_trained.png    the heat maps of figure 8 of the paper
    load_untrained.png, load_trained.png                  the load of every expert
    routing_untrained.json, routing_trained.json          all statistics of every router
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import recipe.openmp  # noqa: F401  before torch


# isort: split
from recipe.corpus import check_data_options, load_corpus, load_tokenizer, pack_held_out
from recipe.run_folder import write_json
from recipe.settings import BlockSettings, DataSettings
from recipe.training import given_config, given_model
from tqdm import tqdm
from transformers import set_seed

from modeling_coe import CoeForCausalLM
from modeling_coe.command_line import (
    InputError,
    check_folder,
    check_positive,
    check_range,
    command,
    make_folder,
    parse,
    setting,
)
from modeling_coe.diagnostics import measure_routing
from modeling_coe.diagnostics.plots import plot_load, plot_transitions


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    _argument_group_name: ClassVar[str] = "pictures"
    model: str = setting(help="folder or Hub name of a CoE model, with its tokenizer")
    output_dir: Path = setting(help="folder for the pictures")
    seed: int = setting(0, "of the data and of the untrained weights")


@dataclass(frozen=True, kw_only=True)
class RoutingSettings(PictureSettings, DataSettings, BlockSettings):
    pass


def parse_settings(argv: list[str] | None = None) -> RoutingSettings:
    """Reads the command line and checks what can be checked without data."""
    settings = parse(RoutingSettings, __doc__.splitlines()[0], argv)
    check_data_options(settings)
    check_positive(settings, "block_size", "eval_blocks")
    check_range(settings, "seed", 0, 2**32)
    check_folder("output_dir", settings.output_dir)
    return settings


def draw(settings: RoutingSettings) -> None:
    """Measures both models, prints the statistics and draws them."""
    config, tokenizer = given_config(settings.model), load_tokenizer(settings.model, "--model")
    if config.inner_iter < 2:
        raise InputError(
            f"--model {settings.model} has one iteration (`inner_iter` is {config.inner_iter}): no expert follows on "
            "another. Give a chain."
        )
    split, examples = next(iter(load_corpus(settings, settings.seed).held_out.items()))
    blocks = pack_held_out({split: examples}, tokenizer, settings)[split]
    set_seed(settings.seed)
    models = {"untrained": CoeForCausalLM(config), "trained": given_model(settings.model, config)}
    make_folder("output_dir", settings.output_dir)
    for name, model in models.items():
        routing = measure_routing(model, ({"input_ids": batch} for batch in tqdm(blocks.split(8), desc=name)))
        write_json(settings.output_dir / f"routing_{name}.json", routing.summary())
        print(f"\n{name}: {routing}")
        plot_transitions(routing, settings.output_dir / f"transitions_{name}.png")
        plot_load(routing, settings.output_dir / f"load_{name}.png")


@command
def main(argv: list[str] | None = None) -> None:
    draw(parse_settings(argv))


if __name__ == "__main__":
    main()
