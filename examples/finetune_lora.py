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
from typing import ClassVar

import recipe.openmp  # noqa: F401  before torch


# isort: split
import torch
from peft import PeftModel, get_peft_model
from recipe.job import SavedModel, load_inputs, pack_inputs, run_job
from recipe.processes import say
from recipe.run_folder import short_hash
from recipe.settings import BlockJobSettings
from recipe.training import check_options, given_config, given_model, logit_difference, save_and_reload
from transformers import PreTrainedTokenizerBase, set_seed

from modeling_coe import CoeForCausalLM, lora_config
from modeling_coe.command_line import check_positive, command, parse, setting


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    _argument_group_name: ClassVar[str] = "adapter"
    model: str = setting(help="folder or Hub name of a CoE model, with its tokenizer")
    r: int = setting(8, "rank of the adapters (torchrun keeps --r for itself)", aliases="--lora-r")
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


def add_adapter(settings: LoraSettings, base: CoeForCausalLM) -> PeftModel:
    """A new adapter on the model; prints how large it is."""
    set_seed(settings.seed)
    adapters = lora_config(
        base, r=settings.r, expert_r=settings.expert_r, lora_alpha=settings.alpha, routers=settings.routers
    )
    model = get_peft_model(base, adapters)
    adapter, total = model.get_nb_trainable_parameters()
    size = f"{adapter / (total - adapter):.1%} of the model's {total - adapter:,}"
    say(f"{adapter:,} parameters in adapters, {size}")
    return model


def save_and_merge(settings: LoraSettings, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> SavedModel:
    """Saves the adapter, loads it onto the base model loaded anew, and saves the two merged.

    Returns:
        The merged model with the size of the adapter, the largest differences of a logit and, of a converted chain,
        how far the scales of each layer moved.
    """
    adapter_folder = settings.output_dir / "adapter"
    model.save_pretrained(adapter_folder)
    tokenizer.save_pretrained(adapter_folder)
    base = given_model(settings.model, given_config(settings.model))
    scales = iteration_scales(base)
    loaded = PeftModel.from_pretrained(base, adapter_folder).to(model.device)
    loading = logit_difference(model, loaded)
    merged = loaded.merge_and_unload()
    moved = {i: (scale - scales[i]).abs().max().item() for i, scale in iteration_scales(merged).items()}
    merging = logit_difference(model, merged)
    print(
        f"The adapter loaded from disk changes logits by at most {loading.difference:.1e}, merging it by "
        f"{merging.difference:.1e}."
    )
    if not (loading.is_rounding and merging.is_rounding):
        raise RuntimeError(f"The adapter in {adapter_folder} does not compute what was trained.")
    if moved:
        layer = max(moved, key=moved.get)
        print(f"Iteration scales moved by up to {moved[layer]:.2e} (layer {layer}).")
    adapter, total = model.get_nb_trainable_parameters()
    facts = {
        "adapter_parameters": adapter,
        "model_parameters": total - adapter,
        "logit_difference": {"loading": loading.difference, "merging": merging.difference},
        **({"iteration_scale_movement": moved} if moved else {}),
    }
    return SavedModel(*save_and_reload(merged, tokenizer, settings.output_dir / "model"), facts)


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
    inputs = load_inputs(settings)
    data = pack_inputs(settings, inputs)
    base = given_model(settings.model, inputs.config)
    data = data._replace(fingerprint=f"{data.fingerprint}-{weights_fingerprint(base)}")
    model = add_adapter(settings, base)
    run_job(settings, inputs, data, model, title="Chain-of-Experts, LoRA fine-tuning", save=save_and_merge)


@command
def main(argv: list[str] | None = None) -> None:
    finetune(parse_settings(argv))


if __name__ == "__main__":
    main()
