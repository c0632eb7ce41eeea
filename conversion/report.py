# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What a conversion reports: the plan in words, `conversion_report.json` and the model card."""

import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

import model_cards
from configuration_coe import CoeConfig
from configuration_coe.configuration_coe import OFFICIAL_MODEL_TYPE

from .families import ALIASES, FAMILIES
from .plan import Plan
from .source import Source
from .tensors import Place
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


def make_report(plan: Plan, source: Source, verification: Verification) -> dict[str, Any]:
    """What `conversion_report.json` holds.

    Args:
        plan (`Plan`): The conversion.
        source (`Source`): Where it is from.
        verification (`Verification`): How it was verified.
    """
    used = Counter(output.source for output in plan.outputs if not output.is_new)
    created = sorted(output.name for output in plan.outputs if output.is_new)
    options = {name: value for name, value in vars(plan.options).items() if value not in (None, False)}
    return {
        "title": _title(plan),
        "source": {
            "name": source.name,
            "revision": source.revision,
            "gguf_file": source.gguf_file,
            "model_type": plan.checkpoint.config_dict["model_type"],
            **_dequantized(plan),
        },
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
            "written": len({output.stored_name for output in plan.outputs}),
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


def _dequantized(plan: Plan) -> dict[str, Any]:
    """Which of the source's weights were in FP8, and what they have become."""
    if not plan.checkpoint.scales:
        return {}
    scaling = plan.checkpoint.block_scaling
    return {
        "dequantized": {
            "quant_method": "fp8",
            "tensors": len(plan.checkpoint.scales),
            "weight_block_size": list(scaling.block),
            "dtype": str(plan.options.dtype or scaling.dtype),
        }
    }


def describe(plan: Plan) -> str:
    """The plan in words, for `--dry-run`."""
    lines = [f"{_title(plan)}: {'exact at the start' if plan.exact else 'NOT exact'}, since {plan.explanation}."]
    lines += plan.remarks
    lines += ["", "Tensors"]
    patterns: dict[tuple[str, str, str], list[str]] = {}
    for output in plan.outputs:
        source = "(new)" if output.is_new else _pattern(output.source)
        name, rule = output.stored_name, output.rule if output.slice is None else f"{output.rule}, fused"
        patterns.setdefault((source, _pattern(name), rule), []).append(name)
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


def describe_cost(plan: Plan, folder: Path, sample: int = 64_000_000) -> str:
    """Room, memory and time that a conversion needs, for `--dry-run`: by its bytes, and by how fast some of them are
    read and written now.

    Args:
        plan (`Plan`): The conversion.
        folder (`Path`): On the disk of the result. Nothing stays there.
        sample (`int`, defaults to 64,000,000): Bytes to read and write.
    """
    layers = Counter()
    for output in plan.outputs:
        layers[Place.of(output.name).layer] += 4 * torch.Size(output.shape).numel()
    lines = [
        f"{'bytes free':20}{'':20}{shutil.disk_usage(folder).free:>20,}",
        f"{'bytes in memory':20}{'':20}{max(layers.values()):>20,}  (the largest layer in float32; and the program)",
    ]
    read = written = 0
    reading = writing = 0.0
    # An embedding can be a hundred times the sample.
    keys = sorted(plan.checkpoint.tensors, key=lambda key: abs(plan.checkpoint.nbytes_of(key) - sample))
    with tempfile.TemporaryFile(dir=folder) as file:
        for key in keys:
            begin = time.perf_counter()
            tensor = plan.checkpoint.read(key)
            reading += time.perf_counter() - begin
            read += plan.checkpoint.nbytes_of(key)
            begin = time.perf_counter()
            written += file.write(tensor.flatten().view(torch.uint8).numpy())
            os.fsync(file.fileno())
            writing += time.perf_counter() - begin
            if read >= sample:
                break
    # The source is read, the result written, and both are read again to be compared.
    seconds = (2 * plan.checkpoint.nbytes + plan.nbytes) * reading / read + plan.nbytes * writing / written
    rates = f"{read / reading / 1e6:,.0f} MB/s read, {written / writing / 1e6:,.0f} MB/s written here"
    return "\n".join([*lines, f"{'time':20}{'':20}{f'{seconds:,.0f} s or more':>20}  ({rates})"])


def describe_families() -> str:
    """The families that can be converted, and what of them is not kept or must have one value, for `--list`."""
    lines = []
    for name, family in FAMILIES.items():
        kind = "dense, with --upcycle" if family.dense else "experts"
        lines.append(f"{name:20}{kind}; attention of {family.backbone}")
        lines += [f"{alias:20}as {name}, by the class in `architectures`" for alias in family.aliases]
        lines += [f"{'':20}  only `{field}={value}`" for field, value in family.required.items()]
        lines += [f"{'':20}  without `{field}`: {reason}" for field, reason in family.left_out.items()]
        lines += [f"{'':20}  without tensors: {reason}" for reason in dict.fromkeys(family.dropped_keys.values())]
    lines += [f"{alias:20}as {name}" for alias, name in ALIASES.items()]
    lines.append(f"{CoeConfig.model_type:20}back, with --to source or --to official")
    return "\n".join([*lines, f"{OFFICIAL_MODEL_TYPE:20}the official implementation's, with --to coe"])


def summarise(report: dict[str, Any]) -> str:
    """A report in some lines, to be read or pasted."""
    source, tensors, figures = report["source"], report["tensors"], report["verification"]
    inexact = "NOT exact ({}): another function, by the differences below, that has to be trained"
    details = [source[name] for name in ("model_type", "revision", "gguf_file") if source[name]]
    lines = [
        report["title"],
        "exact" if report["exact"] else inexact.format(report["explanation"]),
        *report["remarks"],
        f"source      {source['name']} ({', '.join(details)})",
        f"parameters  {report['before']['total_parameters']:,} -> {report['after']['total_parameters']:,}, active "
        f"{report['before']['active_parameters']:,} -> {report['after']['active_parameters']:,}",
        f"result      {tensors['written']:,} tensors, {tensors['bytes'] / 1e9:,.2f} GB",
        f"software    {', '.join(f'{name} {version}' for name, version in report['versions'].items())}",
        f"verified on {figures['tokens']} tokens ({figures['text']}), in {figures['precision']}",
        f"  largest difference  {figures['max_abs_difference']:.3e} (tolerance {figures['tolerance']:.1e})",
        f"  mean difference     {figures['mean_abs_difference']:.3e}",
        f"  largest logit       {figures['max_abs_logit']:.3f}",
        f"  argmax agreement    {figures['argmax_agreement']:.2%}",
    ]
    if figures["perplexity"] is not None:
        lines.append(
            f"  perplexity          {figures['perplexity']:.5g}, the source's {figures['source_perplexity']:.5g}"
        )
    return "\n".join(lines)


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Writes `conversion_report.json`."""
    (folder / model_cards.REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")


def write_card(plan: Plan, source: Source, report: dict[str, Any], folder: Path, name: str) -> None:
    """Writes README.md, the model card, with what it takes over from the source's.

    Args:
        plan (`Plan`): The conversion.
        source (`Source`): Where it is from.
        report (`dict[str, Any]`): What `make_report` returned.
        folder (`Path`): Where to write to.
        name (`str`): What the result will be called.
    """
    kept = model_cards.inherited(source.name, source.path)
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
