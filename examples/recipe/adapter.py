# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""LoRA adapters in training scripts: their options, and what an adapter becomes once it is trained.

An adapter is no use that cannot be loaded and merged, so both are tried with random weights before training.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

import model_cards
from modeling_coe import CoeConfig, lora_config
from modeling_coe.command_line import InputError, check_positive, option, setting

from .job import SavedModel
from .processes import once, say
from .run_folder import is_resumable, short_hash
from .settings import ModelSettings
from .training import (
    LogitDifference,
    TrainingData,
    card_details,
    given_config,
    given_model,
    probe_logits,
    save_and_reload,
)


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    _argument_group_name: ClassVar[str] = "adapter"
    r: int | None = setting(
        None,
        "rank of LoRA adapters, in place of training all weights (torchrun keeps --r for itself)",
        aliases=["--lora", "--lora-r"],
    )
    expert_r: int | None = setting(None, "rank of the routed experts' adapters; --r if not given")
    alpha: int = setting(16, "lora_alpha: adapters are scaled by alpha / r")
    routers: bool = setting(False, "adapt the routers too")


@dataclass(frozen=True, kw_only=True)
class AdaptedModelSettings(AdapterSettings, ModelSettings):
    """An adapter, and the model that it is put on."""


def check_adapter_options(settings: AdapterSettings) -> None:
    """Raises [`InputError`] where they have no meaning, alone or together."""
    if settings.r is None:
        for name in ("expert_r", "alpha", "routers"):
            if getattr(settings, name) != getattr(AdapterSettings, name):
                raise InputError(
                    f"{option(name)} is {getattr(settings, name)}, but no adapter is trained. Give its rank by --r."
                )
        return
    check_positive(settings, "r", "alpha")
    if settings.expert_r is not None:
        check_positive(settings, "expert_r")


def weights_fingerprint(model: PreTrainedModel) -> str:
    """A short hash of all weights: an adapter fits one model only, and its checkpoints do not hold that."""
    return short_hash(tensor.cpu().flatten().view(torch.uint8).numpy() for tensor in model.state_dict().values())


def add_adapter(settings: AdaptedModelSettings, base: PreTrainedModel) -> PeftModel:
    """A new adapter on the model; prints how large it is.

    Raises:
        InputError: The options say something of experts or routers that the model does not have.
    """
    set_seed(settings.seed)
    if isinstance(base.config, CoeConfig):
        adapters = lora_config(
            base, r=settings.r, expert_r=settings.expert_r, lora_alpha=settings.alpha, routers=settings.routers
        )
    else:
        for name in ("expert_r", "routers"):
            if getattr(settings, name):
                raise InputError(
                    f"{option(name)} is {getattr(settings, name)}, but --model {settings.model} is a "
                    f"{base.config.model_type!r} model, which is adapted at all its linear modules. Leave it out."
                )
        adapters = LoraConfig(
            r=settings.r, lora_alpha=settings.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    model = get_peft_model(base, adapters)
    adapter, total = model.get_nb_trainable_parameters()
    size = f"{adapter / (total - adapter):.1%} of the model's {total - adapter:,}"
    say(f"{adapter:,} parameters in adapters, {size}")
    return model


def adapt(settings: AdaptedModelSettings, base: PreTrainedModel, data: TrainingData) -> tuple[PeftModel, TrainingData]:
    """The model with a new adapter, of which merging has been tried, and the data of a run that fits this model only.

    Raises:
        InputError: As [`add_adapter`].
        RuntimeError: As [`check_merging`].
    """
    data = data._replace(fingerprint=f"{data.fingerprint}-{weights_fingerprint(base)}")
    model = add_adapter(settings, base)
    check_merging(settings, model)
    return model, data


class MergedAdapter(NamedTuple):
    """A model with an adapter merged into it, and what loading and merging changed of its logits."""

    model: PreTrainedModel
    loading: LogitDifference
    merging: LogitDifference
    scales_before: dict[int, torch.Tensor]


def load_and_merge(settings: AdaptedModelSettings, model: PeftModel, folder: Path) -> MergedAdapter:
    """Saves the adapter, loads it onto the base model loaded anew, and merges the two, in float32 whatever `--dtype`
    is, where rounding cannot hide a wrong weight. What is returned is in `--dtype` again.

    Raises:
        RuntimeError: Loaded or merged, the adapter does not compute what it did, up to rounding.
    """
    model.save_pretrained(folder)
    base = given_model(settings.model, given_config(settings.model, chains_only=False), settings.dtype)
    scales = iteration_scales(base)
    dtypes = {name: parameter.dtype for name, parameter in base.named_parameters()}
    loaded = PeftModel.from_pretrained(base, folder).to(model.device)
    loading = LogitDifference.between(probe_logits(model), probe_logits(loaded))
    logits = probe_logits(loaded.float())
    merged = loaded.merge_and_unload()
    merging = LogitDifference.between(logits, probe_logits(merged))
    for name, parameter in merged.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    if not (loading.is_rounding and merging.is_rounding):
        raise RuntimeError(
            f"The adapter does not compute the same again: loaded, its logits differ by {loading.difference:.1e}, "
            f"merged by {merging.difference:.1e}; the largest is {merging.largest:.1e}."
        )
    return MergedAdapter(merged, loading, merging, scales)


def check_merging(settings: AdaptedModelSettings, model: PeftModel) -> None:
    """Tries with random weights in the adapter what comes after training, which would be lost without it. The model is
    left as it was; memory and disk are needed for one more of it, as they will be then. All processes have to call it.

    Raises:
        RuntimeError: As [`load_and_merge`].
    """

    def attempt() -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        kept = [parameter.detach().clone() for parameter in trained]
        generator = torch.Generator().manual_seed(settings.seed)
        with torch.no_grad():
            for parameter in trained:  # of which half are zero, and with them all that the adapter adds
                parameter += 0.005 * torch.randn(parameter.shape, generator=generator).to(parameter)
        with tempfile.TemporaryDirectory() as folder:
            load_and_merge(settings, model, Path(folder))
        with torch.no_grad():
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)

    if not is_resumable(settings):
        once(attempt)


def save_and_merge(settings: AdaptedModelSettings, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> SavedModel:
    """Saves the adapter as `adapter/`, and as `model/` the two merged, from disk.

    Returns:
        The merged model with the size of the adapter, the largest differences of a logit and, of a converted chain,
        how far the scales of each layer moved.
    """
    adapter_folder = settings.output_dir / "adapter"
    merged, loading, merging, before = load_and_merge(settings, model, adapter_folder)
    tokenizer.save_pretrained(adapter_folder)
    if isinstance(merged.config, CoeConfig):
        model_cards.write(model, adapter_folder, name=adapter_folder.name, **card_details(settings))
    moved = {i: (scale - before[i]).abs().max().item() for i, scale in iteration_scales(merged).items()}
    print(
        f"The adapter loaded from disk changes logits by at most {loading.difference:.1e}, merging it by "
        f"{merging.difference:.1e}."
    )
    if moved:
        layer = max(moved, key=moved.get)
        print(f"Iteration scales moved by up to {moved[layer]:.2e} (layer {layer}).")
    adapter, total = model.get_nb_trainable_parameters()
    facts = {
        "adapter_parameters": adapter,
        "model_parameters": total - adapter,
        "logit_difference": {"loading": loading.difference, "merging": merging.difference, "largest": merging.largest},
        **({"iteration_scale_movement": moved} if moved else {}),
    }
    return SavedModel(*save_and_reload(settings, merged, tokenizer), facts)


def iteration_scales(model: PreTrainedModel) -> dict[int, torch.Tensor]:
    """Copies of the iteration scales on the CPU, by layer; of a converted chain only. At scales of zero an iteration
    sees nothing of those before it."""
    return {
        i: layer.iteration_scale.weight.detach().to("cpu", copy=True)
        for i, layer in enumerate(model.model.layers)
        if hasattr(layer, "iteration_scale")
    }
