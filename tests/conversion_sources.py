"""Tiny checkpoints of every family that can be converted, made with transformers' own classes."""

import copy
import itertools
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CwmConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Dots1Config,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    GenerationConfig,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GraniteConfig,
    GraniteMoeConfig,
    HeliumConfig,
    HunYuanDenseV1Config,
    HunYuanMoEV1Config,
    HYV3Config,
    LlamaConfig,
    MiniCPM3Config,
    MiniMaxM2Config,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SolarOpenConfig,
    YoutuConfig,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME


SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
VOCABULARY = [*SPECIAL, "\n", *map(chr, range(32, 127))]

DENSE = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Large enough that tokens are routed differently.
    "initializer_range": 0.2,
}
MOE = {**DENSE, "num_experts_per_tok": 4}
QWEN = {**MOE, "moe_intermediate_size": 24, "num_experts": 8, "num_key_value_heads": 4}
DEEPSEEK = {
    **MOE,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
HEADS = {
    name: DEEPSEEK[name]
    for name in ("num_key_value_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
}
LATENT = {name: value for name, value in DEEPSEEK.items() if name != "first_k_dense_replace"}
GROUPED = {
    **MOE,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_key_value_heads": 2,
}
SPARSE = {name: value for name, value in GROUPED.items() if name != "intermediate_size"}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
GROUPS = {"n_group": 4, "topk_group": 2}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
TIED = {"tie_word_embeddings": True}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 1.5, 2.5, 4.0],
}
NTK_ALPHA = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 50.0}
GRANITE = {
    "num_key_value_heads": 2,
    "attention_multiplier": 0.2,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 3.0,
}
ERNIE = {
    **DENSE,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 24,
    "moe_k": 4,
    "moe_num_experts": 8,
}
HUNYUAN = {**DENSE, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 8, "moe_topk": 4}
HY3 = {**MOE, "moe_intermediate_size": 24, "num_experts": 8, "num_key_value_heads": 2, "head_dim": 16}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}

# Name -> config class and its fields.
MOE_SOURCES = {
    "deepseek_v2": (DeepseekV2Config, DEEPSEEK),
    "deepseek_v2-groups-yarn": (
        DeepseekV2Config,
        {
            **(DEEPSEEK | TIED | GROUPS),
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 2.5,
            "n_shared_experts": 2,
            "q_lora_rank": 12,
            "attention_bias": True,
            "rope_parameters": YARN,
        },
    ),
    "deepseek_v2-no_shared": (
        DeepseekV2Config,
        {**DEEPSEEK, "n_shared_experts": 0, "first_k_dense_replace": 0, "norm_topk_prob": True},
    ),
    "deepseek_v3": (DeepseekV3Config, {**(DEEPSEEK | GROUPS), "q_lora_rank": 12, "rope_parameters": YARN}),
    "deepseek_v3-moonlight": (
        DeepseekV3Config,
        {**(DEEPSEEK | ONE_GROUP), "n_shared_experts": 2, "routed_scaling_factor": 2.446, "rope_interleave": False},
    ),
    "deepseek_v3-not_normalised": (
        DeepseekV3Config,
        {**(DEEPSEEK | GROUPS | TIED), "norm_topk_prob": False, "attention_bias": True, "first_k_dense_replace": 0},
    ),
    "glm4_moe_lite": (Glm4MoeLiteConfig, {**(LATENT | ONE_GROUP), "q_lora_rank": 12, "rms_norm_eps": 1e-4}),
    "glm4_moe_lite-sparse": (
        Glm4MoeLiteConfig,
        {
            **(LATENT | GROUPS | TIED),
            "q_lora_rank": 12,
            "n_shared_experts": 2,
            "mlp_layer_types": ["sparse", "sparse"],
            "attention_bias": True,
            "norm_topk_prob": False,
            "rope_parameters": YARN,
        },
    ),
    "glm4_moe": (Glm4MoeConfig, {**(GROUPED | ONE_GROUP), "head_dim": 16, "first_k_dense_replace": 1}),
    "glm4_moe-norms": (
        Glm4MoeConfig,
        {
            **(GROUPED | GROUPS | TIED),
            "head_dim": 16,
            "use_qk_norm": True,
            "attention_bias": True,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {**YARN, "partial_rotary_factor": 0.25},
        },
    ),
    "minimax_m2": (
        MiniMaxM2Config,
        {**MOE, "num_key_value_heads": 2, "num_local_experts": 8, "head_dim": 16, "rotary_dim": 8},
    ),
    "minimax_m2-tied": (
        MiniMaxM2Config,
        {
            **(MOE | TIED),
            "num_key_value_heads": 4,
            "num_local_experts": 8,
            "head_dim": 8,
            "rms_norm_eps": 1e-4,
            "rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5},
        },
    ),
    "dots1": (Dots1Config, {**(GROUPED | ONE_GROUP), "first_k_dense_replace": 1, "norm_topk_prob": True}),
    "dots1-window": (
        Dots1Config,
        {
            **(GROUPED | GROUPS | TIED),
            "n_shared_experts": 2,
            "sliding_window": 5,
            "max_window_layers": 1,
            "attention_bias": True,
            "routed_scaling_factor": 2.5,
        },
    ),
    "solar_open": (SolarOpenConfig, {**(SPARSE | ONE_GROUP), "head_dim": 16}),
    "solar_open-groups": (
        SolarOpenConfig,
        {
            **(SPARSE | GROUPS | TIED),
            "head_dim": 8,
            "norm_topk_prob": False,
            "routed_scaling_factor": 2.5,
            "rope_parameters": LLAMA3,
        },
    ),
    "qwen2_moe": (Qwen2MoeConfig, {**QWEN, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2}),
    "qwen2_moe-window": (
        Qwen2MoeConfig,
        {
            **(QWEN | TIED | WINDOW),
            "shared_expert_intermediate_size": 40,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "max_window_layers": 1,
            "num_key_value_heads": 2,
            "qkv_bias": False,
        },
    ),
    "qwen3_moe": (Qwen3MoeConfig, {**QWEN, "head_dim": 16, "norm_topk_prob": True, "num_key_value_heads": 2}),
    "qwen3_moe-window": (
        Qwen3MoeConfig,
        {**(QWEN | TIED | WINDOW), "mlp_only_layers": [0], "attention_bias": True, "rope_parameters": LINEAR},
    ),
    "olmoe": (OlmoeConfig, {**MOE, "num_experts": 8, "clip_qkv": 0.5}),
    "olmoe-grouped_queries": (
        OlmoeConfig,
        {**(MOE | TIED), "num_experts": 8, "num_key_value_heads": 2, "norm_topk_prob": True, "attention_bias": True},
    ),
    "mixtral": (MixtralConfig, {**MOE, "num_key_value_heads": 2, "num_local_experts": 8}),
    "mixtral-window": (
        MixtralConfig,
        {
            **(MOE | TIED),
            "num_key_value_heads": 4,
            "num_local_experts": 8,
            "sliding_window": 5,
            "head_dim": 16,
            "rope_parameters": LLAMA3,
        },
    ),
    "granitemoe": (GraniteMoeConfig, {**MOE, **GRANITE, "num_local_experts": 8}),
    "granitemoe-tied": (
        GraniteMoeConfig,
        {
            **(MOE | GRANITE | TIED),
            "num_local_experts": 8,
            "num_key_value_heads": 4,
            "attention_bias": True,
            "rope_parameters": LLAMA3,
        },
    ),
    "granitemoe-neutral": (GraniteMoeConfig, {**MOE, "num_local_experts": 8, "attention_multiplier": 0.3}),
    "ernie4_5_moe": (Ernie4_5_MoeConfig, {**ERNIE, "head_dim": 16, "tie_word_embeddings": False}),
    "ernie4_5_moe-interval": (
        Ernie4_5_MoeConfig,
        {
            **ERNIE,
            "num_hidden_layers": 5,
            "moe_num_shared_experts": 0,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": 3,
            "moe_layer_interval": 2,
            "rope_parameters": LINEAR,
        },
    ),
    "hunyuan_v1_moe": (HunYuanMoEV1Config, HUNYUAN),
    "hunyuan_v1_moe-alpha": (
        HunYuanMoEV1Config,
        {**(HUNYUAN | TIED), "head_dim": 16, "attention_bias": True, "rope_parameters": NTK_ALPHA},
    ),
    "hy_v3": (HYV3Config, {**HY3, "router_scaling_factor": 2.5}),
    "hy_v3-sparse": (
        HYV3Config,
        {
            **(HY3 | TIED),
            "mlp_layer_types": ["sparse", "sparse"],
            "num_shared_experts": 2,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": LLAMA3,
        },
    ),
}
DENSE_SOURCES = {
    "llama": (LlamaConfig, {**DENSE, "num_key_value_heads": 2, "attention_bias": True, "rope_parameters": LLAMA3}),
    "qwen3": (Qwen3Config, {**(DENSE | WINDOW), "num_key_value_heads": 2, "head_dim": 16, "max_window_layers": 1}),
    "mistral": (MistralConfig, {**(DENSE | TIED), "num_key_value_heads": 2, "sliding_window": 5}),
    "qwen2": (Qwen2Config, {**(DENSE | WINDOW | TIED), "num_key_value_heads": 2, "max_window_layers": 1}),
    "ministral": (
        MinistralConfig,
        {
            **DENSE,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "cwm": (CwmConfig, {**DENSE, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 5}),
    "seed_oss": (SeedOssConfig, {**DENSE, "num_key_value_heads": 2, "head_dim": 16}),
    "granite": (GraniteConfig, {**DENSE, **GRANITE, "attention_bias": True}),
    "ernie4_5": (Ernie4_5Config, {**DENSE, "num_key_value_heads": 2, "head_dim": 16}),
    "helium": (HeliumConfig, {**DENSE, "num_key_value_heads": 2, "head_dim": 8}),
    "hunyuan_v1_dense": (
        HunYuanDenseV1Config,
        {**DENSE, "num_key_value_heads": 2, "head_dim": 8, "rope_parameters": NTK_ALPHA},
    ),
    "youtu": (YoutuConfig, {**DENSE, **HEADS, "q_lora_rank": 12, "rope_parameters": YARN}),
    "minicpm3": (
        MiniCPM3Config,
        {
            **(DENSE | TIED | HEADS),
            "q_lora_rank": 12,
            "scale_emb": 6,
            "scale_depth": 0.8,
            "dim_model_base": 16,
            "rope_parameters": LONGROPE,
        },
    ),
}


def make_config(name: str, **overrides) -> PreTrainedConfig:
    config_class, fields = (MOE_SOURCES | DENSE_SOURCES)[name]
    return config_class(**copy.deepcopy({**fields, **overrides}))


def make_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model in which no bias, norm or selection bias has a value that would hide its loss."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if 1 in (tensor.dim(), *tensor.shape[:-1]) and tensor.is_floating_point():
                tensor.add_(0.2 * torch.randn_like(tensor))
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            bias = module.e_score_correction_bias
            bias.data = bias.data.float()  # as `from_pretrained` keeps it
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config)  # its frequencies are buffers too
    return model


def save_tokenizer(folder: Path) -> None:
    """One token a character."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    ).save_pretrained(folder)


def make_source(
    folder: Path, name: str, dtype: torch.dtype = torch.float32, fused: bool = False, seed: int = 0, **overrides
) -> Path:
    """Saves a random model of some family with a tokenizer, in several shards."""
    model = make_model(make_config(name, **overrides), dtype, seed)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, **ids)
    model.save_pretrained(folder, max_shard_size="60KB", save_original_format=not fused)
    save_tokenizer(folder)
    return folder


def quantize(folder: Path, block: tuple[int, int] = (4, 4), pattern: str = r"(_proj|_mqa|\.w\d)\.weight$") -> None:
    """Stores the matrices whose names match in FP8, with the scales of their blocks in a file of their own."""
    index = {}
    rows, columns = block
    for file in [*folder.glob("*.safetensors")]:
        tensors, scales = load_file(file), {}
        for key in [key for key in tensors if re.search(pattern, key)]:
            weight, scale = tensors[key].double(), f"{key}_scale_inv"
            number = [-(-size // length) for size, length in zip(weight.shape, block, strict=True)]
            scales[scale] = torch.empty(number)
            for i, j in itertools.product(*map(range, number)):
                part = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                scales[scale][i, j] = part.abs().max() / 448
                part /= scales[scale][i, j].double()
            tensors[key] = weight.to(torch.float8_e4m3fn)
        save_file(tensors, file, {"format": "pt"})
        name = file.name.replace("model", "scales")
        index |= dict.fromkeys(tensors, file.name) | dict.fromkeys(scales, name)
        save_file(scales, folder / name, {"format": "pt"})
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    quantization = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    edit_json(folder / "config.json", quantization_config=quantization | {"weight_block_size": list(block)})


def dequantized(folder: Path, block: tuple[int, int] = (4, 4)) -> dict[str, torch.Tensor]:
    """All tensors of a folder, what those in FP8 stand for in float64."""
    tensors = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
    for key in [key for key, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn]:
        weight, scales = tensors[key].double(), tensors.pop(f"{key}_scale_inv").double()
        for i, j in itertools.product(*map(range, weight.shape)):
            weight[i, j] *= scales[i // block[0], j // block[1]]
        tensors[key] = weight
    return tensors


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    return {k: v for file in sorted(folder.glob("model*.safetensors")) for k, v in load_file(file).items()}


def edit_json(file: Path, **changes) -> None:
    """Gives fields other values; `...` takes one away."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def edit_tensor(folder: Path, key: str, change) -> None:
    """Replaces a tensor in the file that holds it; `None` removes it there."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if key in tensors:
            changed = change(tensors.pop(key))
            save_file(tensors if changed is None else tensors | {key: changed.contiguous()}, file, {"format": "pt"})
            return
    raise AssertionError(key)
