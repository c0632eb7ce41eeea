# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Checkpoints as folders of safetensors files, read and written one tensor at a time."""

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers.modeling_utils import _get_resolved_checkpoint_files
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from modeling_coe.checkpoint import shorten

from . import fp8
from .errors import ConversionError


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class StoredTensor(NamedTuple):
    """What the header of a file says about a tensor. A weight in FP8 has the dtype that it becomes."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Checkpoint:
    """The weights of a folder. Opening it checks all files' headers; tensors are read when they are asked for. Weights
    in FP8 are what they stand for, and their scales belong to them.

    Args:
        folder: A folder with `config.json` and the safetensors files that transformers would read there.

    Raises:
        ConversionError: A file is missing, truncated, damaged, or not what the index says; or it is quantised in
            another way.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config_dict = read_json(folder / CONFIG_NAME)
        if (folder / ADAPTER_CONFIG_NAME).exists():
            raise ConversionError(
                f"There is an {ADAPTER_CONFIG_NAME} in {folder}: transformers adds an adapter to the weights. Pass "
                "`--merge-adapter` to merge it into them first, or remove it from (a copy of) the folder."
            )
        self.block_scaling = fp8.BlockScaling.of(self.config_dict)
        self._files: dict[str, safe_open] = {}
        self._stored: dict[str, StoredTensor] = {}
        listed = self._find_files()
        # The index may be wrong about which of its files holds a tensor: transformers reads all that they hold.
        if lost := sorted(listed.keys() - self._stored.keys()):
            raise ConversionError(
                f"{listed[lost[0]]} lacks tensors that the index lists in it: {shorten(lost)}. Download it again."
            )
        self.scales = self._find_scales()
        belonging = set(self.scales.values())
        self.tensors = {
            key: tensor._replace(dtype=self.block_scaling.dtype) if key in self.scales else tensor
            for key, tensor in self._stored.items()
            if key not in belonging
        }

    @property
    def nbytes(self) -> int:
        """Size of all that the files hold."""
        return sum(tensor.nbytes for tensor in self._stored.values())

    def nbytes_of(self, key: str) -> int:
        """Size of a tensor in the files, with its scales."""
        return sum(self._stored[name].nbytes for name in (key, self.scales.get(key)) if name is not None)

    def read(self, key: str) -> torch.Tensor:
        """One tensor, in memory of its own and as it is stored; what a weight in FP8 stands for is in float32.

        Raises:
            ConversionError: It holds NaN or infinity.
        """
        tensor = self._read(key)
        if key in self.scales:
            tensor = self.block_scaling.dequantize(tensor, self._read(self.scales[key]))
        check_finite(key, tensor)
        return tensor

    def differs(self, one: str, other: str, rows: int = 4096) -> bool:
        """Whether two tensors are not bit by bit the same, without reading them as a whole."""
        if self.tensors[one][1:] != self.tensors[other][1:]:
            return True
        if one in self.scales or other in self.scales:
            return not torch.equal(self.read(one), self.read(other))
        length = self.tensors[one].shape[0]
        parts = (slice(start, min(start + rows, length)) for start in range(0, length, rows))
        return not all(torch.equal(self._read(one, part), self._read(other, part)) for part in parts)

    def _read(self, key: str, rows: slice | None = None) -> torch.Tensor:
        file = self._stored[key].file
        try:
            opened = self._files[file]
            return opened.get_tensor(key) if rows is None else opened.get_slice(key)[rows]
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"`{key}` cannot be read from {file} ({error}).") from error

    def _find_files(self) -> dict[str, str]:
        """Opens the files that transformers reads, which it chooses itself. Returns what their index, if any, says:
        tensors -> names of files."""
        explicit = self.config_dict.get("transformers_weights")
        if not isinstance(explicit, str | None):
            raise ConversionError(
                f"`transformers_weights` in {CONFIG_NAME} is {explicit!r}, no name of a file. Correct or remove it."
            )
        try:
            paths, index = _get_resolved_checkpoint_files(
                str(self.folder),
                variant=None,
                gguf_file=None,
                use_safetensors=None,
                user_agent=None,
                is_remote_code=False,
                transformers_explicit_filename=explicit,
            )
        except Exception as error:
            raise self._explain(explicit, error) from error
        files = [os.path.relpath(path, self.folder) for path in paths]
        if not files:
            raise ConversionError(f"The index of the weights in {self.folder} lists no files. Download it again.")
        if wrong := [file for file in files if not file.endswith(".safetensors")]:
            raise ConversionError(
                f"The weights in {self.folder} are {shorten(wrong)}. Only safetensors are read. {self._resave}"
            )
        if missing := [file for file in files if not (self.folder / file).is_file()]:
            raise ConversionError(
                f"{len(missing)} of {len(files)} weight files are missing in {self.folder}: {shorten(missing)}. "
                "Download them again."
            )
        for file in files:
            self._add_file(file)
        return {} if index is None else index["weight_map"]

    def _explain(self, explicit: str | None, error: Exception) -> ConversionError:
        """Why transformers does not find the weights."""
        if explicit is not None and not explicit.endswith((".safetensors", ".safetensors.index.json")):
            return ConversionError(
                f"`transformers_weights` in {CONFIG_NAME} is {explicit!r}, neither a safetensors file nor an index of "
                "some. Correct or remove it."
            )
        index = self.folder / (explicit or SAFE_WEIGHTS_INDEX_NAME)
        if index.is_file() and index.name.endswith(".json"):
            content = read_json(index)
            for name in ("metadata", "weight_map"):
                if not isinstance(content.get(name), dict):
                    return ConversionError(f"{index.name} has no object `{name}`. Download it again, or correct it.")
            wrong = {name: file for name, file in content["weight_map"].items() if not isinstance(file, str)}
            if wrong:
                name, file = next(iter(wrong.items()))
                return ConversionError(
                    f"`weight_map` in {index.name} says that `{name}` is in {file!r}, which is no name of a file. "
                    "Correct it, or download it again."
                )
        elif explicit is not None:
            return ConversionError(f"`transformers_weights` in {CONFIG_NAME} is {explicit!r}: {error}. Correct it.")
        if isinstance(error, OSError):
            return ConversionError(
                f"There is neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME} in {self.folder}. Only "
                f"safetensors are read. {self._resave}"
            )
        return ConversionError(
            f"transformers does not find the weights in {self.folder} ({type(error).__name__}: {error}). Correct "
            f"{index.name}."
        )

    @property
    def _resave(self) -> str:
        """How safetensors are made of weights that transformers can read, or what GGUF files are read with."""
        if gguf := sorted(self.folder.glob("*.gguf")):
            return f"Read {gguf[0].name} with `--gguf-file {gguf[0].name}`."
        load = f"M.from_pretrained('{self.folder}', dtype='auto').save_pretrained('NEW')"
        return f'Make them: `python -c "from transformers import AutoModelForCausalLM as M; {load}"`.'

    def _add_file(self, file: str) -> None:
        try:
            # Not memory-mapped: mapped pages would count as this process' memory until the file is closed.
            opened = safe_open(self.folder / file, framework="pt", backend="pread")
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{file} is truncated or damaged ({error}). Download it again.") from error
        self._files[file] = opened
        keys = opened.keys()
        for key in keys:
            header = opened.get_slice(key)
            if key in self._stored:
                raise ConversionError(
                    f"`{key}` is in two files, {self._stored[key].file} and {file}. Remove it from one of them."
                )
            code, dtypes = header.get_dtype(), DTYPES if self.block_scaling is None else DTYPES | fp8.DTYPES
            if code not in dtypes:
                raise ConversionError(
                    f"`{key}` is stored as {code}: the source is quantised, or is not made of weights "
                    f"only. Convert the original weights, in one of {', '.join(DTYPES)}."
                )
            self._stored[key] = StoredTensor(file, tuple(header.get_shape()), dtypes[code])

    def _find_scales(self) -> dict[str, str]:
        """Weights in FP8 -> the tensors with their scales, wherever those are stored."""
        if self.block_scaling is None:
            return {}
        weights = {key: tensor for key, tensor in self._stored.items() if tensor.dtype in fp8.DTYPES.values()}
        scales = {f"{key}{fp8.SCALES}": key for key in weights}
        if lost := sorted(scales.keys() - self._stored.keys()):
            raise ConversionError(f"Weights in FP8 lack their scales {shorten(lost)}. Download the source again.")
        if lone := [key for key in self._stored if key.endswith(fp8.SCALES) and key not in scales]:
            raise ConversionError(
                f"There are scales of what is no weight in FP8: {shorten(lone)}. Download the source again."
            )
        for scale, key in scales.items():
            shape, found = weights[key].shape, self._stored[scale].shape
            if len(shape) != 2:
                raise ConversionError(f"`{key}` is in FP8 and {list(shape)}. Only matrices in FP8 are converted.")
            if found != (wanted := self.block_scaling.scales_shape(shape)):
                raise ConversionError(
                    f"`{scale}` is {list(found)}, but `quantization_config.weight_block_size="
                    f"{list(self.block_scaling.block)}` makes {list(wanted)} of `{key}` {list(shape)}. Correct it, or "
                    "download the source again."
                )
        return {key: scale for scale, key in scales.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConversionError: There is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"There is no {path.name} in {path.parent}. Choose another folder.") from None
    except OSError as error:
        raise ConversionError(
            f"{path.name} in {path.parent} cannot be read ({error.strerror}). Download it again."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConversionError(
            f"{path.name} in {path.parent} is not valid JSON ({error}). Correct it, or download it again."
        ) from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path.name} in {path.parent} is not a JSON object. Correct it, or download it again.")
    return content


def check_finite(key: str, tensor: torch.Tensor, remedy: str = "The source is damaged.") -> None:
    """Raises `ConversionError` where a tensor holds NaN or infinity. Makes no copy."""
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
        raise ConversionError(f"`{key}` holds NaN or infinity. {remedy}")


def stored_dtype(name: str, dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """What a tensor of some dtype is stored as where `wanted` is asked for."""
    # transformers keeps selection biases in float32: they are compared with scores that differ little.
    return dtype if wanted is None or name.endswith("e_score_correction_bias") else wanted


class Slice(NamedTuple):
    """Where in a larger tensor one is stored, in one piece."""

    whole: str
    shape: tuple[int, ...]  # of the whole
    offset: int  # elements of it that come before


class Shard(NamedTuple):
    """A file to be written: its name, the tensors that will come, and which of them are slices of what is stored."""

    name: str
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    slices: dict[str, Slice]

    @property
    def nbytes(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors.values())

    @property
    def stored(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The tensors of the file."""
        stored = {}
        for name, (shape, dtype) in self.tensors.items():
            piece = self.slices.get(name)
            stored[name if piece is None else piece.whole] = (shape if piece is None else piece.shape, dtype)
        return stored


def write_shard(folder: Path, shard: Shard, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Writes a safetensors file from tensors, or slices of some, that come one by one, in any order: no more than one
    is in memory.

    safetensors' own `save_file` takes all tensors of a file at once.
    """
    # The widest come first, so that all of them are aligned.
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype) in sorted(shard.stored.items(), key=lambda item: -item[1][1].itemsize):
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(folder / shard.name, "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        missing = set(shard.tensors)
        for name, tensor in tensors:
            missing.remove(name)
            if (tuple(tensor.shape), tensor.dtype) != shard.tensors[name]:
                raise ConversionError(
                    f"`{name}` came out as {tensor.dtype} {tuple(tensor.shape)}, planned was {shard.tensors[name]}."
                )
            stored, _, before = shard.slices.get(name, (name, None, 0))
            stream.seek(8 + len(encoded) + header[stored]["data_offsets"][0] + before * tensor.itemsize)
            if tensor.numel():
                stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy())
        if missing:
            raise ConversionError(f"{shard.name} lacks {shorten(sorted(missing))}.")


def write_index(folder: Path, shards: list[Shard]) -> None:
    """Writes the index of a checkpoint of several files."""
    index = {
        "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
        "weight_map": {name: shard.name for shard in shards for name in shard.stored},
    }
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def shard_name(number: int, total: int) -> str:
    """transformers' name of a weight file, from 1."""
    if total == 1:
        return SAFE_WEIGHTS_NAME
    return SAFE_WEIGHTS_NAME.replace(".safetensors", f"-{number:05d}-of-{total:05d}.safetensors")


def parse_size(size: str | int) -> int:
    """Bytes of a size such as `5GB` or `300MB`.

    Raises:
        ConversionError: It is not one.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(size).strip().upper())
    if not match or not 0 < float(match[1]) < math.inf:
        raise ConversionError(f"`--max-shard-size {size}` is not a size. Write it like `5GB` or `300MB`.")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))
