# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""How long a conversion takes and how much memory it needs: a random DeepSeek-V3 of any shape, converted by
`coe-convert` in a process of its own.

    python -m benchmarks.conversion --layers 28 --hidden-size 2048 --experts 32 --width 512 --heads 16    # 6 GB
    python -m benchmarks.conversion --layers 1 --experts 32    # an eighth of the experts of a layer of DeepSeek-V3

Weights are streamed, so time grows with bytes: the report says what a checkpoint of DeepSeek-V3's size would take at
the same speed. Memory grows with the largest layer, which the verification computes in float32.
"""

import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DeepseekV3Config
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from benchmarks.markdown import table
from benchmarks.measure import describe_machine
from modeling_coe.command_line import check_folder, check_positive, command, parse, setting


ROOT = Path(__file__).resolve().parents[1]
DEEPSEEK_V3_BYTES = 671e9 * 2  # in bfloat16
SHARD_BYTES = 2e9
# `getrusage` of a child begins with what its parent had; this is the process's own peak, in KiB.
CONVERT = """
import sys
from pathlib import Path
from conversion.cli import main
status = main(sys.argv[1:])
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
sys.exit(status)
"""


@dataclass(frozen=True, kw_only=True)
class ConversionSettings:
    work: Path = setting(Path("runs/conversion"), "folder for the source and the result, which are removed")
    output: Path = setting(Path("runs/benchmarks"), "folder for the results")
    name: str = setting("deepseek_v3", "name of the results' files")
    layers: int = setting(1, "sparse layers")
    hidden_size: int = setting(7168, "hidden size")
    experts: int = setting(256, "routed experts of a layer")
    width: int = setting(2048, "width of an expert")
    heads: int = setting(128, "attention heads")
    vocab_size: int = setting(16_384, "tokens of the vocabulary")
    iterations: int = setting(2, "iterations of the chain")


def parse_settings(argv: list[str] | None = None) -> ConversionSettings:
    """Reads the command line."""
    settings = parse(ConversionSettings, __doc__.splitlines()[0], argv)
    check_positive(settings, "layers", "hidden_size", "experts", "width", "heads", "vocab_size", "iterations")
    check_folder("work", settings.work)
    check_folder("output", settings.output)
    return settings


def make_config(settings: ConversionSettings) -> DeepseekV3Config:
    """DeepSeek-V3's configuration but for the sizes asked for."""
    return DeepseekV3Config(
        num_hidden_layers=settings.layers,
        first_k_dense_replace=0,
        hidden_size=settings.hidden_size,
        n_routed_experts=settings.experts,
        moe_intermediate_size=settings.width,
        num_attention_heads=settings.heads,
        vocab_size=settings.vocab_size,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=None,
        dtype="bfloat16",
    )


def random_tensors(config: DeepseekV3Config) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model as they are stored, one for each expert."""
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    for name, tensor in state.items():
        if ".experts." not in name:
            yield name, torch.randn(tensor.shape, dtype=tensor.dtype).mul_(0.02)
            continue
        prefix, _, projection = name.rpartition(".")
        for expert in range(config.n_routed_experts):
            parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
            for part in parts:
                shape = (tensor.shape[1] // len(parts), tensor.shape[2])
                yield f"{prefix}.{expert}.{part}.weight", torch.randn(shape, dtype=tensor.dtype).mul_(0.02)


def make_source(config: DeepseekV3Config, folder: Path) -> None:
    """Saves a random model in shards, without holding it as a whole."""
    folder.mkdir(parents=True)
    shards: list[list[str]] = []
    waiting: dict[str, torch.Tensor] = {}

    def write() -> None:
        save_file(waiting, folder / f"model-{len(shards)}.safetensors", {"format": "pt"})
        shards.append(list(waiting))
        waiting.clear()

    for name, tensor in tqdm(random_tensors(config), desc="Making a source", unit=" tensors"):
        waiting[name] = tensor
        if sum(tensor.nbytes for tensor in waiting.values()) >= SHARD_BYTES:
            write()
    if waiting:
        write()
    weight_map = {name: f"model-{number}.safetensors" for number, names in enumerate(shards) for name in names}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.architectures = ["DeepseekV3ForCausalLM"]
    config.save_pretrained(folder)


def run(settings: ConversionSettings) -> dict:
    """Converts a random model and returns what it took."""
    config = make_config(settings)
    source, result = settings.work / "source", settings.work / "result"
    for folder in (source, result):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        make_source(config, source)
        nbytes = sum(file.stat().st_size for file in source.iterdir())
        arguments = [source, result, "--iterations", settings.iterations, "--overwrite"]
        begin = time.perf_counter()
        output = subprocess.run(
            [sys.executable, "-c", CONVERT, *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        seconds = time.perf_counter() - begin
    finally:
        for folder in (source, result):
            shutil.rmtree(folder, ignore_errors=True)
    layer = (settings.experts + 1) * 3 * settings.hidden_size * settings.width * 4
    return {
        "settings": {name: value for name, value in vars(settings).items() if isinstance(value, int)},
        "machine": describe_machine("cpu", torch.get_num_threads(), datetime.date.today().isoformat()),
        "source_bytes": nbytes,
        "layer_bytes_in_float32": layer,
        "seconds": seconds,
        "peak_bytes": int(output.split()[-1]) * 1024,
        "seconds_of_deepseek_v3": seconds * DEEPSEEK_V3_BYTES / nbytes,
    }


def markdown(results: dict) -> str:
    """The results as a page."""
    row = [
        f"{results['source_bytes'] / 1e9:.2f} GB",
        f"{results['layer_bytes_in_float32'] / 1e9:.2f} GB",
        f"{results['seconds']:.0f} s",
        f"{results['peak_bytes'] / 1e9:.2f} GB",
        f"{results['seconds_of_deepseek_v3'] / 3600:.1f} h",
    ]
    heads = ["source", "experts of a layer in float32", "conversion and verification", "peak memory", "1.34 TB"]
    machine = results["machine"]
    software = f"torch {machine['torch']}, transformers {machine['transformers']}"
    shape = ", ".join(f"{name} {value}" for name, value in results["settings"].items())
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads; {software}; {shape}.",
        "",
        *table(heads, [row], "rrrrr"),
    ]
    return "\n".join(["# Conversion", "", *lines]) + "\n"


@command
def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(argv)
    results = run(settings)
    settings.output.mkdir(parents=True, exist_ok=True)
    (settings.output / f"conversion-{settings.name}.json").write_text(json.dumps(results, indent=2) + "\n")
    page = markdown(results)
    (settings.output / f"conversion-{settings.name}.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
