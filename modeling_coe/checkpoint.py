# Copyright 2026 The CoE Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Checkpoints of Chain-of-Experts models: what a complete one holds, and how one is written without halves."""

import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME

from .configuration_coe import CoeConfig


_LAYER_KEY = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
_EXPERT_KEY = re.compile(r"mlp\.experts\.\d+\.")
_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_FUSED_EXPERTS = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


def read_keys(checkpoint_files: Iterable[str | Path]) -> list[str]:
    """Names of all tensors in some safetensors files.

    Raises:
        OSError: A file is truncated or not in the safetensors format; the message names it.
    """
    keys: list[str] = []
    for file in checkpoint_files:
        try:
            with safe_open(file, framework="pt") as tensors:
                keys.extend(tensors.keys())
        except SafetensorError as error:
            raise OSError(
                f"The weight file '{file}' is truncated or damaged: not a complete safetensors file ({error}). "
                "Save or download it again."
            ) from error
    return keys


def check_chain_keys(keys: Iterable[str], config: CoeConfig) -> None:
    """Checks that a checkpoint has every router and exactly the experts of every sparse layer, in the official layout
    (one tensor per expert and projection) or in the fused one (one 3D tensor for all experts).

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

    experts = {
        f"mlp.experts.{expert}.{projection}.weight"
        for expert in range(config.n_routed_experts or 0)
        for projection in ("gate_proj", "up_proj", "down_proj")
    }
    routers = {f"mlp.gate.{t}.weight" for t in range(config.inner_iter)} if config.use_igate else {"mlp.gate.weight"}
    problems = []
    for layer_idx in filter(config.is_sparse_layer, range(config.num_hidden_layers)):
        names = found[layer_idx]
        fused = bool(names & _FUSED_EXPERTS)
        extra = {name for name in names if _EXPERT_KEY.match(name)} - (set() if fused else experts)
        for kind, wrong in (
            ("lacks", (routers | (_FUSED_EXPERTS if fused else experts)) - names),
            ("has, beyond the model's,", extra),
        ):
            if wrong:
                shown = ", ".join(sorted(wrong)[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
                problems.append(f"layers.{layer_idx} {kind} {shown}")
    if problems:
        raise ValueError(
            "The checkpoint does not fit its configuration:\n  "
            + "\n  ".join(problems)
            + f"\nThe configuration asks for `n_routed_experts={config.n_routed_experts}` and "
            f"`inner_iter={config.inner_iter}` with `use_igate={config.use_igate}` "
            f"(routers {'gate.0 ... gate.C-1' if config.use_igate else 'gate'}). Correct these fields or the "
            "checkpoint, or pass `ignore_mismatched_sizes=True` to draw what does not fit at random."
        )


@contextmanager
def staged_directory(target: str | Path) -> Iterator[Path]:
    """Lets a folder be written whole or not at all.

    Yields an empty folder beside `target`. When the block ends its files replace those of `target`, weight files of an
    older save included; when it raises, they are deleted and `target` is as it was. While an existing folder is being
    replaced it has no `config.json`, so that it does not load.
    """
    target = Path(target).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".partial", dir=target.parent))
    try:
        yield staging
        target.mkdir(exist_ok=True)
        # The configuration comes last, and its predecessor goes first.
        files = sorted(staging.iterdir(), key=lambda file: file.name == CONFIG_NAME)
        names = {file.name for file in files}
        if CONFIG_NAME in names:
            (target / CONFIG_NAME).unlink(missing_ok=True)
        if any(_WEIGHT_FILE.fullmatch(name) for name in names):
            for stale in target.iterdir():
                if _WEIGHT_FILE.fullmatch(stale.name) and stale.name not in names:
                    stale.unlink()
        for file in files:
            file.replace(target / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
