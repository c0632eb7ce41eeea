# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Carries a plan out: into a folder beside the target, verified there, and moved into place when all is well."""

import errno
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from tqdm import tqdm
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import CONFIG_NAME

from configuration_coe import CoeConfig
from modeling_coe import CoeForCausalLM
from modeling_coe.modeling_coe import AUTO_MAP
from modeling_coe.staging import staged_folder

from .checkpoint import (
    Checkpoint,
    ConversionError,
    Shard,
    check_finite,
    parse_size,
    shard_name,
    write_index,
    write_shard,
)
from .plan import Options, Output, Plan
from .planner import plan_conversion
from .report import make_report, write_card, write_report
from .source import copy_files, find_carried, find_source, readable
from .tensors import RANDOM_ROUTER
from .verify import Verification, compare, make_batch, mean_mlp_inputs


def convert(
    source: str | Path,
    out: str | Path,
    options: Options | None = None,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    merge_adapter: bool = False,
    verify_tokens: int = 256,
    verify_text: str | None = None,
    tolerance: float | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    push: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Converts a model and verifies the result. `out` holds all of it afterwards or, when this raises, nothing new.

    Args:
        source (`str` or `Path`): A local folder, a local GGUF file or a repository of the Hub. It is never written to.
        out (`str` or `Path`): The folder to make.
        options (`Options`, *optional*): What to make of the source.
        revision (`str`, *optional*): A branch, tag or commit of the repository.
        gguf_file (`str`, *optional*): The GGUF file of the folder or repository to read, dequantised.
        merge_adapter (`bool`, defaults to `False`): Merge the adapter that lies there into its base model first.
        verify_tokens (`int`, defaults to 256): Number of tokens to compare logits on.
        verify_text (`str`, *optional*): Where they are from, instead of the package's own text.
        tolerance (`float`, *optional*): Largest difference of a logit; by default 1e-4 times the largest logit.
        max_shard_size (`str` or `int`, defaults to `"5GB"`): Shards of the source that are larger are split.
        overwrite (`bool`, defaults to `False`): Replace the model in `out`, once the new one is complete.
        push (`str`, *optional*): A repository of the Hub to upload the result to.
        progress (`bool`, defaults to `False`): Show a bar.

    Returns:
        `dict[str, Any]`: What `conversion_report.json` holds.

    Raises:
        ConversionError: The source, the options, the result of the verification, or the disk does not allow it.
    """
    if verify_tokens < 1:
        raise ConversionError(f"`--verify {verify_tokens}`: every conversion is verified, on one token or more.")
    shard_size = parse_size(max_shard_size)
    found = find_source(source, revision, gguf_file)
    out = Path(out)
    _check_target(out, found.path, overwrite)
    if push is not None:
        _check_repository(push)
    with readable(found, existing_parent(out), merge_adapter) as source:
        plan = plan_conversion(source.path, options or Options(), source.remarks)
        carried = find_carried(source.path)
        batch = make_batch(source.path, plan.source_config, verify_tokens, verify_text)
        if any(output.rule == RANDOM_ROUTER for output in plan.outputs):
            plan.mlp_inputs |= mean_mlp_inputs(source.path, batch)
        _check_space(out, plan.nbytes)
        with _staged(out, overwrite) as staging:
            with _bar("Writing", plan.nbytes, progress) as bar:
                _write_weights(plan, staging, shard_size, bar)
            _write_config(plan, staging)
            copy_files(carried, source.path, staging)
            with _bar("Verifying", _bytes_compared(plan), progress) as bar:
                verification = compare(
                    source.path,
                    staging,
                    batch,
                    plan.options.dtype,
                    tolerance,
                    on_read=bar.update,
                    source_class=plan.source_class,
                )
            _judge(plan, verification)
            report = make_report(plan, source, verification)
            write_report(report, staging)
            write_card(plan, source, report, staging, push or out.resolve().name)
    if push is not None:
        _push(out, push)
    return report


def _bar(what: str, nbytes: int, progress: bool) -> tqdm:
    # What is not a terminal keeps all that it is shown: now and then is enough there.
    mininterval = 0.1 if sys.stderr.isatty() else 10
    return tqdm(total=nbytes, unit="B", unit_scale=True, desc=what, mininterval=mininterval, disable=not progress)


def _check_repository(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConversionError(f"`--push {name}` is no name of a repository. Write it like `user/model`.") from error


def _check_target(out: Path, source: Path, overwrite: bool) -> None:
    target, source = out.resolve(), source.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise ConversionError(f"OUT {out} and the source {source} lie in each other. Choose another OUT.")
    if not (out.exists() or out.is_symlink()):
        if not (parent := existing_parent(target)).is_dir():
            raise ConversionError(f"OUT {out} cannot be made: {parent} is a file. Choose another OUT.")
        return
    if not overwrite:
        raise ConversionError(f"OUT {out} exists. Choose another, or pass `--overwrite`.")
    if not out.is_dir() or out.is_symlink() or (any(out.iterdir()) and not (out / CONFIG_NAME).exists()):
        raise ConversionError(f"OUT {out} is no folder of a model, which is all that `--overwrite` replaces.")


def existing_parent(out: Path) -> Path:
    """The nearest folder above a target that there is."""
    return next(parent for parent in out.resolve().parents if parent.exists())


def _check_space(out: Path, needed: int) -> None:
    parent = existing_parent(out)
    if (free := shutil.disk_usage(parent).free) < needed:
        raise ConversionError(
            f"The result takes {needed / 1e9:.2f} GB, and only {free / 1e9:.2f} GB are free in {parent}."
        )


@contextmanager
def _staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """[`staged_folder`] with errors that name the remedy."""
    try:
        with staged_folder(out, overwrite) as staging:
            yield staging
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ConversionError(f"There is no room for the result ({error.strerror}). Nothing was kept.") from error
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise ConversionError(f"OUT {out} has been made by someone else meanwhile. Nothing was kept.") from error
        raise ConversionError(f"OUT {out} cannot be made ({error}). Nothing was kept. Choose another OUT.") from error


def _bytes_compared(plan: Plan) -> int:
    """What the verification reads: both models, and tied embeddings once more as the heads."""
    embeddings = [output for output in plan.outputs if output.name == "model.embed_tokens.weight"]
    again = [output.nbytes + plan.checkpoint.tensors[output.source].nbytes for output in embeddings]
    return plan.checkpoint.nbytes + plan.nbytes + (sum(again) if plan.source_config.tie_word_embeddings else 0)


def _write_weights(plan: Plan, folder: Path, max_shard_size: int, bar: tqdm) -> None:
    """Writes one shard, or several, for each of the source's, tensor by tensor."""
    # A tensor is written to one file, and read from several where it is made of slices.
    stored: dict[str, list[Output]] = {}
    for output in _in_file_order(plan):
        stored.setdefault(output.stored_name, []).append(output)
    parts: list[list[Output]] = []
    for _, tensors in groupby(stored.values(), key=lambda outputs: plan.checkpoint.tensors[outputs[0].source].file):
        size = max_shard_size
        for outputs in tensors:
            nbytes = sum(output.nbytes for output in outputs)
            if size + nbytes > max_shard_size:
                parts.append([])
                size = 0
            parts[-1] += outputs
            size += nbytes
    shards = [
        Shard(
            shard_name(i, len(parts)),
            {output.name: (output.shape, output.dtype) for output in outputs},
            {output.name: output.slice for output in outputs if output.slice is not None},
        )
        for i, outputs in enumerate(parts, start=1)
    ]
    for shard, outputs in zip(shards, parts, strict=True):
        write_shard(folder, shard, _tensors(plan.checkpoint, outputs, bar))
    if len(shards) > 1:
        write_index(folder, shards)


def _in_file_order(plan: Plan) -> list[Output]:
    order = {key: position for position, key in enumerate(plan.checkpoint.tensors)}
    return sorted(plan.outputs, key=lambda output: order[output.source])


def _tensors(checkpoint: Checkpoint, outputs: list[Output], bar: tqdm) -> Iterator[tuple[str, torch.Tensor]]:
    for key, group in groupby(outputs, key=lambda output: output.source):
        tensor = checkpoint.read(key)
        for output in group:
            made = output.make(tensor).to(output.dtype)
            if made.dtype != tensor.dtype:
                check_finite(key, made, f"{output.dtype} cannot hold its values.")
            yield output.name, made
            bar.update(made.nbytes)


def _write_config(plan: Plan, folder: Path) -> None:
    """Writes config.json and, for a chain, the code that loads it where this package is missing."""
    config = plan.config
    if isinstance(config, dict):
        if plan.options.dtype is not None:
            config["torch_dtype"] = str(plan.options.dtype).removeprefix("torch.")
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        return
    if plan.options.dtype is not None:
        config.dtype = plan.options.dtype
    if isinstance(config, CoeConfig):
        config.architectures, config.auto_map = [CoeForCausalLM.__name__], dict(AUTO_MAP)
        custom_object_save(CoeForCausalLM, folder)
    else:
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    config.save_pretrained(folder)


def _judge(plan: Plan, verification: Verification) -> None:
    if plan.exact and not verification.passed:
        raise ConversionError(f"Verification failed: {verification}. Nothing was kept.")


def _push(out: Path, repository: str) -> None:
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=out)
    except Exception as error:
        raise ConversionError(f"The result is complete in {out}, but was not uploaded: {error}") from error
