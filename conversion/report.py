# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What a conversion reports: the plan in words, `conversion_report.json` and the model card."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

import model_cards
from configuration_coe import CoeConfig

from .plan import Plan
from .verify import Verification


def figures(config: CoeConfig) -> dict[str, int]:
    """Parameters, active parameters, and floating-point operations that all matrices cost per token (forward; without
    attention scores, which depend on the length)."""
    experts = config.n_routed_experts or 0
    expert_width = experts * config.moe_intermediate_size + config.shared_expert_width
    in_experts = config.num_sparse_layers * 3 * config.hidden_size * expert_width
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    elsewhere = config.total_parameters - in_experts - looked_up
    return {
        "total_parameters": config.total_parameters,
        "active_parameters": config.active_parameters,
        "flops_per_token": 2 * elsewhere + config.expert_flops_per_token,
    }


def make_report(plan: Plan, source: str, verification: Verification) -> dict[str, Any]:
    """What `conversion_report.json` holds.

    Args:
        plan (`Plan`): The conversion.
        source (`str`): The source's name.
        verification (`Verification`): How it was verified.
    """
    used = Counter(output.source for output in plan.outputs if not output.is_new)
    created = sorted(output.name for output in plan.outputs if output.is_new)
    options = {name: value for name, value in vars(plan.options).items() if value not in (None, False)}
    return {
        "source": {"name": source, "model_type": plan.checkpoint.config_dict["model_type"]},
        "options": {name: str(value) if isinstance(value, torch.dtype) else value for name, value in options.items()},
        "exact": plan.exact,
        "explanation": plan.explanation,
        "remarks": plan.remarks,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
        "tensors": {
            "source": len(plan.checkpoint.tensors),
            "used": len(used),
            "dropped": dict(sorted(plan.dropped.items())),
            "written": len(plan.outputs),
            "created": created,
            "bytes": plan.nbytes,
        },
        "before": figures(plan.before),
        "after": figures(plan.after),
        "verification": {
            **vars(verification),
            "passed": verification.passed,
            "precision": "float32"
            + (f", after the source was rounded to {plan.options.dtype}" if plan.options.dtype else ""),
        },
    }


def describe(plan: Plan) -> str:
    """The plan in words, for `--dry-run`."""
    lines = [f"{_title(plan)}: {'exact at the start' if plan.exact else 'NOT exact'}, since {plan.explanation}."]
    lines += plan.remarks
    lines += ["", "Tensors"]
    patterns: dict[tuple[str, str, str], list[str]] = {}
    for output in plan.outputs:
        source = "(new)" if output.is_new else _pattern(output.source)
        patterns.setdefault((source, _pattern(output.name), output.rule), []).append(output.name)
    for (source, name, rule), names in patterns.items():
        what = f"{source} -> {name}" if source != name else name
        lines.append(f"  {len(names):6d}  {what}  [{rule}; e.g. {names[0]}]")
    for pattern, reason in sorted({(_pattern(key), reason) for key, reason in plan.dropped.items()}):
        number = sum(_pattern(key) == pattern for key in plan.dropped)
        lines.append(f"  {number:6d}  {pattern} -> dropped  [{reason}]")
    before, after = figures(plan.before), figures(plan.after)
    lines += ["", f"{'':20}{'before':>20}{'after':>20}"]
    lines += [f"{name.replace('_', ' '):20}{before[name]:>20,}{after[name]:>20,}" for name in before]
    lines.append(f"{'bytes on disk':20}{plan.checkpoint.nbytes:>20,}{plan.nbytes:>20,}")
    return "\n".join(lines)


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Writes `conversion_report.json`."""
    (folder / model_cards.REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")


def write_card(plan: Plan, source: str, source_folder: Path, report: dict[str, Any], folder: Path, name: str) -> None:
    """Writes README.md, the model card, with what it takes over from the source's.

    Args:
        plan (`Plan`): The conversion.
        source (`str`): The source's name.
        source_folder (`Path`): Where it lies.
        report (`dict[str, Any]`): What `make_report` returned.
        folder (`Path`): Where to write to.
        name (`str`): What the result will be called.
    """
    kept = model_cards.inherited(source, source_folder)
    base_model = kept.pop("base_model", None)
    if plan.options.to == "coe":
        data, text = ModelCardData(**kept), ""
    else:
        tags = {"pipeline_tag": "text-generation", "tags": ["mixture-of-experts"]}
        data = ModelCardData(base_model=base_model, library_name="transformers", **tags, **kept)
        text = f"\n{model_cards.origin(report, base_model)}\n"
    path = folder / model_cards.CARD_NAME
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {_title(plan)}\n{text}").save(path)
    if plan.options.to == "coe":
        model_cards.write(plan.after, folder, name=name, base_model=base_model, conversion_report=report)


def _title(plan: Plan) -> str:
    options, config = plan.options, plan.after
    if options.to == "source":
        return f"{plan.config.model_type}, converted back from Chain-of-Experts"
    if options.mode is None:
        return f"Chain-of-Experts in the {'official' if options.to == 'official' else 'transformers'} layout"
    layers = "all layers" if options.layers is None else f"layers {', '.join(map(str, options.layers))}"
    experts = f"{config.num_experts_per_tok} of {config.n_routed_experts} experts per iteration"
    upcycled = f", MLPs made experts by `{options.upcycle}`" if options.upcycle else ""
    return f"Chain-of-Experts, `{options.mode}`, C={config.inner_iter}, K={experts}, {layers}{upcycled}"


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
