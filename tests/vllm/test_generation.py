"""Greedy tokens of vLLM, batched, against those of transformers, one prompt at a time, in float32."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from .helpers import (
    NEW_TOKENS,
    assert_same_generations,
    assert_served_apart,
    build_model,
    build_prompts,
    count,
    engine,
    generate,
    serve,
)


MODELS = {
    "inner": {"inner_iter": 3, "first_k_dense_replace": 1},
    "outer, one router": {"outer_residual": True, "inner_residual": False, "use_igate": False},
    "both, q_lora, biases": {"outer_residual": True, "q_lora_rank": 24, "attention_bias": True, "mlp_bias": True},
    "init, tied, other eps": {
        "init_residual": True,
        "inner_residual": False,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-3,
    },
    "none, no shared expert": {"inner_residual": False, "n_shared_experts": 0},
    "latents, yarn": {
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale": 0.7,
            "mscale_all_dim": 0.9,
        },
    },
    "deepseek_v3, groups": {
        "backbone": "deepseek_v3",
        "prenorm_residual": True,
        "chain_layers": [1],
        "q_lora_rank": 24,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "deepseek_v3, halves": {
        "backbone": "deepseek_v3",
        "rope_interleave": False,
        "topk_method": "group_limited_greedy",
    },
    "qwen2_moe, split": {
        "backbone": "qwen2_moe",
        "upcycling": "split",
        "norm_topk_prob": True,
        "sliding_window": 24,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "qwen2_moe, no bias": {"backbone": "qwen2_moe", "qkv_bias": False, "prenorm_residual": True},
    "qwen3_moe": {"backbone": "qwen3_moe", "upcycling": "refine", "sliding_window": 24, "norm_topk_prob": True},
    "olmoe": {"backbone": "olmoe", "num_attention_heads": 2, "rms_norm_eps": 1e-3, "prenorm_residual": True},
    "mixtral": {"backbone": "mixtral", "upcycling": "split", "sliding_window": 24, "n_shared_experts": 0},
    "llama": {
        "backbone": "llama",
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen3": {
        "backbone": "qwen3",
        "head_dim": 64,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "glm4_moe": {
        "backbone": "glm4_moe",
        "use_qk_norm": True,
        "attention_bias": True,
        "head_dim": 64,
        "upcycling": "split",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "glm4_moe, no norms": {
        "backbone": "glm4_moe",
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "minimax_m2": {
        "backbone": "minimax_m2",
        "num_attention_heads": 2,
        "upcycling": "refine",
        "n_shared_experts": 0,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "granitemoe, split": {
        "backbone": "granitemoe",
        "upcycling": "split",
        "first_k_dense_replace": 1,
        "n_shared_experts": 0,
        "norm_topk_prob": True,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 3.0,
    },
    "ernie4_5_moe": {
        "backbone": "ernie4_5_moe",
        "upcycling": "refine",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "attention_bias": True,
    },
    "stabilised": {
        "backbone": "qwen3",
        "prenorm_residual": True,
        "inner_iter": 3,
        "chain_layers": [0, 2],
        "iteration_norm": True,
        "branch_norm": True,
        "residual_scale": 4.0,
        "reinject": 0.5,
    },
    "dense": {"backbone": "qwen3", "n_routed_experts": None},
}
# A prefill of at most 32 tokens a step, blocks that hold fewer tokens than eight sequences need, and blocks kept for
# the prefix that the prompts have in common.
CROWDED = {
    "enable_prefix_caching": True,
    "max_num_batched_tokens": 32,
    "max_num_seqs": 8,
    "max_model_len": 192,
    "block_size": 32,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return build_model(**MODELS[request.param])


def test_tokens_equal_those_of_transformers(model, tmp_path):
    model.save_pretrained(tmp_path)
    prompts = build_prompts()
    expected = generate(model, prompts)
    with engine(tmp_path) as llm:
        assert_same_generations(serve(llm, prompts), expected)


def test_tokens_do_not_depend_on_chunks_prefixes_and_preemption(model, tmp_path):
    model.save_pretrained(tmp_path, save_original_format=False)  # the fused layout
    prompts = build_prompts(prefix=40)
    expected = generate(model, prompts)
    # Where layers differ in kind, each kind has blocks of its own.
    blocks = 14 if len(set(getattr(model.config, "layer_types", "?"))) == 1 else 20
    with engine(tmp_path, num_gpu_blocks_override=blocks, **CROWDED) as llm:
        first, again = serve(llm, prompts), serve(llm, prompts)
        assert count(llm, "num_preemptions") > 0
        # vLLM's latent attention on CPUs has no prefix caching.
        if llm.llm_engine.vllm_config.cache_config.enable_prefix_caching:
            assert count(llm, "prefix_cache_hits") > 0
        else:
            assert model.config.kv_lora_rank == 512
    assert_same_generations(first, expected)
    assert_same_generations(again, expected)
    assert all(len(tokens) == NEW_TOKENS for tokens, _ in first)


def test_shared_experts_without_width_are_none(tmp_path):
    """The official code stores them where a configuration says 0."""
    model = build_model(n_shared_experts=0)
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    shapes = {"gate_proj": (0, model.config.hidden_size), "down_proj": (model.config.hidden_size, 0)}
    tensors = load_file(file)
    for layer in model.config.sparse_layers:
        for projection, shape in (shapes | {"up_proj": shapes["gate_proj"]}).items():
            tensors[f"model.layers.{layer}.mlp.shared_experts.{projection}.weight"] = torch.empty(shape)
    save_file(tensors, file, {"format": "pt"})
    prompts = build_prompts()
    with engine(tmp_path) as llm:
        assert_same_generations(serve(llm, prompts), generate(model, prompts))


def test_compiled_models_generate_the_same(tmp_path):
    assert_served_apart(MODELS["qwen2_moe, split"], tmp_path, enforce_eager=False)
