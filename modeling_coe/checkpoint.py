# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Checkpoints of Chain-of-Experts models: what a complete one holds, and how one is written without halves."""

import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import CONFIG_NAME

from .configuration_coe import CoeConfig


_LAYER_KEY = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
# What a sparse layer has a fixed number of: routers, experts and scales.
_COUNTED_KEY = re.compile(r"mlp\.(gate|experts)\.|iteration_scale\.")
# Fused parameter -> the projections it concatenates, under their names in the official layout.
_FUSED_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_WEIGHT_FILE = re.compile(
    r"model(?:\.(?P<variant>[\w-]+?))?(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index(?:\.(?P<of_index>[\w-]+))?\.json)?"
)


@torch.no_grad()
def fuse_expert_weights(
    experts: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Lets `load_state_dict` read the official layout too, one tensor per expert and projection.

    A pre-hook of the experts module. `from_pretrained` converts the layout by itself; `Trainer` resumes a run, and
    loads the best checkpoint at its end, with `load_state_dict` on the file as it is. What torch promises holds as if
    every tensor of an expert were a parameter: those that a state dict lacks (a shard holds only some) stay as they
    are and are missing, those of another shape are errors, and `assign=True` takes the stored dtype and device.
    """
    assign = local_metadata.get("assign_to_params_buffers", False)
    for name, projections in _FUSED_PROJECTIONS.items():
        parameter = getattr(experts, name).detach()
        shape = torch.Size((parameter.shape[1] // len(projections), parameter.shape[2]))
        keys = [f"{prefix}{e}.{projection}.weight" for e in range(len(parameter)) for projection in projections]
        stored = {key: state_dict[key] for key in keys if key in state_dict}
        if not stored or prefix + name in state_dict:
            continue
        missing = [key for key in keys if key not in stored]
        if strict:
            missing_keys += missing
        if missing and parameter.is_meta:
            continue  # there is nothing to complete them with: torch calls them unexpected, and the parameter missing
        wrong = [key for key, tensor in stored.items() if tensor.shape != shape]
        error_msgs += [
            f"size mismatch for {key}: the shape is {list(stored[key].shape)} in the checkpoint and {list(shape)} in "
            "the current model."
            for key in wrong
        ]
        fused = parameter
        if not wrong:
            dtypes = {tensor.dtype for tensor in stored.values()} | ({parameter.dtype} if missing else set())
            dtype = reduce(torch.promote_types, dtypes) if assign else parameter.dtype
            device = next(iter(stored.values())).device if assign or parameter.is_meta else parameter.device
            fused = torch.empty(parameter.shape, dtype=dtype, device=device)
            if missing:
                fused.copy_(parameter)
            for key, matrix in zip(keys, fused.view(len(keys), *shape), strict=True):
                if key in stored:
                    matrix.copy_(stored[key])
        for key in stored:
            del state_dict[key]
        state_dict[prefix + name] = fused


def rename_iteration_scale(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets `load_state_dict` read scales under their name on disk: a pre-hook of the layer, see above."""
    name = f"{prefix}iteration_scale"
    if name in state_dict:
        state_dict.setdefault(f"{name}.weight", state_dict.pop(name))


def read_keys(checkpoint_files: Iterable[str | Path]) -> list[str]:
    """Names of all tensors in some safetensors files.

    Raises:
        OSError: A file is truncated or not in the safetensors format; the message names it.
    """
    keys: list[str] = []
    for file in checkpoint_files:
        if not str(file).endswith(".safetensors"):
            raise OSError(f"The weight file '{file}' is not a safetensors file. Only these are read; convert it.")
        try:
            with safe_open(file, framework="pt") as tensors:
                keys.extend(tensors.keys())
        except SafetensorError as error:
            raise OSError(
                f"The weight file '{file}' is truncated or damaged ({error}). Save or download it again."
            ) from error
    return keys


def expected_keys(config: CoeConfig, layer_idx: int, fused: bool) -> set[str]:
    """Names of what makes sparse layer `layer_idx` a chain (routers, experts, scales), in the fused layout or in the
    official one."""
    iterations = config.num_iterations(layer_idx)
    routers = [f"mlp.gate.{t}" for t in range(iterations)] if config.use_igate else ["mlp.gate"]
    keys = {f"{router}.weight" for router in routers}
    if config.topk_method == "noaux_tc":
        keys |= {f"{router}.e_score_correction_bias" for router in routers}
    if config.shared_expert_width:
        keys |= {f"mlp.shared_experts.{projection}_proj.weight" for projection in ("gate", "up", "down")}
    if config.upcycling is not None and iterations > 1:
        keys.add("iteration_scale.weight")
    for name, projections in _FUSED_PROJECTIONS.items():
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
        ValueError: Names the layers and tensors that are missing or too many, and the fields to look at.
    """
    found: dict[int, set[str]] = defaultdict(set)
    for key in keys:
        if match := _LAYER_KEY.search(key):
            found[int(match[1])].add(match[2])
    if not found:
        return

    problems = []
    for layer_idx in config.sparse_layers:
        names = found[layer_idx]
        fused = any(f"mlp.experts.{name}" in names for name in _FUSED_PROJECTIONS)
        expected = expected_keys(config, layer_idx, fused)
        counted = {name for name in names if _COUNTED_KEY.match(name)}
        for kind, wrong in (("lacks", expected - names), ("has, beyond the model's,", counted - expected)):
            if wrong:
                shown = ", ".join(sorted(wrong)[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
                problems.append(f"layers.{layer_idx} {kind} {shown}")
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


def _weight_variant(name: str) -> str | None:
    """The variant a weight file belongs to (`""` for the plain one), or `None` for other files."""
    match = _WEIGHT_FILE.fullmatch(name)
    return None if match is None else match["variant"] or match["of_index"] or ""


@contextmanager
def staged_directory(target: str | Path) -> Iterator[Path]:
    """Lets a folder be written whole or not at all.

    Yields an empty hidden folder inside `target`. When the block ends its files replace those of `target`, all weight
    files of an older save included. When the block or the replacing raises, `target` is as it was. While files are
    being replaced there is no `config.json`, so that a process killed then leaves nothing that loads.
    """
    target = Path(target)
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=target))
    replaced = Path(tempfile.mkdtemp(prefix=".", suffix=".replaced", dir=target))
    moves: list[tuple[Path, Path]] = []

    def move(file: Path, folder: Path) -> None:
        moves.append((file, folder / file.name))
        file.replace(folder / file.name)

    try:
        yield staging
        # The old configuration goes first, the new one comes last.
        new = sorted(staging.iterdir(), key=lambda file: file.name == CONFIG_NAME)
        names = {file.name for file in new}
        variants = {_weight_variant(name) for name in names} - {None}
        old = [file for file in target.iterdir() if file.name in names or _weight_variant(file.name) in variants]
        for file in sorted(old, key=lambda file: file.name != CONFIG_NAME):
            move(file, replaced)
        for file in new:
            move(file, target)
    except BaseException:
        for source, destination in reversed(moves):
            if destination.exists():
                destination.replace(source)
        raise
    finally:
        for folder in (staging, replaced):
            shutil.rmtree(folder, ignore_errors=True)
        if is_new and not any(target.iterdir()):
            target.rmdir()
