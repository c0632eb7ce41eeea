"""What published models have in `config.json`, and files that have the headers of their weights alone."""

import copy
import json
import re
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


def _yarn(factor: int, beta_fast: int, mscale: float, original: int = 4096) -> dict[str, Any]:
    rope = {"type": "yarn", "factor": factor, "beta_fast": beta_fast, "beta_slow": 1, "mscale": mscale}
    return rope | {"mscale_all_dim": mscale, "original_max_position_embeddings": original}


def _remote_code(name: str) -> dict[str, str]:
    return {
        "AutoConfig": f"configuration_deepseek.{name}Config",
        "AutoModel": f"modeling_deepseek.{name}Model",
        "AutoModelForCausalLM": f"modeling_deepseek.{name}ForCausalLM",
    }


FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
COMMON = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
DEEPSEEK = {
    **COMMON,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "kv_lora_rank": 512,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "seq_aux": True,
    "v_head_dim": 128,
}
DEEPSEEK_V3 = {
    **DEEPSEEK,
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": _remote_code("DeepseekV3"),
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
GLM = {
    **COMMON,
    "attention_dropout": 0.0,
    "n_group": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "topk_group": 1,
}
QWEN = {
    **COMMON,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = {
    **QWEN,
    "attention_bias": False,
    "eos_token_id": 151645,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_scaling": None,
    "sliding_window": None,
}
# Model -> the parameters that it is published with, in billions, and its config.json.
PUBLISHED = {
    "DeepSeek-V3": (
        671,
        {
            **DEEPSEEK_V3,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "first_k_dense_replace": 3,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "max_position_embeddings": 163840,
            "model_type": "deepseek_v3",
            "moe_intermediate_size": 2048,
            "n_group": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_attention_heads": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "num_key_value_heads": 128,
            "num_nextn_predict_layers": 1,
            "q_lora_rank": 1536,
            "quantization_config": FP8,
            "rope_scaling": _yarn(40, 32, 1.0),
            "rope_theta": 10000,
            "routed_scaling_factor": 2.5,
            "topk_group": 4,
            "transformers_version": "4.33.1",
            "vocab_size": 129280,
        },
    ),
    "Kimi-K2-Instruct": (
        1026,
        {
            **{name: value for name, value in DEEPSEEK_V3.items() if name != "ep_size"},
            "bos_token_id": 163584,
            "eos_token_id": 163585,
            "first_k_dense_replace": 1,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "max_position_embeddings": 131072,
            "model_type": "kimi_k2",
            "moe_intermediate_size": 2048,
            "n_group": 1,
            "n_routed_experts": 384,
            "n_shared_experts": 1,
            "num_attention_heads": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "num_key_value_heads": 64,
            "num_nextn_predict_layers": 0,
            "q_lora_rank": 1536,
            "quantization_config": FP8,
            "rope_scaling": _yarn(32, 1, 1.0),
            "rope_theta": 50000.0,
            "routed_scaling_factor": 2.827,
            "topk_group": 1,
            "transformers_version": "4.48.3",
            "vocab_size": 163840,
        },
    ),
    "Moonlight-16B-A3B": (
        16,
        {
            **DEEPSEEK_V3,
            "bos_token_id": 163584,
            "eos_token_id": 163585,
            "first_k_dense_replace": 1,
            "hidden_size": 2048,
            "intermediate_size": 11264,
            "max_position_embeddings": 8192,
            "model_type": "deepseek_v3",
            "moe_intermediate_size": 1408,
            "n_group": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_attention_heads": 16,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "num_nextn_predict_layers": 0,
            "q_lora_rank": None,
            "rms_norm_eps": 1e-5,
            "rope_theta": 50000.0,
            "routed_scaling_factor": 2.446,
            "topk_group": 1,
            "transformers_version": "4.48.3",
            "vocab_size": 163840,
        },
    ),
    "DeepSeek-V2-Lite": (
        15.7,
        {
            **DEEPSEEK,
            "architectures": ["DeepseekV2ForCausalLM"],
            "auto_map": _remote_code("DeepseekV2"),
            "bos_token_id": 100000,
            "eos_token_id": 100001,
            "first_k_dense_replace": 1,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "max_position_embeddings": 163840,
            "model_type": "deepseek_v2",
            "moe_intermediate_size": 1408,
            "n_group": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "rope_scaling": _yarn(40, 32, 0.707),
            "rope_theta": 10000,
            "routed_scaling_factor": 1.0,
            "scoring_func": "softmax",
            "topk_group": 1,
            "topk_method": "greedy",
            "transformers_version": "4.33.1",
            "vocab_size": 102400,
        },
    ),
    "GLM-4.5-Air": (
        106,
        {
            **GLM,
            "architectures": ["Glm4MoeForCausalLM"],
            "attention_bias": True,
            "eos_token_id": [151329, 151336, 151338],
            "first_k_dense_replace": 1,
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "max_position_embeddings": 131072,
            "model_type": "glm4_moe",
            "moe_intermediate_size": 1408,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "num_attention_heads": 96,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 46,
            "num_key_value_heads": 8,
            "pad_token_id": 151329,
            "partial_rotary_factor": 0.5,
            "routed_scaling_factor": 1.0,
            "transformers_version": "4.54.0",
            "use_qk_norm": False,
            "vocab_size": 151552,
        },
    ),
    "GLM-4.7-Flash": (
        30,
        {
            **GLM,
            "architectures": ["Glm4MoeLiteForCausalLM"],
            "attention_bias": False,
            "eos_token_id": [154820, 154827, 154829],
            "first_k_dense_replace": 1,
            "hidden_size": 2048,
            "intermediate_size": 10240,
            "kv_lora_rank": 512,
            "max_position_embeddings": 202752,
            "model_type": "glm4_moe_lite",
            "moe_intermediate_size": 1536,
            "n_routed_experts": 64,
            "n_shared_experts": 1,
            "num_attention_heads": 20,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 47,
            "num_key_value_heads": 20,
            "pad_token_id": 154820,
            "partial_rotary_factor": 1.0,
            "q_lora_rank": 768,
            "qk_nope_head_dim": 192,
            "qk_rope_head_dim": 64,
            "routed_scaling_factor": 1.8,
            "topk_method": "noaux_tc",
            "v_head_dim": 256,
            "vocab_size": 154880,
        },
    ),
    "MiniMax-M2": (
        229,
        {
            **COMMON,
            "architectures": ["MiniMaxM2ForCausalLM"],
            "attention_dropout": 0.0,
            "attn_type_list": [1] * 62,
            "auto_map": {
                "AutoConfig": "configuration_minimax_m2.MiniMaxM2Config",
                "AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM",
            },
            "bos_token_id": None,
            "eos_token_id": None,
            "head_dim": 128,
            "hidden_size": 3072,
            "intermediate_size": 1536,
            "layernorm_full_attention_beta": 1.0,
            "layernorm_linear_attention_beta": 1.0,
            "layernorm_mlp_beta": 1.0,
            "max_position_embeddings": 196608,
            "mlp_intermediate_size": 8192,
            "model_type": "minimax_m2",
            "mtp_transformer_layers": 1,
            "num_attention_heads": 48,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 62,
            "num_key_value_heads": 8,
            "num_local_experts": 256,
            "num_mtp_modules": 3,
            "output_router_logits": False,
            "qk_norm_type": "per_layer",
            "quantization_config": {
                **FP8,
                "fmt": "float8_e4m3fn",
                "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
            },
            "rope_theta": 5000000,
            "rotary_dim": 64,
            "router_aux_loss_coef": 0.001,
            "router_jitter_noise": 0.0,
            "scoring_func": "sigmoid",
            "shared_intermediate_size": 0,
            "shared_moe_mode": "sigmoid",
            "sliding_window": None,
            "transformers_version": "4.46.1",
            "use_mtp": True,
            "use_qk_norm": True,
            "use_routing_bias": True,
            "vocab_size": 200064,
        },
    ),
    "dots.llm1": (
        142,
        {
            **COMMON,
            "architectures": ["Dots1ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "eos_token_id": 151645,
            "first_k_dense_replace": 1,
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "max_position_embeddings": 32768,
            "max_window_layers": 62,
            "model_type": "dots1",
            "moe_intermediate_size": 1408,
            "moe_layer_freq": 1,
            "n_group": 1,
            "n_routed_experts": 128,
            "n_shared_experts": 2,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 62,
            "num_key_value_heads": 32,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 10000000,
            "routed_scaling_factor": 2.5,
            "scoring_func": "noaux_tc",
            "sliding_window": None,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "transformers_version": "4.46.3",
            "vocab_size": 152064,
        },
    ),
    "Solar-Open-100B": (
        102.6,
        {
            **COMMON,
            "architectures": ["SolarOpenForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "first_k_dense_replace": 0,
            "head_dim": 128,
            "hidden_size": 4096,
            "max_position_embeddings": 131072,
            "model_type": "solar_open",
            "moe_intermediate_size": 1280,
            "n_group": 1,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 8,
            "pad_token_id": 2,
            "partial_rotary_factor": 1.0,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 65536,
            },
            "rope_theta": 1000000,
            "routed_scaling_factor": 1.0,
            "topk_group": 1,
            "use_qk_norm": False,
            "vocab_size": 196608,
        },
    ),
    "Qwen3-30B-A3B": (
        30.5,
        {
            **QWEN3,
            "architectures": ["Qwen3MoeForCausalLM"],
            "decoder_sparse_step": 1,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "transformers_version": "4.51.0",
        },
    ),
    "Qwen1.5-MoE-A2.7B": (
        14.3,
        {
            **QWEN,
            "architectures": ["Qwen2MoeForCausalLM"],
            "decoder_sparse_step": 1,
            "eos_token_id": 151643,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "max_position_embeddings": 8192,
            "max_window_layers": 21,
            "model_type": "qwen2_moe",
            "moe_intermediate_size": 1408,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": 5632,
            "sliding_window": 32768,
            "transformers_version": "4.39.0.dev0",
        },
    ),
    "OLMoE-1B-7B-0924": (
        6.92,
        {
            **COMMON,
            "architectures": ["OlmoeForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "clip_qkv": None,
            "eos_token_id": 50279,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "max_position_embeddings": 4096,
            "model_type": "olmoe",
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 16,
            "num_key_value_heads": 16,
            "output_router_logits": False,
            "pad_token_id": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "router_aux_loss_coef": 0.01,
            "transformers_version": "4.43.0.dev0",
            "vocab_size": 50304,
        },
    ),
    "Mixtral-8x7B-v0.1": (
        46.7,
        {
            **COMMON,
            "architectures": ["MixtralForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mixtral",
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "transformers_version": "4.36.0.dev0",
            "vocab_size": 32000,
        },
    ),
    "Llama-3.2-1B": (
        1.24,
        {
            **COMMON,
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "transformers_version": "4.45.0.dev0",
            "vocab_size": 128256,
        },
    ),
    "Qwen3-0.6B": (
        0.596,
        {
            **QWEN3,
            "architectures": ["Qwen3ForCausalLM"],
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_window_layers": 28,
            "model_type": "qwen3",
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rope_theta": 1000000,
            "tie_word_embeddings": True,
            "transformers_version": "4.51.0",
        },
    ),
    "Mistral-7B-v0.1": (
        7.24,
        {
            **COMMON,
            "architectures": ["MistralForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "transformers_version": "4.34.0.dev0",
            "vocab_size": 32000,
        },
    ),
}


def write_headers(folder: Path, name: str) -> dict[str, list[int]]:
    """Writes config.json and a file of weights with a header alone: what follows is a hole. Returns names and shapes
    of the model's parameters, as transformers' own class of it has them on disk; the file has more: scales, selection
    biases, and layers that predict further tokens."""
    values = PUBLISHED[name][1]
    (folder / "config.json").write_text(json.dumps(values))
    is_fp8 = "quantization_config" in values
    plain = {name: value for name, value in values.items() if name != "quantization_config"}
    plain["model_type"] = {"kimi_k2": "deepseek_v3"}.get(values["model_type"], values["model_type"])
    config = CONFIG_MAPPING[plain["model_type"]].from_dict(copy.deepcopy(plain))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state = {key: tensor for key, tensor in model.state_dict().items() if key not in model.all_tied_weights_keys}
    shapes = {key: list(tensor.shape) for key, tensor in revert_weight_conversion(model, state).items()}
    stored, hidden = dict(shapes), values["hidden_size"]
    last, first_extra = values["num_hidden_layers"] - 1, values["num_hidden_layers"]
    for layer in range(first_extra, first_extra + values.get("num_nextn_predict_layers", 0)):
        prefix = f"model.layers.{layer}."
        stored |= {
            key.replace(f"model.layers.{last}.", prefix): shape
            for key, shape in shapes.items()
            if key.startswith(f"model.layers.{last}.")
        }
        norms = ("enorm", "hnorm", "shared_head.norm")
        stored |= {f"{prefix}{norm}.weight": [hidden] for norm in norms}
        stored |= {f"{prefix}{key}.weight": shapes["lm_head.weight"] for key in ("embed_tokens", "shared_head.head")}
        stored[f"{prefix}eh_proj.weight"] = [hidden, 2 * hidden]
    tensors: dict[str, tuple[str, list[int]]] = {}
    for key, shape in stored.items():
        if is_fp8 and re.search(r"(_proj|_with_mqa|_a_proj|_b_proj|\.w[123])\.weight$", key) and "eh_proj" not in key:
            tensors[key] = ("F8_E4M3", shape)
            tensors[f"{key}_scale_inv"] = ("F32", [-(-size // 128) for size in shape])
        else:
            tensors[key] = ("F32" if key.endswith("e_score_correction_bias") else "BF16", shape)
    header, offset = {}, 0
    sizes = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
    for key, (dtype, shape) in tensors.items():
        end = offset + sizes[dtype] * prod(shape)
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + offset)
    return {key: shape for key, shape in shapes.items() if not key.endswith("e_score_correction_bias")}
