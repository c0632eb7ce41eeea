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
"""Checkpoints as folders of safetensors files, read and written one tensor at a time."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


class ConversionError(ValueError):
    """Why a conversion cannot be done, in words for whoever asked for it."""


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class StoredTensor(NamedTuple):
    """What the header of a file says about a tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Checkpoint:
    """The weights of a folder. Opening it checks all files' headers; tensors are read when they are asked for.

    Args:
        folder: A folder with `config.json` and either `model.safetensors` or shards and their index.

    Raises:
        ConversionError: A file is missing, truncated, damaged, or not what the index says; or it is quantised.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config_dict = self._read_json(CONFIG_NAME)
        if any(self.config_dict.get(name) for name in ("quantization_config", "compression_config")):
            raise ConversionError(
                "The source is quantised (`quantization_config` in its config.json). Convert the original weights in "
                "float32, bfloat16 or float16."
            )
        self._files: dict[str, safe_open] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for file, listed in self._listed_files().items():
            self._add_file(file, listed)

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read(self, key: str) -> torch.Tensor:
        """One tensor, in memory of its own.

        Raises:
            ConversionError: It holds NaN or infinity.
        """
        tensor = self._read(key)
        check_finite(key, tensor)
        return tensor

    def differs(self, one: str, other: str, rows: int = 4096) -> bool:
        """Whether two tensors are not bit by bit the same, without reading them as a whole."""
        if self.tensors[one][1:] != self.tensors[other][1:]:
            return True
        length = self.tensors[one].shape[0]
        parts = (slice(start, min(start + rows, length)) for start in range(0, length, rows))
        return not all(torch.equal(self._read(one, part), self._read(other, part)) for part in parts)

    def _read(self, key: str, rows: slice | None = None) -> torch.Tensor:
        file = self.tensors[key].file
        try:
            opened = self._files[file]
            return opened.get_tensor(key) if rows is None else opened.get_slice(key)[rows]
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"`{key}` cannot be read from {file} ({error}).") from error

    def _read_json(self, name: str) -> dict:
        try:
            content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConversionError(f"There is no {name} in {self.folder}.") from None
        except ValueError as error:
            raise ConversionError(f"{name} in {self.folder} is not valid JSON ({error}).") from error
        if not isinstance(content, dict):
            raise ConversionError(f"{name} in {self.folder} is not a JSON object.")
        return content

    def _listed_files(self) -> dict[str, set[str]]:
        """Names of the weight files -> the tensors that the index promises in them."""
        if (self.folder / SAFE_WEIGHTS_INDEX_NAME).exists():
            listed: dict[str, set[str]] = {}
            for key, file in self._read_json(SAFE_WEIGHTS_INDEX_NAME).get("weight_map", {}).items():
                listed.setdefault(file, set()).add(key)
            if missing := sorted(file for file in listed if not (self.folder / file).is_file()):
                raise ConversionError(
                    f"{len(missing)} of {len(listed)} shards that {SAFE_WEIGHTS_INDEX_NAME} lists are missing: "
                    f"{shorten(missing)}. Download them again."
                )
            return dict(sorted(listed.items()))
        if (self.folder / SAFE_WEIGHTS_NAME).exists():
            return {SAFE_WEIGHTS_NAME: set()}
        raise ConversionError(
            f"There is neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME} in {self.folder}. Only safetensors "
            "are read; load the model with transformers and save it to get them."
        )

    def _add_file(self, file: str, listed: set[str]) -> None:
        try:
            # Not memory-mapped: mapped pages would count as this process' memory until the file is closed.
            opened = safe_open(self.folder / file, framework="pt", backend="pread")
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{file} is truncated or damaged ({error}). Download it again.") from error
        self._files[file] = opened
        keys = opened.keys()
        if missing := sorted(listed - set(keys)):
            raise ConversionError(f"{file} lacks tensors that the index lists in it: {shorten(missing)}.")
        for key in keys:
            header = opened.get_slice(key)
            if key in self.tensors:
                raise ConversionError(f"`{key}` is in two files, {self.tensors[key].file} and {file}.")
            if header.get_dtype() not in DTYPES:
                raise ConversionError(
                    f"`{key}` is stored as {header.get_dtype()}: the source is quantised, or is not made of weights "
                    f"only. Convert the original weights, in one of {', '.join(DTYPES)}."
                )
            self.tensors[key] = StoredTensor(file, tuple(header.get_shape()), DTYPES[header.get_dtype()])


def check_finite(key: str, tensor: torch.Tensor, remedy: str = "The source is damaged.") -> None:
    """Raises `ConversionError` where a tensor holds NaN or infinity. Makes no copy."""
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
        raise ConversionError(f"`{key}` holds NaN or infinity. {remedy}")


def stored_dtype(name: str, dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """What a tensor of some dtype is stored as where `wanted` is asked for."""
    # transformers keeps selection biases in float32: they are compared with scores that differ little.
    return dtype if wanted is None or name.endswith("e_score_correction_bias") else wanted


class Shard(NamedTuple):
    """A file to be written: its name and its tensors, in the order in which they will come."""

    name: str
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]

    @property
    def nbytes(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors.values())


def write_shard(folder: Path, shard: Shard, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Writes a safetensors file from tensors that come one by one, in any order: no more than one is in memory.

    safetensors' own `save_file` takes all tensors of a file at once.
    """
    # The widest come first, so that all of them are aligned.
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype) in sorted(shard.tensors.items(), key=lambda item: -item[1][1].itemsize):
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
            stream.seek(8 + len(encoded) + header[name]["data_offsets"][0])
            if tensor.numel():
                stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy())
        if missing:
            raise ConversionError(f"{shard.name} lacks {shorten(sorted(missing))}.")


def write_index(folder: Path, shards: list[Shard]) -> None:
    """Writes the index of a checkpoint of several files."""
    index = {
        "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
        "weight_map": {name: shard.name for shard in shards for name in shard.tensors},
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
    if not match or not float(match[1]) > 0:
        raise ConversionError(f"`{size}` is not a size. Write it like `5GB` or `300MB`.")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))


def shorten(names: Iterable[str], limit: int = 4) -> str:
    """The first names of a list, and how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
