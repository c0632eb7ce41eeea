# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (LoRA, arXiv 2106.09685) by PEFT: which modules and parameters of a chain they are put on.

Attention and shared experts are linear modules, which PEFT finds by name. Routed experts are fused 3D parameters and
routers are parameters of modules that are not linear: PEFT reaches both by `target_parameters` only, and leaves them
out without a word where they are named as modules. The scales of a converted chain, a vector for each iteration, are
trained whole and saved with the adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from .configuration_coe import BACKBONES, CoeConfig
from .experts import check_adaptable


if TYPE_CHECKING:
    from peft import LoraConfig


# Options of `LoraConfig` that PEFT cannot apply to parameters, and the value it takes there.
_OFF_FOR_PARAMETERS = {
    "lora_dropout": 0.0,
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "velora_config": None,
    "kasa_config": None,
    # These two it applies to modules only.
    "layers_to_transform": None,
    "exclude_modules": None,
}
_INITS_FOR_PARAMETERS = (True, False, "gaussian")

_TASK_TYPES = {
    "CoeModel": "FEATURE_EXTRACTION",
    "CoeForSequenceClassification": "SEQ_CLS",
    "CoeForTokenClassification": "TOKEN_CLS",
    "CoeForQuestionAnswering": "QUESTION_ANS",
}


def lora_config(
    model_or_config: PreTrainedModel | CoeConfig,
    *,
    attention: bool = True,
    experts: bool = True,
    routers: bool = False,
    shared_experts: bool = True,
    iteration_scales: bool = True,
    r: int = 8,
    expert_r: int | None = None,
    **lora_kwargs: Any,
) -> LoraConfig:
    """A plain `peft.LoraConfig` that adapts what it is asked to in every layer, and nothing else.

    Never adapted: embeddings, norms, the gate of Qwen's shared experts, and the MLPs of dense layers, which are no
    part of a chain: name these in a `LoraConfig` of your own.

    A matrix (out, in) gets `rank * (in + out)` parameters. Each of the N experts has two, as gate and up projection
    are one, so at the rank of attention the experts' adapters are by far the largest part; `expert_r` gives them a
    smaller rank.

    With `experts_implementation="grouped_mm"` rows are multiplied by the experts' adapters, `W x + scaling * B (A x)`,
    which costs time in proportion to the tokens, and no gradient of a weight is made. Other implementations, and what
    `sharing_weights` names when it warns, add the adapters to the weights as PEFT does, once a layer and pass, in time
    and memory in proportion to the weights. An adapter that is only used is best merged (`merge_and_unload`).

    Args:
        model_or_config (`PreTrainedModel` or `CoeConfig`): The model to adapt, or its configuration.
        attention (`bool`, defaults to `True`): Adapt all projections of attention, whatever the backbone's names.
        experts (`bool`, defaults to `True`): Adapt the routed experts. One adapter serves all iterations of a layer.
        routers (`bool`, defaults to `False`): Adapt the router of every iteration.
        shared_experts (`bool`, defaults to `True`): Adapt the shared experts, where there are any.
        iteration_scales (`bool`, defaults to `True`): Train the `iteration_scale` of converted chains, where there are
            any: as `modules_to_save`, of which PEFT applies one adapter's at a time, and which its `hotswap_adapter`
            does not know (`load_adapter` and `set_adapter` do). Without them a chain whose scales are zero stays what
            it was converted from, whatever else is adapted.
        r (`int`, defaults to 8): Rank of the adapters.
        expert_r (`int`, *optional*): Rank of the routed experts' adapters, `r` by default. `lora_alpha` applies to
            `r`; that of the experts is chosen so that `alpha / rank` is the same for all.
        **lora_kwargs: Further fields of `LoraConfig`. `task_type` follows the model and is causal by default.

    Returns:
        `peft.LoraConfig`: To be used with `get_peft_model`, `model.add_adapter` or TRL's `peft_config`.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: Not a Chain-of-Experts model or configuration, or `lora_kwargs` repeat what the arguments say.
        ValueError: Nothing is adapted, experts or routers are asked for where no layer has any, experts are quantised,
            or an option cannot be applied to them.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("`lora_config` needs PEFT, which is not installed: `pip install peft`.") from error

    config = getattr(model_or_config, "config", model_or_config)
    if not isinstance(config, CoeConfig):
        raise TypeError(
            f"`model_or_config` is of type {type(model_or_config).__name__}. Pass a Chain-of-Experts model or a "
            "CoeConfig."
        )
    ours = {"target_modules": "attention", "target_parameters": "experts"}
    if expert_r is not None:
        ours |= {"rank_pattern": "expert_r", "alpha_pattern": "expert_r"}
    for name in ours.keys() & lora_kwargs.keys():
        raise TypeError(
            f"`{name}={lora_kwargs[name]!r}` is what this function sets, by `{ours[name]}` for example. Drop one of "
            "the two, or use `peft.LoraConfig` itself."
        )
    for name, value in (("experts", experts), ("routers", routers)):
        if value and not config.num_sparse_layers:
            raise ValueError(f"`{name}=True`, but no layer of this model is sparse. Set `{name}=False`.")
    if expert_r is not None and not (experts and expert_r >= 1):
        raise ValueError(
            f"`expert_r={expert_r}` with `experts={experts}`: pass a rank of 1 or more and `experts=True`."
        )

    modules = _attention_modules(config) if attention else []
    if shared_experts and config.num_sparse_layers and config.shared_expert_width:
        modules += [f"mlp.shared_experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if experts else []
    if routers:
        gates = [f"mlp.gate.{t}" for t in range(config.inner_iter)] if config.use_igate else ["mlp.gate"]
        parameters += [f"{gate}.weight" for gate in gates]
    if not modules and not parameters:
        raise ValueError(
            f"`attention={attention}`, `experts={experts}`, `routers={routers}` and `shared_experts={shared_experts}` "
            "leave nothing of this model to adapt. Set one of them that it has to True."
        )
    if parameters:
        _check_options_for_parameters(lora_kwargs)
    if experts and isinstance(model_or_config, nn.Module):
        _check_experts_are_plain(model_or_config)

    has_scales = config.upcycling is not None and any(config.num_iterations(i) > 1 for i in config.sparse_layers)
    if iteration_scales and has_scales:
        lora_kwargs["modules_to_save"] = [*(lora_kwargs.get("modules_to_save") or ()), "iteration_scale"]
    options = {"task_type": _TASK_TYPES.get(type(model_or_config).__name__, "CAUSAL_LM"), "r": r, **lora_kwargs}
    if expert_r not in (None, r):
        _set_expert_rank(options, expert_r, is_alone=not modules and not routers)
    return LoraConfig(target_modules=modules, target_parameters=parameters or None, **options)


# What other families call the parts of latent attention that take their place.
_LATENT_PARTS = {"q_proj": "q_b_proj", "k_proj": "kv_b_proj", "v_proj": "kv_b_proj"}


def register_default_targets() -> None:
    """Enters chains into PEFT's tables of what a method adapts when its configuration does not say: what it adapts of
    Llama, under the names that each backbone has. Does nothing where PEFT is not installed."""
    try:
        from peft.utils import constants
    except ImportError:
        return
    for name in dir(constants):
        table = getattr(constants, name)
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and "llama" in table:
            modules = [part for module in table["llama"] for part in (module, _LATENT_PARTS.get(module, module))]
            table[CoeConfig.model_type] = list(dict.fromkeys(modules))


def _attention_modules(config: CoeConfig) -> list[str]:
    if not BACKBONES[config.backbone].has_latent_attention:
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
    else:
        queries = ("q_proj",) if config.q_lora_rank is None else ("q_a_proj", "q_b_proj")
        names = (*queries, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    return [f"self_attn.{name}" for name in names]


def _check_options_for_parameters(options: dict[str, Any]) -> None:
    # PEFT says so only when the model is wrapped, and of some of them in an error about something else.
    for name, off in _OFF_FOR_PARAMETERS.items():
        if options.get(name, off) != off:
            raise ValueError(
                f"`{name}={options[name]!r}` cannot be applied to experts and routers, which PEFT adapts as "
                f"parameters. Leave it at {off!r}, or set `experts=False` and `routers=False`."
            )
    if (init := options.get("init_lora_weights", True)) not in _INITS_FOR_PARAMETERS:
        raise ValueError(
            f"`init_lora_weights={init!r}` reads the weight of a linear module, which experts and routers are not. "
            f"Choose one of {_INITS_FOR_PARAMETERS}, or set `experts=False` and `routers=False`."
        )


def _check_experts_are_plain(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            check_adaptable(parameter)


def _set_expert_rank(options: dict[str, Any], expert_r: int, is_alone: bool) -> None:
    """Makes `expert_r` the rank of the routed experts in `options`, and leaves that of everything else.

    The experts get the default and everything else a pattern, since PEFT warns of every pattern that no module matches
    and does not look among parameters.
    """
    r, alpha = options["r"], options.get("lora_alpha", 8)
    others = r".*\.(self_attn|mlp\.shared_experts|mlp\.gate)\..*"
    options["r"] = expert_r
    if not is_alone:
        options["rank_pattern"] = {others: r}
    # A rank-stabilised adapter divides by the root of its rank, which is to make ranks comparable already.
    if not options.get("use_rslora", False):
        options["lora_alpha"] = alpha * expert_r / r
        if not is_alone:
            options["alpha_pattern"] = {others: alpha}
