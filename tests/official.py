"""Folders as the official code writes them, and what its equations make of them: a float64 twin of the whole model.

Written from the equations (attention with one latent for all heads, rotary embedding of neighbouring pairs, yarn, the
chain); nothing here runs the model or reads a folder by its code.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from . import naive


YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 16,
}
# What its config.json holds, with small sizes. The layout of what the authors have published: no shared expert.
CONFIG = {
    "architectures": ["CoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_coe.CoeConfig",
        "AutoModel": "modeling_coe.CoeModel",
        "AutoModelForCausalLM": "modeling_coe.CoeForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "ep_size": 1,
    "first_k_dense_replace": 0,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "inner_iter": 2,
    "inner_residual": True,
    "intermediate_size": 48,
    "kv_lora_rank": 16,
    "max_position_embeddings": 640,
    "model_type": "coe_deepseekv2",
    "moe_intermediate_size": 24,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 16,
    "n_shared_experts": None,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "outer_residual": False,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "save_routing_logits": False,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "float32",
    "transformers_version": "4.49.0",
    "use_cache": True,
    "use_igate": True,
    "v_head_dim": 16,
    "vocab_size": 99,
}
MIXTURE = {"inner_iter": 1, "num_experts_per_tok": 8}  # the baseline of the same FLOPs


def make_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the official names, large enough that tokens are routed differently."""
    generator = torch.Generator().manual_seed(seed)
    hidden, heads, width = config["hidden_size"], config["num_attention_heads"], config["moe_intermediate_size"]
    nope, rope, rank = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["kv_lora_rank"]

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * 1.5 / math.sqrt(columns)

    def norm(size: int) -> torch.Tensor:
        return 1 + 0.2 * torch.randn(size, generator=generator)

    def mlp(name: str, width: int) -> dict[str, torch.Tensor]:
        shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        return {f"{name}.{part}_proj.weight": matrix(*shape) for part, shape in shapes.items()}

    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden), "model.norm.weight": norm(hidden)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": norm(hidden),
            "post_attention_layernorm.weight": norm(hidden),
            "self_attn.q_proj.weight": matrix(heads * (nope + rope), hidden),
            "self_attn.kv_a_proj_with_mqa.weight": matrix(rank + rope, hidden),
            "self_attn.kv_a_layernorm.weight": norm(rank),
            "self_attn.kv_b_proj.weight": matrix(heads * (nope + config["v_head_dim"]), rank),
            "self_attn.o_proj.weight": matrix(hidden, heads * config["v_head_dim"]),
        }
        routers = [f"gate.{t}" for t in range(config["inner_iter"])] if config["use_igate"] else ["gate"]
        layer |= {f"mlp.{router}.weight": 2 * matrix(config["n_routed_experts"], hidden) for router in routers}
        for expert in range(config["n_routed_experts"]):
            layer |= mlp(f"mlp.experts.{expert}", width)
        if config["n_shared_experts"] is not None:  # its code makes an MLP for 0 of them too, of width 0
            layer |= mlp("mlp.shared_experts", width * config["n_shared_experts"])
        tensors |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    return tensors


def make_script_folder(
    folder: Path, weight: torch.Tensor, name: str = "mlp.coe_weight", copied: bool = True, **fields: Any
) -> Path:
    """Saves what the official conversion script writes: the weight in every layer, the last ones' negated, and later
    routers that are the first one's unless they were trained."""
    config = CONFIG | {"outer_residual": True} | fields
    tensors = make_tensors(config)
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        tensors[prefix + name] = weight.clone() if i == 0 else -weight
        if copied and config["use_igate"]:
            for t in range(1, config["inner_iter"]):
                tensors[f"{prefix}mlp.gate.{t}.weight"] = tensors[f"{prefix}mlp.gate.0.weight"].clone()
    return save(folder, tensors, config)


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], shards: int = 1) -> Path:
    """Writes config.json and the tensors; those of one layer lie in several files where there are some."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    files = [f"model-{n:05d}-of-{shards:05d}.safetensors" for n in range(1, shards + 1)]
    weight_map = {name: files[position % shards] for position, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({k: v for k, v in tensors.items() if weight_map[k] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make_folder(folder: Path, shards: int = 1, seed: int = 0, **fields: Any) -> Path:
    """Saves a random model; `...` leaves a field out of config.json."""
    config = CONFIG | fields
    tensors = make_tensors({name: CONFIG[name] if value is ... else value for name, value in config.items()}, seed)
    return save(folder, tensors, {name: value for name, value in config.items() if value is not ...}, shards)


def rotary_frequencies(config: dict[str, Any]) -> tuple[torch.Tensor, float, float]:
    """Frequencies (pairs,), the factor of cosine and sine, and that of attention scores."""
    width, base = config["qk_rope_head_dim"], config["rope_theta"]
    frequencies = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    scaling = config["rope_scaling"]
    if scaling is None:
        return frequencies, 1.0, 1.0

    def dimension(rotations: float) -> float:
        return width * math.log(scaling["original_max_position_embeddings"] / (rotations * 2 * math.pi)) / (
            2 * math.log(base)
        )  # fmt: skip

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(scaling["factor"]) + 1

    low = max(math.floor(dimension(scaling["beta_fast"])), 0)
    high = min(math.ceil(dimension(scaling["beta_slow"])), width - 1)
    ramp = ((torch.arange(width // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies = frequencies / scaling["factor"] * ramp + frequencies * (1 - ramp)
    all_dims = magnitude(scaling["mscale_all_dim"])
    return frequencies, magnitude(scaling["mscale"]) / all_dims, all_dims**2


def attend(x: torch.Tensor, weights: dict[str, torch.Tensor], config: dict[str, Any]) -> torch.Tensor:
    """Latent attention of one sequence (S, H)."""
    length, heads = len(x), config["num_attention_heads"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    frequencies, rotary_factor, score_factor = rotary_frequencies(config)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies

    def rotate(part: torch.Tensor) -> torch.Tensor:  # (S, heads, rope)
        even, odd = part[..., 0::2], part[..., 1::2]
        cos, sin = rotary_factor * angles.cos()[:, None], rotary_factor * angles.sin()[:, None]
        return torch.cat((even * cos - odd * sin, even * sin + odd * cos), dim=-1)

    queries = (x @ weights["q_proj.weight"].T).view(length, heads, nope + rope)
    latent, shared_key = (x @ weights["kv_a_proj_with_mqa.weight"].T).split((config["kv_lora_rank"], rope), dim=-1)
    latent = torch.stack([naive.rms_norm(row, weights["kv_a_layernorm.weight"], 1e-6) for row in latent])
    keys, values = (latent @ weights["kv_b_proj.weight"].T).view(length, heads, nope + value).split((nope, value), -1)
    query = torch.cat((queries[..., :nope], rotate(queries[..., nope:])), dim=-1)
    key = torch.cat((keys, rotate(shared_key[:, None]).expand(-1, heads, -1)), dim=-1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * (nope + rope) ** -0.5 * score_factor
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
    mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).reshape(length, heads * value)
    return mixed @ weights["o_proj.weight"].T


def moe(x: torch.Tensor, t: int, layer: dict[str, torch.Tensor], config: dict[str, Any]) -> torch.Tensor:
    """One iteration for one token (H,)."""
    router = layer.get(f"mlp.gate.{t}.weight", layer.get("mlp.gate.weight"))
    routing = SimpleNamespace(upcycling=None, backbone="deepseek_v2", **config)
    y = torch.zeros_like(x)
    for expert, weight in naive.route(x, router, None, routing):
        parts = [layer[f"mlp.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down")]
        y = y + weight * naive.swiglu(x, *parts)
    if config["n_shared_experts"]:
        y = y + naive.swiglu(x, *(layer[f"mlp.shared_experts.{part}_proj.weight"] for part in ("gate", "up", "down")))
    return y


def chain(h: torch.Tensor, layer: dict[str, torch.Tensor], config: dict[str, Any]) -> torch.Tensor:
    """The rules of the official code."""
    x = naive.rms_norm(h, layer["post_attention_layernorm.weight"], config["rms_norm_eps"])
    for t in range(config["inner_iter"]):
        y = moe(x, t, layer, config)
        x = x + y if config["inner_residual"] else y
    return h + x if config["outer_residual"] else x


def script_chain(h: torch.Tensor, layer: dict[str, torch.Tensor], config: dict[str, Any]) -> torch.Tensor:
    """The rule that the official conversion script documents."""
    x = naive.rms_norm(h, layer["post_attention_layernorm.weight"], config["rms_norm_eps"])
    y = moe(x, 0, layer, config)
    return h + moe(x + layer["mlp.coe_weight"] * y, 1, layer, config)


def logits(ids: list[int], tensors: dict[str, torch.Tensor], config: dict[str, Any], chain=chain) -> torch.Tensor:
    """Logits (S, vocabulary) of one sequence in float64."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    hidden_states = tensors["model.embed_tokens.weight"][ids]
    eps = config["rms_norm_eps"]
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        layer = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        attention = {name.removeprefix("self_attn."): t for name, t in layer.items() if name.startswith("self_attn.")}
        normed = torch.stack([naive.rms_norm(h, layer["input_layernorm.weight"], eps) for h in hidden_states])
        hidden_states = hidden_states + attend(normed, attention, config)
        hidden_states = torch.stack([chain(h, layer, config) for h in hidden_states])
    hidden_states = torch.stack([naive.rms_norm(h, tensors["model.norm.weight"], eps) for h in hidden_states])
    return hidden_states @ tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).T
