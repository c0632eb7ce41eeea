# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""From a source and options to a plan: to a chain, from one back to its family, and to the official layout."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from configuration_coe import CoeConfig
from configuration_coe.configuration_coe import OFFICIAL_MODEL_TYPE

from .checkpoint import Checkpoint, ConversionError, shorten, stored_dtype
from .configuration import find_culprits, load_config
from .families import FAMILIES
from .families.official import official_config
from .families.official_script import plan_from_script, script_weights
from .family import Family
from .layout import fuse_experts, split_experts
from .plan import Options, Output, Plan, account, drop_tied_head
from .tensors import to_chain, to_source


# A chain of one iteration that keeps the residual stream is what all other families have.
_SINGLE = {"inner_iter": 1, "prenorm_residual": True}


def plan_conversion(folder: Path, options: Options, remarks: Iterable[str] = ()) -> Plan:
    """Reads a source's configuration and the headers of its weights, and accounts for every tensor.

    Args:
        folder (`Path`): The source.
        options (`Options`): What to make of it.
        remarks (`Iterable[str]`): What there is to say of it already.

    Raises:
        ConversionError: The source is damaged, unknown, at odds with its configuration, or cannot become what the
            options ask for.
    """
    if options.layout is not None and options.to != "coe":
        raise ConversionError(
            f"`--layout {options.layout}` is for chains in our own layout. Leave it out with `--to {options.to}`."
        )
    checkpoint = Checkpoint(folder)
    config = load_config(checkpoint)
    if isinstance(config, CoeConfig):
        plan = _plan_from_chain(checkpoint, config, options)
    else:
        plan = _plan_to_chain(checkpoint, config, options)
    plan.remarks[:0] = remarks
    if checkpoint.scales:
        rows, columns = checkpoint.block_scaling.block
        plan.remarks.append(
            f"{len(checkpoint.scales)} weights of the source are in FP8, scaled by blocks of {rows} x {columns}. "
            f"They become {options.dtype or checkpoint.block_scaling.dtype}."
        )
    drop_tied_head(plan)
    account(plan)
    if options.layout == "fused":
        fuse_experts(plan)
    elif options.layout == "experts" or options.to == "official":
        split_experts(plan)
    return plan


# ---------------------------------------------------------------------------------------------- source -> chain


def _plan_to_chain(checkpoint: Checkpoint, source_config: PreTrainedConfig, options: Options) -> Plan:
    family = FAMILIES[source_config.model_type]
    if options.to != "coe":
        raise ConversionError(f"`--to {options.to}` converts Chain-of-Experts models; this is `{family.model_type}`.")
    fields, remarks = family.chain_fields(source_config, options.ignored_fields)
    if family.dense:
        before = _configure(fields | _SINGLE | {"n_routed_experts": None}, source_config)
        experts, exact, explanation = _dense_to_experts(source_config, options)
        fields |= experts
    else:
        if options.upcycle or options.experts or options.top_k:
            raise ConversionError(
                f"`{family.model_type}` has experts already. `--upcycle`, `--experts` and `--top-k` make experts of "
                "dense models; leave them out."
            )
        before, exact = _configure(fields | _SINGLE, source_config), True
        explanation = "it has the source's experts and routers"
    options, chain, reason = _chain(fields, options, dense=family.dense)
    if reason or options.router_noise:
        exact, explanation = False, reason or "noise was added to the routers of later iterations"
    elif options.mode != "identity":
        explanation += ", and its iteration scales are zero"
    config = _configure(fields | chain, source_config)
    plan = Plan(checkpoint, source_config, config, options, before, config, exact, explanation, remarks=remarks)
    for key, tensor in checkpoint.tensors.items():
        if reason := family.dropped(key, source_config):
            plan.dropped[key] = reason
        elif "shared_expert_gate" in key and not config.shared_expert_width:
            plan.dropped[key] = "it gates shared experts of width 0"
        else:
            plan.outputs += to_chain(key, tensor, family, config, options, plan.mlp_inputs)
    return plan


def _configure(fields: dict[str, Any], source: PreTrainedConfig | None = None) -> CoeConfig:
    """A chain's configuration. Errors call its fields as `source` does, where that has them."""

    def make(fields: dict[str, Any]) -> CoeConfig:
        return CoeConfig(**copy.deepcopy(fields))

    try:
        return make(fields)
    except (ValueError, StrictDataclassError) as error:
        names = [name for name in find_culprits(fields, make) if name not in _SINGLE]
        if source is not None:
            names = [FAMILIES[source.model_type].source_field(name, source) or name for name in names]
        message = " ".join(str(error).split())
        culprits = f" Correct {', '.join(f'`{name}`' for name in names)}." if names else ""
        raise ConversionError(f"There is no such chain: {message}{culprits}") from error


def _dense_to_experts(config: PreTrainedConfig, options: Options) -> tuple[dict[str, Any], bool, str]:
    """Fields of the experts that a dense source gets, whether they compute what its MLPs do, and why."""
    if options.upcycle is None:
        raise ConversionError(
            f"`{config.model_type}` is dense. Choose how its MLPs become experts: `--upcycle copy` or `slice`."
        )
    experts, width = options.experts or 8, config.intermediate_size
    if options.top_k is not None and options.top_k > experts:
        raise ConversionError(
            f"`--top-k {options.top_k}` is more than the experts there are (`--experts {experts}`). Choose at most "
            f"{experts}, or more experts."
        )
    fields = {"n_routed_experts": experts, "norm_topk_prob": True, "topk_method": "greedy"}
    if options.layers is not None:
        _check_layers(options.layers, range(config.num_hidden_layers))
        fields["mlp_only_layers"] = [i for i in range(config.num_hidden_layers) if i not in options.layers]
    if options.upcycle == "copy":
        fields |= {"num_experts_per_tok": options.top_k or 2, "moe_intermediate_size": width}
        return fields, True, "its experts are equal and their weights sum to one"
    if width % experts:
        raise ConversionError(f"An MLP of width {width} cannot be cut into {experts} equal slices. Choose a divisor.")
    top_k = options.top_k or experts
    fields |= {"num_experts_per_tok": top_k, "moe_intermediate_size": width // experts}
    fields |= {"scoring_func": "sigmoid", "routed_scaling_factor": float(experts)}
    if top_k == experts:
        return fields, True, "every token uses all slices of its MLP, with equal weights"
    return fields, False, f"a token uses {top_k} of the {experts} slices of its MLP"


def _chain(fields: dict[str, Any], options: Options, dense: bool) -> tuple[Options, dict[str, Any], str | None]:
    """The options with their defaults filled in, the fields of the chain, and what makes it inexact, if anything."""
    mode = options.mode or "split"
    iterations = options.iterations or (1 if mode == "identity" else 2)
    options = Options(**{**vars(options), "mode": mode, "iterations": iterations})
    top_k = fields["num_experts_per_tok"]
    if mode == "identity":
        has_chain_options = iterations != 1 or options.router_noise or options.iteration_norm
        if has_chain_options or (options.layers is not None and not dense):
            raise ConversionError(
                "`--mode identity` makes chains of one iteration of all layers: `--iterations`, `--router-noise`, "
                "`--iteration-norm` and `--layers` mean nothing there. Choose `refine` or `split`."
            )
        return options, _SINGLE, None
    if iterations < 2:
        raise ConversionError(f"`--mode {mode}` needs two iterations or more. For one, choose `--mode identity`.")
    chain, reason = {"inner_iter": iterations, "upcycling": mode, "iteration_norm": options.iteration_norm}, None
    if options.layers is not None and not dense:
        _check_layers(options.layers, _configure(fields | _SINGLE).sparse_layers)
        chain["chain_layers"] = sorted(options.layers)
    if mode == "split":
        allowed = [c for c in range(2, top_k + 1) if top_k % c == 0]
        allowed = f"`--iterations` may be {', '.join(map(str, allowed))}" if allowed else "Choose `--mode refine`"
        if top_k < iterations:
            raise ConversionError(
                f"A token uses {top_k} experts (`num_experts_per_tok`), which cannot be split over {iterations} "
                f"iterations. {allowed}."
            )
        if top_k % iterations:
            if not options.round_top_k:
                raise ConversionError(
                    f"A token uses {top_k} experts (`num_experts_per_tok`), no multiple of {iterations} iterations. "
                    f"{allowed}, or let `--round-top-k` change the number of experts (and the function)."
                )
            rounded = int(top_k / iterations + 0.5) * iterations
            reason = f"a token uses {rounded} experts instead of {top_k}"
            top_k = rounded
        chain["num_experts_per_tok"] = top_k // iterations
    return options, chain, reason


def _check_layers(layers: tuple[int, ...], allowed: range | list[int]) -> None:
    if not layers or (wrong := sorted(set(layers) - set(allowed))):
        raise ConversionError(
            f"`--layers`: {shorten(map(str, wrong)) if layers else 'none'} cannot be converted. Layers that can: "
            f"{shorten(map(str, allowed), limit=100)}."
        )


# ---------------------------------------------------------------------------------------------- chain -> elsewhere


def _plan_from_chain(checkpoint: Checkpoint, config: CoeConfig, options: Options) -> Plan:
    is_official = checkpoint.config_dict["model_type"] == OFFICIAL_MODEL_TYPE
    changed = [name for name, value in vars(options).items() if value != vars(Options())[name]]
    if wrong := [f"--{name.replace('_', '-')}" for name in changed if name not in ("to", "dtype", "layout")]:
        raise ConversionError(
            f"The source is a chain of experts already: {', '.join(wrong)} cannot change it. Leave them out."
        )
    if weights := script_weights(checkpoint):
        if options.to != "coe":
            raise ConversionError(
                f"The source has `{weights[0]}`, as the official conversion script writes it. Make it a chain first, "
                f"without `--to {options.to}`."
            )
        return plan_from_script(checkpoint, config, options)
    if options.to == "source":
        # First as it is: what does not fit the chain's own fields should be called by them.
        plan = _plan_copy(checkpoint, config, config, options)
        drop_tied_head(plan)
        account(plan)
        return _plan_to_source(checkpoint, config, options)
    if is_official != (options.to == "coe") and options.layout is None:
        raise ConversionError(
            f"The source is a Chain-of-Experts model {'in the official layout' if is_official else ''} already. "
            f"Convert it with `--to source`{'' if is_official else ', `--to official` or `--layout`'}."
        )
    result = official_config(config) if options.to == "official" else config
    return _plan_copy(checkpoint, config, result, options)


def _plan_copy(
    checkpoint: Checkpoint, config: CoeConfig, result: CoeConfig | dict[str, Any], options: Options
) -> Plan:
    plan = Plan(checkpoint, config, result, options, config, config, True, "it has the same tensors")
    for key, tensor in checkpoint.tensors.items():
        plan.outputs.append(Output(key, tensor.shape, stored_dtype(key, tensor.dtype, options.dtype), key))
    return plan


def _plan_to_source(checkpoint: Checkpoint, config: CoeConfig, options: Options) -> Plan:
    rule = config.residual_rule
    is_single = rule == "prenorm" and (config.inner_iter == 1 or config.chain_layers == [])
    if not is_single and rule not in ("refine", "split"):
        raise ConversionError(
            "Only chains of one iteration with `prenorm_residual=True`, and converted ones (`upcycling`), can be what "
            f"another family computes. This one has the residual rule {rule!r} and `inner_iter={config.inner_iter}`."
        )
    family, single, target = _first_that_fits(config)
    if family.fuses_experts and not any(key.endswith(".mlp.experts.down_proj") for key in checkpoint.tensors):
        raise ConversionError(
            f"`{family.model_type}` stores all experts of a layer in one tensor, and this chain has tensors for each. "
            "Convert it with `--layout fused` first."
        )
    explanation = "it has the chain's experts and routers" + ("" if is_single else ", whose iteration scales are zero")
    plan = Plan(checkpoint, config, target, options, config, single, True, explanation)
    problems = []
    for key, tensor in checkpoint.tensors.items():
        name, dropped, problem = to_source(key, family, config, checkpoint)
        if name is None:
            plan.dropped[key] = dropped
        else:
            output = Output(name, tensor.shape, stored_dtype(name, tensor.dtype, options.dtype), key)
            if family.is_row(name):
                output = output._replace(shape=(1, *tensor.shape), make=lambda vector: vector.unsqueeze(0))
            plan.outputs.append(output)
        if problem is not None:
            problems.append(problem)
    if problems:
        raise ConversionError(
            f"Training has made this chain more than `{family.model_type}`: {shorten(problems)}. Only chains "
            "whose scales are zero and whose routers and norms are equal go back; use this one as it is."
        )
    return plan


def _first_that_fits(config: CoeConfig) -> tuple[Family, CoeConfig, PreTrainedConfig]:
    """The first family that can express a chain, the chain of one iteration on that family's backbone that it is equal
    to, and the family's configuration."""
    errors = []
    for family in FAMILIES.values():
        if not family.dense and config.backbone in (family.backbone, *family.equal_backbones):
            single = _single_iteration(config, family.backbone)
            try:
                return family, single, family.source_config(single)
            except ConversionError as error:
                errors.append(error)
    if not errors:
        raise ConversionError(f"transformers has no mixture of experts with the attention of `{config.backbone}`.")
    raise ConversionError(" ".join(map(str, errors)))


def _single_iteration(config: CoeConfig, backbone: str) -> CoeConfig:
    """The chain of one iteration that a chain with zero scales is equal to, on an equal backbone."""
    top_k = config.num_experts_per_tok * (config.inner_iter if config.upcycling == "split" else 1)
    values = config.to_dict() | {"backbone": backbone, "num_experts_per_tok": top_k}
    values |= {"upcycling": None, "chain_layers": None, "use_igate": True}
    values |= {"iteration_norm": False, "reinject": None}  # of what one iteration has no use for
    if backbone != config.backbone and set(values.get("layer_types") or ()) == {"full_attention"}:
        del values["layer_types"]  # one backbone asks for them, another has no windows by layer
    return _configure(values | _SINGLE)
