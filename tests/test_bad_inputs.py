"""What `coe-convert` cannot do: one message that names what is wrong and what to do, and nothing changes on disk."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import convert
from conversion.cli import main
from conversion.families import FAMILIES

from .conversion_sources import edit_json, edit_tensor, make_source, quantize
from .helpers import ROOT, without_torchao


CONFIG, INDEX = "config.json", "model.safetensors.index.json"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


class Case(NamedTuple):
    """A change of a good source, arguments after SOURCE and OUT, and what the message says."""

    words: list[str]
    damage: Callable[[Path], Any] = lambda source: None
    options: str = ""
    name: str = "qwen3_moe"
    source: str = "source"
    out: str = "out"


def config(*words: str, name: str = "qwen3_moe", options: str = "", **changes: Any) -> Case:
    """Some fields of config.json have other values; `...` takes one away."""
    return Case([*words], lambda source: edit_json(source / CONFIG, **changes), options, name)


def one(field: str, value: Any, *words: str, name: str = "qwen3_moe", options: str = "") -> Case:
    """One field has another value, which the message gives."""
    return config(field, repr(value), *words, name=name, options=options, **{field: value})


def rope(*words: str, **values: Any) -> Case:
    parameters = {"rope_type": "default", "rope_theta": 10000.0} | values
    return config(
        "rope_parameters" if "rope_theta" not in values else "rope_theta", *words, rope_parameters=parameters
    )


def fp8(*words: str, **changes: Any) -> Case:
    """Some fields of the `quantization_config` of a source in FP8 have other values; `...` takes one away."""

    def damage(source: Path) -> None:
        fields = json.loads((source / CONFIG).read_text())["quantization_config"] | changes
        fields = {name: value for name, value in fields.items() if value is not ...}
        edit_json(source / CONFIG, quantization_config=fields)

    return Case(["quantization_config", *words], damage, name="fp8")


def write(file: str, content: str | bytes) -> Callable[[Path], Any]:
    encoded = content.encode() if isinstance(content, str) else content
    return lambda source: (source / file).write_bytes(encoded)


def cut(file: str, length: int) -> Callable[[Path], Any]:
    return lambda source: (source / file).write_bytes((source / file).read_bytes()[:length])


def index(**changes: Any) -> Callable[[Path], Any]:
    return lambda source: edit_json(source / INDEX, **changes)


def shard(source: Path) -> Path:
    return sorted(source.glob("*.safetensors"))[2]


def tensor(key: str, change: Callable) -> Callable[[Path], Any]:
    return lambda source: edit_tensor(source, key, change)


def add(source: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(load_file(shard(source)) | tensors, shard(source), {"format": "pt"})


def unlist(source: Path, part: str) -> None:
    """The index says nothing of tensors with some part in their names."""
    listed = json.loads((source / INDEX).read_text())["weight_map"]
    edit_json(source / INDEX, weight_map={key: file for key, file in listed.items() if part not in key})


def only_bin(source: Path) -> None:
    for file in source.glob("model*"):
        file.unlink()
    (source / "pytorch_model.bin").write_bytes(b"")


def directory(file: str) -> Callable[[Path], Any]:
    def damage(source: Path) -> None:
        (source / file).unlink(missing_ok=True)
        (source / file).mkdir()

    return damage


def beside(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda source: (source.parent / name).write_bytes(content)


CONFIGS = {
    "vocab_size 0": one("vocab_size", 0, "Correct"),
    "vocab_size -1": one("vocab_size", -1, "Correct"),
    "vocab_size text": one("vocab_size", "100", "not a whole number", "Correct"),
    "vocab_size null": config("vocab_size", "None", "Correct", vocab_size=None),
    "vocab_size of other weights": config("`vocab_size=101`", "[100, 32]", "[101, 32]", "Correct", vocab_size=101),
    "vocab_size beyond integers": one("vocab_size", 10**30, "64 bits", "Correct"),
    "vocab_size too large to build": one("vocab_size", 10**18, "Correct"),
    "hidden_size 0": one("hidden_size", 0, "Correct"),
    "hidden_size true": one("hidden_size", True, "Correct"),
    "hidden_size fraction": one("hidden_size", 32.5, "Correct"),
    "heads 0": one("num_attention_heads", 0, "Correct"),
    "heads that do not divide": one("num_attention_heads", 3, "Correct"),
    "key heads 0": one("num_key_value_heads", 0, "Correct"),
    "key heads of other weights": config(
        "`num_key_value_heads=4`", "self_attn.k_proj.weight", "Correct", num_key_value_heads=4
    ),
    "head_dim -8": one("head_dim", -8, "Correct"),
    "positions 0": one("max_position_embeddings", 0, "Correct"),
    "layers 1000000000": one("num_hidden_layers", 10**9, "more than the weights", "complete the weights"),
    "layers 3": config("`num_hidden_layers=3`", "model.layers.2", "complete the source", num_hidden_layers=3),
    "layers 1": config("`num_hidden_layers=1`", "model.layers.1", "Correct", num_hidden_layers=1),
    "layers list": one("num_hidden_layers", [2], "Correct"),
    "experts 9": config("`num_local_experts=9`", "mlp.experts.8", "Correct", name="mixtral", num_local_experts=9),
    "experts 7": config(
        "`num_local_experts=7`", "block_sparse_moe.experts.7", "Correct", name="mixtral", num_local_experts=7
    ),
    "experts 1000000000": one("num_local_experts", 10**9, "more than the weights", name="mixtral"),
    "experts per token 9": config("num_experts_per_tok", "9", "Set it to 8 or less", num_experts_per_tok=9),
    "experts per token 0": one("num_experts_per_tok", 0, "Correct"),
    "fewer experts than a token uses": config(
        "num_local_experts", "3", "Correct", name="mixtral", num_local_experts=3
    ),
    "expert width -24": one("moe_intermediate_size", -24, "Correct"),
    "expert width of other weights": config(
        "`moe_intermediate_size=20`", "[32, 24]", "[32, 20]", "Correct", moe_intermediate_size=20
    ),
    "expert width called otherwise": config(
        "`intermediate_size=40`", "[32, 48]", "[32, 40]", "Correct", name="mixtral", intermediate_size=40
    ),
    "dense layers": config("`mlp_only_layers=[1]`", "model.layers.1.mlp", "Correct", mlp_only_layers=[1]),
    "first layers dense": config(
        "`first_k_dense_replace=2`", "model.layers.1.mlp", "Correct", name="deepseek_v2", first_k_dense_replace=2
    ),
    "first layers dense -1": one("first_k_dense_replace", -1, "Correct", name="deepseek_v2"),
    "sparse step 0": one("decoder_sparse_step", 0, "Correct"),
    "latent width of other weights": config(
        "`kv_lora_rank=20`", "kv_a_proj", "Correct", name="deepseek_v2", kv_lora_rank=20
    ),
    "latent queries": config("`q_lora_rank=12`", "q_a_proj", "Correct", name="deepseek_v2", q_lora_rank=12),
    "groups": config("n_group", "3", "divisor", name="deepseek_v3", n_group=3),
    "shared experts of other weights": config(
        "`n_shared_experts=2`", "shared_experts", "Correct", name="deepseek_v2", n_shared_experts=2
    ),
    "shared width of other weights": config(
        "`shared_expert_intermediate_size=41`",
        "shared_expert.",
        "Correct",
        name="qwen2_moe",
        shared_expert_intermediate_size=41,
    ),
    "bias": config("`attention_bias=True`", "self_attn.q_proj.bias", "Correct", attention_bias=True),
    "bias text": one("attention_bias", "no", "Correct"),
    "tied": config("`tie_word_embeddings` is true", "lm_head.weight", "Correct", tie_word_embeddings=True),
    "tied text": one("tie_word_embeddings", "false", "Correct"),
    "norm text": one("rms_norm_eps", "1e-6", "Correct"),
    "norm NaN": config("rms_norm_eps", "nan", "not a finite number", "Correct", rms_norm_eps=float("nan")),
    "norm -1.0": one("rms_norm_eps", -1.0, "less than 0", "Correct"),
    "initializer infinite": config("initializer_range", "inf", "Correct", initializer_range=float("inf")),
    "initializer -0.1": one("initializer_range", -0.1, "Correct"),
    "activation": one("hidden_act", "gulu", "Correct"),
    "activation null": config("hidden_act", "None", "Correct", hidden_act=None),
    "dtype": config("dtype", "'float99'", "Correct", dtype="float99"),
    "dtype of integers": config("dtype", "'int8'", "Correct", dtype="int8"),
    "torch_dtype": config("torch_dtype", "'float99'", "Correct", dtype=..., torch_dtype="float99"),
    "rotary type": rope("'yarm'", "Correct", rope_type="yarm"),
    "rotary base 0": rope("0", "Correct", rope_theta=0),
    "rotary base text": rope("'high'", "Correct", rope_theta="high"),
    "rotary factor text": rope("'two'", "Correct", rope_type="linear", factor="two"),
    "rotary factor 0": config(
        "rope_parameters.factor",
        "0",
        "Correct",
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 0},
    ),
    "rotary text": one("rope_parameters", "default", "Correct"),
    "layer types too few": config(
        "layer_types", "full_attention", "Correct", name="qwen2_moe", layer_types=["full_attention"]
    ),
    "layer types number": one("layer_types", 2, "Correct", name="qwen2_moe"),
    "layer types unknown": config("layer_types", "'half'", "Correct", name="qwen2_moe", layer_types=["half", "half"]),
    "pad beyond the vocabulary": one("pad_token_id", 32000, "`vocab_size=100`", "Set it to"),
    "pad before the vocabulary": one("pad_token_id", -101, "`vocab_size=100`", "Set it to"),
    "pad text": one("pad_token_id", "<pad>", "Correct"),
    "pad fraction": one("pad_token_id", 1.5, "Correct"),
    "bos text": one("bos_token_id", "<s>", "Correct"),
    "eos nested": config("eos_token_id", "[[2]]", "Correct", eos_token_id=[[2]]),
    "model_type": one("model_type", "gpt_oss", "Choose", *FAMILIES),
    "model_type missing": config("model_type", "None", "Choose", model_type=...),
    "architectures": one("architectures", "Qwen3MoeForCausalLM", "Correct or remove"),
    "auto_map": one("auto_map", 3, "Correct or remove"),
    "quantised": config("quantization_config", "original weights", quantization_config={"quant_method": "fp8"}),
    "quantised by text": config("quantization_config", "'awq'", "original weights", quantization_config="awq"),
    "quantised otherwise": fp8("quant_method", "'compressed-tensors'", "original", quant_method="compressed-tensors"),
    "quantised by nothing": fp8("quant_method=None", "original weights", quant_method=...),
    "FP8 of fixed activations": fp8("activation_scheme", "'static'", "original weights", activation_scheme="static"),
    "FP8 of another format": fp8("fmt", "'e5m2'", "original weights", fmt="e5m2"),
    "FP8 without blocks": fp8("weight_block_size=None", "a scale for every block", weight_block_size=...),
    "FP8 in rows": fp8("weight_block_size=[128]", "original weights", weight_block_size=[128]),
    "FP8 in blocks of nothing": fp8("weight_block_size=[4, 0]", "original weights", weight_block_size=[4, 0]),
    "FP8 in blocks of text": fp8("weight_block_size", "'4'", "original weights", weight_block_size=["4", "4"]),
    "FP8 in other blocks": fp8(
        "weight_block_size=[128, 128]", "[1, 1]", "_scale_inv", "Correct", weight_block_size=[128, 128]
    ),
    "type of other code": one("model_type", "kimi_linear", "Choose", name="deepseek_v3"),
    "architecture of other code": config(
        "architectures",
        "'KimiForCausalLM'",
        "DeepseekV3ForCausalLM",
        "Correct",
        name="deepseek_v3",
        model_type="kimi_k2",
        architectures=["KimiForCausalLM"],
    ),
    "no architecture of other code": config(
        "architectures",
        "None",
        "DeepseekV3ForCausalLM",
        "Correct",
        name="deepseek_v3",
        model_type="kimi_k2",
        architectures=...,
    ),
    "unknown field": config("`is_causal=False`", "--ignore-fields", name="mixtral", is_causal=False),
    "scoring": config("scoring_func", "'softmax'", "'sigmoid'", "Correct", name="deepseek_v3", scoring_func="softmax"),
    "MTP count text": one("num_nextn_predict_layers", "one", "Correct", name="deepseek_v3"),
    "weights number": one("transformers_weights", 3, "Correct or remove"),
    "weights of another format": one("transformers_weights", "weights.bin", "Correct or remove"),
    "weights missing": config(
        "weights.safetensors", "missing", "Download", transformers_weights="weights.safetensors"
    ),
    "weights elsewhere": one("transformers_weights", "../other.safetensors", "Correct"),
    "iterations of other weights": config(
        "`inner_iter=3`", "mlp.gate.2", "Correct", name="chain", options="--to source", inner_iter=3
    ),
    "experts of another chain": config(
        "`n_routed_experts=9`", "mlp.experts.8", "Correct", name="chain", options="--to source", n_routed_experts=9
    ),
    "layers of another chain": config(
        "`num_hidden_layers=3`", "model.layers.2", "Correct", name="chain", options="--to source", num_hidden_layers=3
    ),
    "rule of no chain": config(
        "upcycling", "'merge'", "choose", name="chain", options="--to source", upcycling="merge"
    ),
    "biased MLPs": config("`mlp_bias`", "True", "Correct", name="llama", options="--upcycle copy", mlp_bias=True),
}
FILES = {
    "no config.json": Case(["no config.json", "Choose"], lambda source: (source / CONFIG).unlink()),
    "config.json cut": Case(["config.json", "not valid JSON", "Correct"], cut(CONFIG, 100)),
    "config.json empty": Case(["config.json", "not valid JSON", "Correct"], write(CONFIG, "")),
    "config.json list": Case(["config.json", "not a JSON object", "Correct"], write(CONFIG, "[1]")),
    "config.json deep": Case(["config.json", "not valid JSON", "Correct"], write(CONFIG, "[" * 100_000)),
    "config.json not UTF-8": Case(["config.json", "not valid JSON", "Correct"], write(CONFIG, b'{"a": "\xff"}')),
    "config.json folder": Case(["config.json", "cannot be read", "Download"], directory(CONFIG)),
    "index cut": Case([INDEX, "not valid JSON", "download"], cut(INDEX, 50)),
    "index list": Case([INDEX, "not a JSON object", "download"], write(INDEX, "[]")),
    "index without map": Case([INDEX, "`weight_map`", "Download"], index(weight_map=...)),
    "index without metadata": Case([INDEX, "`metadata`", "Download"], index(metadata=...)),
    "index with list": Case([INDEX, "`weight_map`", "Download"], index(weight_map=["a"])),
    "index with number": Case([INDEX, "`a` is in 3", "Correct"], index(weight_map={"a": 3})),
    "index of nothing": Case(["index", "no files", "Download"], index(weight_map={})),
    "index of a missing file": Case(
        ["x.safetensors", "missing", "Download"], index(weight_map={"a": "x.safetensors"})
    ),
    "shard missing": Case(["model-00003-of", "missing", "Download"], lambda source: shard(source).unlink()),
    "shard empty": Case(["model-00003-of", "truncated", "Download"], lambda source: shard(source).write_bytes(b"")),
    "shard cut": Case(
        ["model-00003-of", "truncated", "Download"], lambda source: shard(source).write_bytes(b"\0" * 20)
    ),
    "shard lacks a tensor": Case([EXPERT, "lacks", ".safetensors", "Download"], tensor(EXPERT, lambda _: None)),
    "tensor in two files": Case(
        ["`model.norm.weight`", "two files", "Remove"],
        lambda source: add(source, {"model.norm.weight": torch.ones(32)}),
    ),
    "no weights": Case(
        ["neither model.safetensors nor", INDEX, "save_pretrained('NEW')"],
        lambda source: [file.unlink() for file in source.glob("model*")],
    ),
    "only pytorch_model.bin": Case(["pytorch_model.bin", "safetensors", "save_pretrained('NEW')"], only_bin),
    "adapter": Case(["adapter_config.json", "`--merge-adapter`"], write("adapter_config.json", "{}")),
    "tokenizer.json cut": Case(["tokenizer.json", "not valid JSON", "download"], cut("tokenizer.json", 200)),
    "generation_config.json cut": Case(
        ["generation_config.json", "not valid JSON", "download"], cut("generation_config.json", 20)
    ),
    "generation_config.json list": Case(
        ["generation_config.json", "not a JSON object", "Correct"], write("generation_config.json", "[]")
    ),
    "LICENSE leads nowhere": Case(
        ["LICENSE", "cannot be read", "remove"], lambda source: (source / "LICENSE").symlink_to("nowhere")
    ),
    "tokenizer of another model": Case(["`vocab_size=90`", "id", "Correct"], lambda source: shrink_vocabulary(source)),
    "8-bit tensor": Case(
        [EXPERT, "F8_E4M3", "quantised", "original"], tensor(EXPERT, lambda weight: weight.to(torch.float8_e4m3fn))
    ),
    "scale missing": Case(
        [f"{EXPERT}_scale_inv", "lack", "Download"],
        lambda source: [
            edit_tensor(source, f"{EXPERT}_scale_inv", lambda _: None),
            unlist(source, f"{EXPERT}_scale_inv"),
        ],
        name="fp8",
    ),
    "weight of a scale missing": Case(
        [f"{EXPERT}_scale_inv", "no weight", "Download"],
        lambda source: [edit_tensor(source, EXPERT, lambda _: None), unlist(source, EXPERT)],
        name="fp8",
    ),
    "scale of a weight that is not in FP8": Case(
        [f"{EXPERT}_scale_inv", "no weight in FP8", "Download"],
        tensor(EXPERT, lambda weight: weight.float()),
        name="fp8",
    ),
    "scale of another shape": Case(
        [f"{EXPERT}_scale_inv", "[6, 7]", "[6, 8]", "weight_block_size=[4, 4]", "Correct"],
        tensor(f"{EXPERT}_scale_inv", lambda scale: scale[:, :7]),
        name="fp8",
    ),
    "scale of a row": Case(
        [f"{EXPERT}_scale_inv", "[48]", "[6, 8]", "Correct"],
        tensor(f"{EXPERT}_scale_inv", lambda scale: scale.flatten()),
        name="fp8",
    ),
    "scale in 8 bits": Case(
        [f"{EXPERT}_scale_inv", "U8", "original"],
        tensor(f"{EXPERT}_scale_inv", lambda scale: scale.to(torch.uint8)),
        name="fp8",
    ),
    "NaN in FP8": Case(
        [f"`{EXPERT}`", "NaN", "damaged"],
        tensor(EXPERT, lambda weight: weight.float().index_fill(0, torch.tensor([3]), torch.nan).to(weight.dtype)),
        name="fp8",
    ),
    "infinite scale": Case(
        [f"`{EXPERT}`", "infinity", "damaged"], tensor(f"{EXPERT}_scale_inv", lambda scale: scale / 0), name="fp8"
    ),
    "vector in FP8": Case(
        ["`model.norm.weight`", "[32]", "Only matrices"],
        lambda source: [
            edit_tensor(source, "model.norm.weight", lambda norm: norm.to(torch.float8_e4m3fn)),
            add(source, {"model.norm.weight_scale_inv": torch.ones(8)}),
        ],
        name="fp8",
    ),
    "other tensor in 8 bits": Case(
        ["`model.norm.weight`", "F8_E5M2", "original"],
        tensor("model.norm.weight", lambda norm: norm.to(torch.float8_e5m2)),
        name="fp8",
    ),
    "integer tensor": Case([EXPERT, "I32", "original"], tensor(EXPERT, lambda weight: weight.int())),
    "NaN": Case(
        [EXPERT, "NaN", "damaged"], tensor(EXPERT, lambda weight: weight.index_fill(0, torch.tensor([3]), torch.nan))
    ),
    "infinity, on the way to a nested OUT": Case(
        ["`model.norm.weight`", "infinity", "damaged"],
        tensor("model.norm.weight", lambda weight: weight / 0),
        out="a/b/c",
    ),
    "tensor of no place": Case(
        ["`model.layers.1.extra.weight`", "no place", "Look whether"],
        lambda source: add(source, {"model.layers.1.extra.weight": torch.ones(2)}),
    ),
    "shape": Case(
        [EXPERT, "[23, 32]", "[24, 32]", "`moe_intermediate_size=24`", "complete"],
        tensor(EXPERT, lambda weight: weight[1:]),
    ),
    "MTP layers that are not counted": Case(
        ["model.layers.2.enorm.weight", "`num_nextn_predict_layers=0`", "`num_hidden_layers=2`", "counts them"],
        lambda source: [
            edit_json(source / CONFIG, num_nextn_predict_layers=0),
            add(source, {"model.layers.2.enorm.weight": torch.ones(2)}),
        ],
        name="deepseek_v3",
    ),
    "stored head that is tied": Case(
        ["`tie_word_embeddings`", "lm_head.weight", "Correct"],
        lambda source: add(source, {"lm_head.weight": torch.ones(100, 32)}),
        name="deepseek_v2-groups-yarn",
    ),
}
OPTIONS = {
    "OUT exists": Case(["OUT", "exists", "--overwrite"], out="source/../taken"),
    "OUT is a file": Case(["OUT", "file", "exists", "--overwrite"], beside("file", b""), out="file"),
    "OUT is a file to overwrite": Case(
        ["OUT", "file", "no folder of a model"], beside("file", b""), "--overwrite", out="file"
    ),
    "OUT is no model": Case(["OUT", "no folder of a model", "--overwrite"], options="--overwrite", out="taken"),
    "OUT under a file": Case(["OUT", "cannot be made", "Choose"], beside("file", b""), out="file/out"),
    "OUT in the source": Case(["OUT", "lie in each other", "Choose"], out="source/out"),
    "SOURCE nowhere": Case(["SOURCE", "neither a folder", "Choose"], source="nothing"),
    "SOURCE is a file": Case(["SOURCE", "neither a folder", "Choose"], beside("file", b""), source="file"),
    "shard size 0": Case(["--max-shard-size 0", "like `5GB`"], options="--max-shard-size 0"),
    "shard size text": Case(["--max-shard-size much", "like `5GB`"], options="--max-shard-size much"),
    "shard size infinite": Case(["--max-shard-size", "like `5GB`"], options=f"--max-shard-size {'9' * 400}"),
    "dtype of options": Case(["--dtype", "'int8'", "choose from"], options="--dtype int8"),
    "mode of options": Case(["--mode", "'merge'", "choose from"], options="--mode merge"),
    "layers 4-": Case(["--layers", "'4-'", "such as"], options="--layers 4-"),
    "layers b": Case(["--layers", "'b'", "such as"], options="--layers b"),
    "layers 5-2": Case(["--layers", "'5-2'", "such as"], options="--layers 5-2"),
    "layers 0-9999999999": Case(["--layers", "'0-9999999999'", "no model has"], options="--layers 0-9999999999"),
    "layers 7": Case(["--layers", "7 cannot", "Layers that can: 0, 1"], options="--layers 1,7"),
    "dense layer": Case(["--layers", "0 cannot", "Layers that can: 1"], options="--layers 0-1", name="deepseek_v2"),
    "layer of a dense source": Case(
        ["--layers", "3 cannot", "Layers that can: 0, 1"], options="--upcycle copy --layers 3", name="llama"
    ),
    "iterations 0": Case(["--iterations", "'0'", "1 or more"], options="--iterations 0"),
    "iterations 1": Case(["--mode", "two iterations", "--mode identity"], options="--iterations 1"),
    "iterations 3": Case(
        ["4 experts", "num_experts_per_tok", "may be 2, 4", "--round-top-k"],
        options="--iterations 3",
    ),
    "iterations 5": Case(["cannot be split over 5", "may be 2, 4"], options="--iterations 5 --round-top-k"),
    "identity twice": Case(["--mode identity", "--iterations", "Choose"], options="--mode identity --iterations 2"),
    "verify 0": Case(["--verify", "'0'", "1 or more"], options="--verify 0"),
    "verification text missing": Case(["--verify-text", "nothing.txt", "Choose"], options="--verify-text nothing.txt"),
    "verification text not UTF-8": Case(
        ["--verify-text", "text", "UTF-8"], beside("text", b"\xff\xfe\xff"), "--verify-text {root}/text"
    ),
    "verification text empty": Case(
        ["--verify-text", "no tokens", "Choose"], beside("text", b""), "--verify-text {root}/text"
    ),
    "tolerance -1": Case(["--tolerance", "'-1'", "0 or more"], options="--tolerance -1"),
    "tolerance nan": Case(["--tolerance", "'nan'", "0 or more"], options="--tolerance nan"),
    "noise -1": Case(["--router-noise", "'-1'", "0 or more"], options="--router-noise -1"),
    "noise inf": Case(["--router-noise", "'inf'", "0 or more"], options="--router-noise inf"),
    "seed": Case(["--seed", "'x'", "int"], options="--seed x"),
    "push": Case(["--push a/b/c", "user/model"], options="--push a/b/c"),
    "experts of experts": Case(["`qwen3_moe`", "--experts", "leave them out"], options="--experts 4"),
    "upcycling experts": Case(["`qwen3_moe`", "--upcycle", "leave them out"], options="--upcycle copy"),
    "dense source": Case(["`llama`", "dense", "Choose", "--upcycle copy"], name="llama"),
    "slices": Case(["width 48", "5 equal slices", "Choose"], options="--upcycle slice --experts 5", name="llama"),
    "copies": Case(
        ["--top-k 5", "--experts 4", "Choose at most 4"],
        options="--upcycle copy --experts 4 --top-k 5 --mode refine",
        name="llama",
    ),
    "mode of a chain": Case(["--mode", "already", "Leave"], options="--to source --mode refine", name="chain"),
    "chain to a chain": Case(["already", "Convert it with `--to source`"], name="chain"),
    "scales that are not zero": Case(
        ["`model.layers.1.iteration_scale` is not zero", "`olmoe`", "Only chains"],
        tensor("model.layers.1.iteration_scale", lambda scale: scale + 1),
        "--to source",
        name="chain",
    ),
    "to source": Case(["--to source", "`qwen3_moe`", "Chain-of-Experts"], options="--to source"),
    "unknown option": Case(["--fast", "unrecognized"], options="--fast"),
}


def shrink_vocabulary(source: Path) -> None:
    edit_json(source / CONFIG, vocab_size=90)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        edit_tensor(source, key, lambda weight: weight[:90])


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Callable[[str], Path]:
    """Folders of sources by their names, each made when it is first asked for."""
    root = tmp_path_factory.mktemp("good")

    def source(name: str) -> Path:
        if (root / name).exists():
            return root / name
        if name == "chain":
            convert(source("olmoe"), root / name, verify_tokens=8)
            return root / name
        if name == "fp8":
            quantize(make_source(root / name, "qwen3_moe"))
            return root / name
        return make_source(root / name, name)

    return source


def listing(folder: Path) -> dict[str, Any]:
    """All that is in a folder: the files' bytes and times, and where links lead."""
    found = {}
    for path in folder.rglob("*"):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path)] = (content, path.lstat().st_mtime_ns if content is not None else None)
    return found


def prepare(case: Case, good, root: Path) -> list[str]:
    """Makes the damaged source in `root`. Returns the arguments."""
    source = Path(shutil.copytree(good(case.name), root / "source"))
    (root / "taken").mkdir()
    (root / "taken" / "thesis.txt").write_text("mine")
    case.damage(source)
    options = case.options.format(root=root).split()
    verify = [] if "--verify" in options else ["--verify", "8"]
    return [str(root / case.source), str(root / case.out), *verify, *options]


def assert_message(error: str, words: list[str]) -> None:
    lines = error.strip().splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.startswith("coe-convert: ")]
    message = "\n".join(lines[start:])
    assert "Traceback" not in error and len(lines) - start <= 9, error
    assert all(line.startswith(("usage:", " ", "Writing:", "Verifying:")) for line in lines[:start]), error
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in (CONFIGS | FILES | OPTIONS).items()])
def test_bad_input(good, tmp_path, capsys, case):
    arguments = prepare(case, good, tmp_path)
    before = listing(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as usage:
        code = usage.code
    printed = capsys.readouterr()
    assert code in (1, 2) and not printed.out
    assert_message(printed.err, case.words)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", ["rotary type", "shard cut", "dtype of options"])  # a field, a file, the command
def test_bad_input_of_a_process(good, tmp_path, name):
    case = (CONFIGS | FILES | OPTIONS)[name]
    arguments = [sys.executable, "-m", "conversion", *prepare(case, good, tmp_path)]
    before = listing(tmp_path)
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **quiet}
    run = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode in (1, 2) and not run.stdout
    assert_message(without_torchao(run.stderr), case.words)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CONFIGS.items()])
def test_dry_run_says_the_same(good, tmp_path, capsys, case):
    """No configuration is found to be wrong only once the weights have been written."""
    arguments = prepare(case, good, tmp_path)
    assert main([*arguments, "--dry-run"]) == 1
    printed = capsys.readouterr()
    assert not printed.out
    assert_message(printed.err, case.words)
