# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a Chain-of-Experts model with LoRA adapters and transformers' `Trainer`.

    python examples/finetune_lora.py --model runs/demo/model --output-dir runs/lora \
        --data train.parquet --eval-data test.parquet --r 4 --expert-r 1

Attention, shared experts and routed experts are adapted, the latter at a rank of their own, since there are many of
them. The scales of a converted chain are trained whole, and the log says how far they moved. Data, `--resume` and what
is reported are those of `pretrain.py`. The output folder holds

    run.json        the settings, and a fingerprint of data and model, that a resumed run must share
    tokenizer/      the tokenizer of the run
    checkpoint-N/   the two newest checkpoints, of the adapter alone
    adapter/        the trained adapter, to be loaded onto the model it was trained on
    model/          model and adapter merged: no more expensive than the model was
    results.json    held-out losses, exact match, sample solutions, the log of every step
    loss_curve.png  the losses as a picture
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import recipe.openmp  # noqa: F401  before torch


# isort: split
import torch
from peft import PeftModel, get_peft_model
from recipe.answers import solve
from recipe.corpus import (
    choose_tokenizer,
    encode_prompts,
    fingerprint_of,
    load_corpus,
    pack_corpus,
)
from recipe.report import held_out_table, report
from recipe.run_folder import check_output_dir, checkpoint_step, open_run, short_hash
from recipe.settings import BlockJobSettings
from recipe.training import (
    FinishedRun,
    check_options,
    finished_run,
    given_config,
    given_model,
    logit_difference,
    save_and_reload,
    train_on_blocks,
)
from transformers import PreTrainedTokenizerBase, set_seed

from modeling_coe import CoeConfig, CoeForCausalLM, lora_config
from modeling_coe.command_line import check_positive, command, parse, setting


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    _argument_group_name: ClassVar[str] = "adapter"
    model: str = setting(help="folder or Hub name of a CoE model, with its tokenizer")
    r: int = setting(8, "rank of the adapters")
    expert_r: int | None = setting(None, "rank of the routed experts' adapters; --r if not given")
    alpha: int = setting(16, "lora_alpha: adapters are scaled by alpha / r")
    routers: bool = setting(False, "adapt the routers too")


@dataclass(frozen=True, kw_only=True)
class LoraSettings(AdapterSettings, BlockJobSettings):
    steps: int = 400
    lr: float = 2e-3
    warmup_steps: int = 20


def parse_settings(argv: list[str] | None = None) -> LoraSettings:
    """Reads the command line and checks what can be checked without data."""
    settings = parse(LoraSettings, __doc__.splitlines()[0], argv)
    check_options(settings)
    check_positive(settings, "block_size", "eval_blocks", "r", "alpha")
    if settings.expert_r is not None:
        check_positive(settings, "expert_r")
    return settings


def weights_fingerprint(model: CoeForCausalLM) -> str:
    """A short hash of all weights: an adapter fits one model only, and its checkpoints do not hold that."""
    return short_hash(tensor.cpu().numpy() for tensor in model.state_dict().values())


def train(
    settings: LoraSettings,
    base: CoeForCausalLM,
    train_blocks: torch.Tensor,
    held_out_blocks: dict[str, torch.Tensor],
    checkpoint: Path | None,
) -> FinishedRun:
    """Trains an adapter from the start, or from a checkpoint, to the last step."""
    if checkpoint is not None and checkpoint_step(checkpoint) == settings.steps:
        return finished_run(PeftModel.from_pretrained(base, checkpoint, is_trainable=True), checkpoint)
    set_seed(settings.seed)
    adapters = lora_config(
        base, r=settings.r, expert_r=settings.expert_r, lora_alpha=settings.alpha, routers=settings.routers
    )
    model = get_peft_model(base, adapters)
    print(describe_adapter(model))
    return train_on_blocks(settings, model, train_blocks, held_out_blocks, checkpoint)


def describe_adapter(model: PeftModel) -> str:
    """Its size next to the base model's, in parameters."""
    adapter, total = model.get_nb_trainable_parameters()
    return f"{adapter:,} parameters in adapters, {adapter / (total - adapter):.1%} of the model's {total - adapter:,}"


def save_and_merge(
    settings: LoraSettings, config: CoeConfig, model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[CoeForCausalLM, dict[str, Any]]:
    """Saves the adapter, loads it onto the base model loaded anew, and saves the two merged.

    Returns:
        The merged model, and for `results.json` the size of the adapter, the largest differences of a logit and, of a
        converted chain, how far the scales of each layer moved.
    """
    adapter_folder = settings.output_dir / "adapter"
    model.save_pretrained(adapter_folder)
    tokenizer.save_pretrained(adapter_folder)
    base = given_model(settings.model, config)
    scales = iteration_scales(base)
    loaded = PeftModel.from_pretrained(base, adapter_folder).to(model.device)
    loading = logit_difference(model, loaded)
    merged = loaded.merge_and_unload()
    moved = {i: (scale - scales[i]).abs().max().item() for i, scale in iteration_scales(merged).items()}
    merging = logit_difference(model, merged)
    print(f"The adapter loaded from disk changes logits by at most {loading:.1e}, merging it by {merging:.1e}.")
    if not max(loading, merging) < 1e-3:
        raise RuntimeError(f"The adapter in {adapter_folder} does not compute what was trained.")
    if moved:
        layer = max(moved, key=moved.get)
        print(f"Iteration scales moved by up to {moved[layer]:.2e} (layer {layer}).")
    adapter, total = model.get_nb_trainable_parameters()
    merged, _ = save_and_reload(merged, tokenizer, settings.output_dir / "model")
    return merged, {
        "adapter_parameters": adapter,
        "model_parameters": total - adapter,
        "logit_difference": {"loading": loading, "merging": merging},
        **({"iteration_scale_movement": moved} if moved else {}),
    }


def iteration_scales(model: CoeForCausalLM) -> dict[int, torch.Tensor]:
    """Copies of the iteration scales on the CPU, by layer; of a converted chain only. At scales of zero an iteration
    sees nothing of those before it."""
    return {
        i: layer.iteration_scale.weight.detach().to("cpu", copy=True)
        for i, layer in enumerate(model.model.layers)
        if hasattr(layer, "iteration_scale")
    }


def finetune(settings: LoraSettings) -> None:
    """The whole run, from data to report."""
    check_output_dir(settings)
    config = given_config(settings.model)
    corpus = load_corpus(settings, settings.seed)
    tokenizer = choose_tokenizer(settings, corpus)
    train_blocks, held_out_blocks = pack_corpus(settings, corpus, tokenizer)
    base = given_model(settings.model, config)
    fingerprint = f"{fingerprint_of(train_blocks, held_out_blocks)}-{weights_fingerprint(base)}"
    checkpoint = open_run(settings, tokenizer, fingerprint)
    run = train(settings, base, train_blocks, held_out_blocks, checkpoint)
    model, facts = save_and_merge(settings, config, run.model, tokenizer)
    report(
        settings,
        run,
        held_out_table(run.log, held_out_blocks),
        corpus,
        lambda problems: solve(model, tokenizer, encode_prompts(tokenizer, problems), settings.max_new_tokens),
        title="Chain-of-Experts, LoRA fine-tuning",
        training_tokens=settings.steps * settings.batch_size * settings.block_size,
        **facts,
    )


@command
def main(argv: list[str] | None = None) -> None:
    finetune(parse_settings(argv))


if __name__ == "__main__":
    main()
