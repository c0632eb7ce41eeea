# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What a model card says about a Chain-of-Experts model, as tables and sentences made from its configuration."""

import re
from collections.abc import Sequence
from decimal import Decimal
from itertools import groupby
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from configuration_coe import CoeConfig


if TYPE_CHECKING:
    from transformers import TrainingArguments


# What one iteration sees of those before it, and what leaves the layer.
_RESIDUAL_RULES = {
    "inner": "adds its output to its own input, and the last sum is the layer's output",
    "outer": "passes its output on, and the layer adds the last one to its input",
    "both": "adds its output to its own input, and the layer adds the last sum to its input",
    "init": "adds its output to the first iteration's input, and the last sum is the layer's output",
    "prenorm": "adds its output to its own input, and the layer adds the outputs of all iterations to its input",
    "none": "passes its output on, and the last one is the layer's output",
    "refine": "adds its output, scaled by a learned vector, to its own input, and the layer adds the last iteration's "
    "output to its input",
    "split": "adds its output, scaled by a learned vector, to its own input, and the layer adds the outputs of all "
    "iterations to its input; no expert is used twice for a token",
}
# What the options that stabilise a chain do; `{}` is their value.
_STABILISERS = {
    "iteration_norm": "later iterations read through norms of their own",
    "branch_norm": "the output of every iteration is normed",
    "residual_scale": "the output of every iteration is multiplied by {} / (C sqrt(L)), with L layers",
    "reinject": "iteration t > 0 reads a share {} / (t + 1) of the chain's input again",
}
_TIMES = {1: "once", 2: "twice, in sequence,"}


def description(config: CoeConfig) -> str:
    """The architecture in words."""
    layers = _count(config.num_hidden_layers, "layer")
    if not config.num_sparse_layers:
        return f"A decoder-only language model of {layers}, all of them dense."
    text = (
        "A [Chain-of-Experts](https://arxiv.org/abs/2506.18945) language model: a mixture of experts that routes each "
        f"token {_TIMES.get(config.inner_iter, f'{config.inner_iter} times, in sequence,')} through one set of "
        f"{config.n_routed_experts:,} experts. The decoder has {layers} with the attention of `{config.backbone}`; "
    )
    if config.num_sparse_layers == config.num_hidden_layers:
        text += "all are sparse. "
    else:
        text += f"{config.num_sparse_layers} are sparse (layers {_ranges(config.sparse_layers)}), the others dense. "
    if config.chain_layers is not None:
        single = sorted(set(config.sparse_layers) - set(config.chain_layers))
        if single:
            text += (
                f"The sparse layers {_ranges(single)} are not chained: they run once, with "
                f"{config.experts_per_iteration(single[0])} experts per token. "
            )
    router = "a router of its own" if config.use_igate else "the one router of the layer"
    text += f"In every iteration {router} chooses {_count(config.num_experts_per_tok, 'expert')} for each token"
    if config.shared_expert_width:
        text += f", next to {_shared(config)}{' in the first one' if config.upcycling == 'split' else ''}"
    text = f"{text}. Each iteration {_RESIDUAL_RULES[config.residual_rule]}."
    for name, value in _stabilisers(config).items():
        text += f" With `{name}`, {_STABILISERS[name].format(value)}."
    return text


def _stabilisers(config: CoeConfig) -> dict[str, Any]:
    """The options that stabilise the chain, as far as they are on."""
    return {name: value for name in _STABILISERS if (value := getattr(config, name)) not in (False, None)}


def architecture(config: CoeConfig) -> dict[str, str]:
    """The architecture in figures."""
    figures = {
        "Layers": f"{config.num_hidden_layers}, of which sparse: {_ranges(config.sparse_layers) or 'none'}",
        "Hidden size": f"{config.hidden_size:,}",
        "Attention": f"`{config.backbone}`, {_count(config.num_attention_heads, 'head')}",
        "Vocabulary": f"{config.vocab_size:,}",
        "Context": f"{_count(config.max_position_embeddings, 'token')}",
    }
    if config.num_sparse_layers:
        routers = f"one per iteration ({config.inner_iter} per layer)" if config.use_igate else "one per layer"
        figures |= {
            "Iterations C": f"{config.inner_iter}",
            "Routed experts N": f"{config.n_routed_experts:,} of width {config.moe_intermediate_size:,}",
            "Experts per token and iteration K": f"{config.num_experts_per_tok}",
            "Residual rule": ", ".join(
                f"`{each}`" for each in (config.residual_rule, *(f"{n}={v}" for n, v in _stabilisers(config).items()))
            ),
            "Routers": f"{routers}, `{config.scoring_func}` scores, `{config.topk_method}` choice",
            "Shared experts": _shared(config) if config.shared_expert_width else "none",
        }
    total, active = config.total_parameters, config.active_parameters
    figures |= {
        "Total parameters": f"{total:,}",
        "Active parameters": f"{active:,} ({active / total:.1%})",
    }
    if config.num_sparse_layers:
        figures |= {
            "Expert FLOPs per token": f"{config.expert_flops_per_token:,}",
            "Expert combinations per layer": _large(config.expert_combinations),
        }
    return figures


def training(args: "TrainingArguments", config: CoeConfig, datasets: list[str]) -> dict[str, str]:
    """Training data and recipe."""
    devices, accumulation = args.world_size, args.gradient_accumulation_steps
    batch = args.train_batch_size * devices * accumulation
    warmup = f"{args.warmup_steps:.1%} of the steps" if 0 < args.warmup_steps < 1 else f"{args.warmup_steps:g} steps"
    length = _count(args.max_steps, "step") if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    betas = f", betas {args.adam_beta1:g} and {args.adam_beta2:g}, epsilon {args.adam_epsilon:g}"
    betas = betas if "adam" in _name(args.optim) else ""
    facts = {
        "Data": ", ".join(datasets) or "not stated",
        "Length": length,
        "Sequences per step": f"{batch} ({args.train_batch_size} per device, {_count(devices, 'process')}, "
        f"{_count(accumulation, 'accumulation step')})",
        "Learning rate": f"{args.learning_rate:g}, schedule `{_name(args.lr_scheduler_type)}`, warm-up {warmup}",
        "Optimizer": f"`{_name(args.optim)}`{betas}, weight decay {args.weight_decay:g}",
        "Gradient norm": f"clipped at {args.max_grad_norm:g}" if args.max_grad_norm else "not clipped",
        "Precision": "bf16 mixed" if args.bf16 else "fp16 mixed" if args.fp16 else "that of the weights",
        "Seed": f"{args.seed}",
    }
    if config.num_sparse_layers:
        level = "sequence" if config.seq_aux else "batch"
        facts["Load-balancing loss"] = f"coefficient {config.aux_loss_alpha:g} per iteration, over the {level}"
    if config.router_z_loss_coef:
        facts["Router z-loss"] = f"coefficient {config.router_z_loss_coef:g}"
    return facts


def origin(report: dict[str, Any], base_models: str | Sequence[str] | None = None) -> str:
    """Which model another was made from and, from a conversion's report, how faithfully; empty where neither is known.

    Args:
        report (`dict[str, Any]`): What the conversion wrote about itself, if there was one.
        base_models (`str` or `Sequence[str]`, *optional*): Names on the Hub; the report's source by default.
    """
    base_models = [base_models] if isinstance(base_models, str) else base_models or []
    source = report.get("source")
    name = source.get("name") if isinstance(source, dict) else source
    names = [_link(base_model) for base_model in base_models]
    if not names and isinstance(name, str):
        names = [f"`{PurePath(name).name}`"]
    if not report:
        return f"Made from {' and '.join(names)}." if names else ""
    lines = [f"Converted from {' and '.join(names) or 'another model'}."]
    if isinstance(report.get("exact"), bool):
        function = "computes the same function" if report["exact"] else "does **not** compute the same function"
        lines[0] += f" Before any training it {function}"
        explanation = report.get("explanation")
        lines[0] += f": {explanation}." if explanation else "."
    lines += [f"\n{remark}" for remark in report.get("remarks") or []]
    if rows := _before_and_after(report):
        lines += ["", "| | before | after |", "| --- | ---: | ---: |", *rows]
    if rows := _rows(report.get("options")):
        lines += ["", "| option | |", "| --- | --- |", *rows]
    if rows := _rows(report.get("verification")):
        lines += ["", "| verification | |", "| --- | --- |", *rows]
    return "\n".join(lines)


def limitations(config: CoeConfig) -> list[str]:
    """What to know before using the model."""
    points = []
    if config.num_sparse_layers and config.inner_iter > 1:
        points.append(
            f"The {config.inner_iter} iterations of a layer run one after the other, which takes more time than "
            "running as many experts at once."
        )
    if config.upcycling is not None:
        points.append(
            "The iterations were added to a trained model. Until they are trained further, they add nothing to what "
            "it can do."
        )
    if config.residual_rule in ("inner", "init", "none") and config.num_sparse_layers:
        points.append(
            "The un-normalised residual stream does not reach beyond a sparse layer, as in the paper's code and "
            "unlike in other decoders."
        )
    return [
        *points,
        "Programs that bring their own model code, such as llama.cpp, do not know the chain.",
        "It can state falsehoods and repeat biases of its training data. Safety was not evaluated.",
    ]


def _shared(config: CoeConfig) -> str:
    return f"{_count(config.n_shared_experts, 'shared expert')} (width {config.shared_expert_width:,} in all)"


def _count(number: int, what: str) -> str:
    plural = "" if number == 1 else "es" if what.endswith("s") else "s"
    return f"{number:,} {what}{plural}"


def _large(number: int) -> str:
    """Exact, or in powers of ten where nobody would count the digits."""
    return f"{number:,}" if number < 10**9 else f"{Decimal(number):.3e}"


def _ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as `"0-2, 5"`."""
    runs = [list(run) for _, run in groupby(enumerate(sorted(numbers)), lambda item: item[1] - item[0])]
    return ", ".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else f"{run[0][1]}" for run in runs)


def _name(value: Any) -> str:
    return str(getattr(value, "value", value))


def _link(model: str) -> str:
    return f"[{model}](https://huggingface.co/{model})" if "/" in model else f"`{model}`"


def _label(name: str) -> str:
    return name.replace("_", " ")


def _cell(value: Any) -> str | None:
    """A value of a report as one cell of a table, without the folders of this machine; `None` for what is no value."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, str):
        text = PurePath(value).name if re.match(r"[/~]|[A-Za-z]:\\", value) else value
        return re.sub(r"\s+", " ", text).replace("|", r"\|")
    if isinstance(value, list) and value and all(isinstance(item, str | int | float) for item in value):
        return ", ".join(str(_cell(item)) for item in value)
    return None


def _rows(values: Any) -> list[str]:
    cells = {name: _cell(value) for name, value in values.items()} if isinstance(values, dict) else {}
    return [f"| {_label(name)} | {cell} |" for name, cell in cells.items() if cell is not None]


def _before_and_after(report: dict[str, Any]) -> list[str]:
    before, after = report.get("before"), report.get("after")
    if not isinstance(before, dict) or not isinstance(after, dict):
        return []
    return [f"| {_label(name)} | {_cell(before[name])} | {_cell(after[name])} |" for name in before if name in after]
