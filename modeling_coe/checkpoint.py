# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What a complete checkpoint of a Chain-of-Experts model holds, by the names of its tensors."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .configuration_coe import CoeConfig
from .state_dict import FUSED_PROJECTIONS


_LAYER_KEY = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
# What a sparse layer has a fixed number of: routers, experts, shared ones too, scales, and norms of iterations.
_COUNTED_KEY = re.compile(r"mlp\.(gate|experts|shared_experts)\.|(iteration_scale|iteration_norms|branch_norms)\.")
# What the official conversion script adds to a layer, whose chain has equations of its own then.
SCRIPT_KEY = re.compile(r"(?:mlp\.)?(?:coe_weight|coe_weights\.\d+)")


def read_keys(checkpoint_files: Iterable[str | Path]) -> list[str]:
    """Names of the tensors in some safetensors files that have elements. The official code stores shared experts of
    width 0 where there are none.

    Raises:
        OSError: A file is truncated or not in the safetensors format; the message names it.
    """
    keys: list[str] = []
    for file in checkpoint_files:
        if not str(file).endswith(".safetensors"):
            raise OSError(f"The weight file '{file}' is not a safetensors file. Only these are read; convert it.")
        try:
            with safe_open(file, framework="pt") as tensors:
                keys.extend(key for key in tensors.keys() if 0 not in tensors.get_slice(key).get_shape())  # noqa: SIM118
        except SafetensorError as error:
            raise OSError(
                f"The weight file '{file}' is truncated or damaged ({error}). Save or download it again."
            ) from error
    return keys


def shorten(names: Iterable[str], limit: int = 4) -> str:
    """The first names of a list, and how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def expected_keys(config: CoeConfig, layer_idx: int, fused: bool) -> set[str]:
    """Names of what makes sparse layer `layer_idx` a chain (routers, experts, scales, norms), in the fused layout or
    in the official one."""
    iterations = config.num_iterations(layer_idx)
    routers = [f"mlp.gate.{t}" for t in range(iterations)] if config.use_igate else ["mlp.gate"]
    keys = {f"{router}.weight" for router in routers}
    if config.topk_method == "noaux_tc":
        keys |= {f"{router}.e_score_correction_bias" for router in routers}
    if config.shared_expert_width:
        kinds = ("weight", "bias") if config.mlp_bias else ("weight",)
        keys |= {f"mlp.shared_experts.{part}_proj.{kind}" for part in ("gate", "up", "down") for kind in kinds}
    if config.upcycling is not None and iterations > 1:
        keys.add("iteration_scale.weight")
    if config.iteration_norm:
        keys |= {f"iteration_norms.{t}.weight" for t in range(iterations - 1)}
    if config.branch_norm:
        keys |= {f"branch_norms.{t}.weight" for t in range(iterations)}
    for name, projections in FUSED_PROJECTIONS.items():
        if fused:
            keys.add(f"mlp.experts.{name}")
        else:
            for expert in range(config.n_routed_experts):
                keys |= {f"mlp.experts.{expert}.{projection}.weight" for projection in projections}
    return keys


def check_chain_keys(keys: Iterable[str], config: CoeConfig) -> None:
    """Checks that a checkpoint has exactly the routers and experts of every sparse layer, in the official layout (one
    tensor per expert and projection) or in the fused one (one 3D tensor for all experts).

    Without this check a missing router would be drawn at random, with only a warning. A checkpoint without any layer
    is left to transformers, which reports every weight as missing.

    Args:
        keys (`Iterable[str]`): Names of the checkpoint's tensors.
        config (`CoeConfig`): Configuration of the model they are for.

    Raises:
        ValueError: Names the layers and tensors that are missing or too many, and the fields to look at. Or the
            official conversion script has written the checkpoint.
    """
    found: dict[int, set[str]] = defaultdict(set)
    for key in keys:
        if match := _LAYER_KEY.search(key):
            found[int(match[1])].add(match[2])
            if SCRIPT_KEY.fullmatch(match[2]):
                raise ValueError(
                    f"The checkpoint has `{key}`, which scales what an iteration sees of the one before it: the "
                    "official conversion script wrote it, and its chain is not what the configuration says. Convert "
                    "it with `coe-convert`."
                )
    if not found:
        return

    problems = []
    for layer_idx in config.sparse_layers:
        names = found[layer_idx]
        fused = any(f"mlp.experts.{name}" in names for name in FUSED_PROJECTIONS)
        expected = expected_keys(config, layer_idx, fused)
        counted = {name for name in names if _COUNTED_KEY.match(name)}
        for kind, wrong in (("lacks", expected - names), ("has, beyond the model's,", counted - expected)):
            if wrong:
                problems.append(f"layers.{layer_idx} {kind} {shorten(sorted(wrong))}")
    if problems:
        raise ValueError(
            "The checkpoint does not fit its configuration:\n  "
            + "\n  ".join(problems)
            + f"\nThe configuration asks for `n_routed_experts={config.n_routed_experts}`, "
            f"`n_shared_experts={config.n_shared_experts}` and `inner_iter={config.inner_iter}` with "
            f"`use_igate={config.use_igate}` (routers {'gate.0 ... gate.C-1' if config.use_igate else 'gate'}). "
            "Correct these fields or the checkpoint, or pass `ignore_mismatched_sizes=True` to drop what is too much "
            "and to draw what is missing at random."
        )
