# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Sources as people have them: a folder, a repository of the Hub, a GGUF file, or an adapter with its base model.

The rest of the package reads folders of safetensors. What is none becomes one first, by transformers and PEFT, in a
folder that is removed afterwards.
"""

import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.constants import REPOCARD_NAME
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from .checkpoint import ConversionError, read_json, shorten
from .errors import kind_and_message


# Everything beside weights, config.json and code that belongs to a model.
CARRIED_FILES = (
    "tokenizer*",
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "generation_config.json",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
)
_ADAPTER_FILES = "adapter_*"
_WEIGHT_FILES = ("model*.safetensors", SAFE_WEIGHTS_INDEX_NAME)


class Source(NamedTuple):
    """A source on this machine.

    Args:
        path: A folder with config.json, weights, and what else belongs to the model; or a GGUF file that is all of it.
        name: What it is called, without local paths.
        revision: The commit, of a repository of the Hub.
        gguf_file: The name of the GGUF file to read, where the weights are in one.
        remarks: What was done to make a readable folder of it.
    """

    path: Path
    name: str
    revision: str | None = None
    gguf_file: str | None = None
    remarks: tuple[str, ...] = ()


def find_source(source: str | Path, revision: str | None = None, gguf_file: str | None = None) -> Source:
    """Finds a source, and downloads it where it is a repository of the Hub.

    Args:
        source (`str` or `Path`): A local folder, a local GGUF file, or a repository of the Hub.
        revision (`str`, *optional*): A branch, tag or commit of the repository.
        gguf_file (`str`, *optional*): The GGUF file of the folder or the repository to read, as transformers calls it.

    Raises:
        ConversionError: There is none.
    """
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        found = Source(path, path.resolve().name, gguf_file=path.name)
    elif path.is_dir():
        found = Source(path, path.resolve().name, gguf_file=gguf_file)
    elif path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)) or str(source).startswith("."):
        raise ConversionError(
            f"SOURCE {source} is neither a folder, nor a GGUF file, nor the name of a repository of the Hub. Choose "
            "one."
        )
    else:
        folder = _download(str(source), revision, _WEIGHT_FILES if gguf_file is None else (gguf_file,))
        found = Source(folder, str(source), folder.name, gguf_file)
    if found.path.is_dir() and gguf_file is not None and not (found.path / gguf_file).is_file():
        raise ConversionError(f"There is no {gguf_file} in {source}. Choose another `--gguf-file`.")
    if found.revision is None and revision is not None:
        raise ConversionError(f"`--revision {revision}` is of a repository of the Hub; {source} is not. Leave it.")
    return found


def _download(repository: str, revision: str | None, weight_files: tuple[str, ...]) -> Path:
    patterns = [CONFIG_NAME, _ADAPTER_FILES, REPOCARD_NAME, *CARRIED_FILES, *weight_files]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # offline, not found, gated, disk full: the message of the Hub says which
        raise ConversionError(
            f"{repository} is no local folder, and the Hub does not give it: {kind_and_message(error)}"
        ) from error


@contextmanager
def readable(source: Source, scratch: Path, merge_adapter: bool = False) -> Iterator[Source]:
    """Makes a folder of safetensors of a GGUF file, or of an adapter and its base model, for the time of the block.
    Other sources are what they are.

    Args:
        source (`Source`): What [`find_source`] found. It is never written to.
        scratch (`Path`): An existing folder to make that one in. There must be room for the whole model.
        merge_adapter (`bool`, defaults to `False`): Merge the adapter that lies there into its base model: that of the
            same folder or, where it holds none, the one that the adapter names.

    Raises:
        ConversionError: transformers or PEFT cannot read it.
    """
    if source.gguf_file is not None and merge_adapter:
        raise ConversionError("`--merge-adapter` needs a base model in safetensors. Leave it, or the GGUF file, out.")
    if source.gguf_file is None and not merge_adapter:
        yield source
        return
    try:
        folder = tempfile.TemporaryDirectory(prefix=".", suffix=".source", dir=scratch)
    except OSError as error:
        raise ConversionError(f"{scratch} cannot be written to ({error.strerror}). Choose another OUT.") from error
    with folder as name:
        make = _merge_adapter if merge_adapter else _dequantised
        yield make(source, Path(name))


def find_carried(folder: Path) -> list[Path]:
    """The files of a folder that go over into the result as they are.

    Raises:
        ConversionError: One cannot be read, or is JSON by its name alone.
    """
    files = [file for pattern in CARRIED_FILES for file in sorted(folder.glob(pattern)) if not file.is_dir()]
    for file in files:
        if file.suffix == ".json":
            read_json(file)
        elif not os.access(file, os.R_OK):
            raise ConversionError(f"{file.name} in {folder} cannot be read. Download it again, or remove it.")
    return files


def copy_files(files: list[Path], source: Path, folder: Path) -> None:
    """Copies files of one folder to the same places in another."""
    for file in files:
        target = folder / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def dequantise(gguf_file: Path, folder: Path, dtype: torch.dtype = torch.float32, with_tokenizer: bool = True) -> None:
    """Writes the model that transformers makes of a GGUF file, and its tokenizer.

    Args:
        gguf_file (`Path`): The file.
        folder (`Path`): Where to write to.
        dtype (`torch.dtype`, defaults to `torch.float32`): Of the weights.
        with_tokenizer (`bool`, defaults to `True`): Write the file's tokenizer too.
    """
    place = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=dtype, quantization_config=GgufConfig(dequantize=True))
    model.save_pretrained(folder)
    if with_tokenizer:
        AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


def _dequantised(source: Source, folder: Path) -> Source:
    """Writes a GGUF file as the float32 model that transformers makes of it."""
    if importlib.util.find_spec("gguf") is None:
        raise ConversionError("Reading GGUF files needs the package `gguf`. Install it: `pip install gguf`.")
    # What lies beside a file may be anybody's, what lies in the folder of a model is that model's.
    whole = source.path.is_dir()
    belonging = [*find_carried(source.path), *source.path.glob(REPOCARD_NAME)] if whole else []
    folder_of_file = source.path if whole else source.path.parent
    has_tokenizer = any(file.name.startswith("tokenizer") for file in belonging)
    try:
        dequantise(folder_of_file / source.gguf_file, folder, with_tokenizer=not has_tokenizer)
    except Exception as error:  # of whatever part of transformers, which the message must name
        raise _unreadable(source.gguf_file, error) from error
    copy_files(belonging, source.path, folder)
    remark = f"{source.gguf_file} was dequantised to float32 by transformers {transformers.__version__} first."
    return source._replace(path=folder, remarks=(remark,))


def _merge_adapter(source: Source, folder: Path) -> Source:
    """Writes an adapter's base model with the adapter merged into it."""
    if importlib.util.find_spec("peft") is None:
        raise ConversionError("Merging an adapter needs PEFT. Install it: `pip install peft`.")
    import peft

    base, result = folder / "base", folder / "merged"
    named = _adapter_base(source)
    base.mkdir()
    for file in named.path.iterdir():
        if not file.match(_ADAPTER_FILES):  # which transformers would add to the model
            (base / file.name).symlink_to(file.resolve())
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        adapted = peft.PeftModel.from_pretrained(model, source.path)
        # Once more, since it says which tensors are of no use: the first time they are a warning, or nothing.
        loaded = adapted.load_adapter(source.path, adapted.active_adapter)
        lost = [*loaded.missing_keys, *loaded.unexpected_keys]
        if not lost:
            adapted.merge_and_unload(safe_merge=True).save_pretrained(result)
    except Exception as error:  # of whatever part of PEFT or transformers, which the message must name
        raise _unreadable(f"the adapter of {source.name}", error) from error
    if lost:
        raise ConversionError(
            f"The adapter of {source.name} does not fit its base model {named.name}: {shorten(lost)}. Choose the base "
            "model that it was trained on."
        )
    for each in (named, source):  # what lies beside the adapter was trained with it
        copy_files([*find_carried(each.path), *each.path.glob(REPOCARD_NAME)], each.path, result)
    remark = f"The adapter was merged into {named.name} by PEFT {peft.__version__} first."
    return source._replace(path=result, remarks=(remark,))


def _adapter_base(source: Source) -> Source:
    """The base model of an adapter, as transformers finds it: beside it, or where its configuration says."""
    adapter = read_json(source.path / ADAPTER_CONFIG_NAME)
    if (source.path / CONFIG_NAME).exists():
        return source
    name = adapter.get("base_model_name_or_path")
    if not isinstance(name, str):
        raise ConversionError(
            f"`base_model_name_or_path` in {ADAPTER_CONFIG_NAME} is {name!r}, no base model. Name the one that the "
            "adapter was trained on."
        )
    return find_source(name, adapter.get("revision"))


def _unreadable(name: str, error: Exception) -> ConversionError:
    return ConversionError(
        f"transformers {transformers.__version__} cannot read {name} ({kind_and_message(error)}). Choose another."
    )
