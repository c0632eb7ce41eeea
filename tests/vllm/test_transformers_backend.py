"""The other road: vLLM's Transformers backend runs the model of `modeling_coe`, with vLLM's attention and experts."""

import os
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_coe import CoeModel

from .helpers import assert_same_generations, assert_served_apart, build_model, build_prompts, engine, generate, serve
from .test_generation import MODELS


SERVED = {
    name: MODELS[name]
    for name in (
        "qwen2_moe, split",
        "qwen3_moe",
        "olmoe",
        "mixtral",
        "llama",
        "qwen3",
        "glm4_moe",
        "both, q_lora, biases",
    )
} | {
    "ernie4_5_moe": MODELS["ernie4_5_moe"],
    "granitemoe, split": MODELS["granitemoe, split"] | {"logits_scaling": 1.0},
    "deepseek_v3, halves": MODELS["deepseek_v3, halves"]
    | {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "q_lora_rank": 24, "attention_bias": True},
    "qwen2_moe, outer": {
        "backbone": "qwen2_moe",
        "outer_residual": True,
        "inner_residual": False,
        "use_igate": False,
        "tie_word_embeddings": True,
        "mlp_bias": True,
    },
}
# What vLLM's latent attention has no kernel for is served with `VLLM_MLA_DISABLE=1`.
WITHOUT_LATENT_KERNEL = {
    "sizes": MODELS["deepseek_v3, groups"],
    "window": {
        "backbone": "deepseek_v3",
        "init_residual": True,
        "inner_residual": False,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "sliding_window": 24,
    },
}
# What the plugin's own model refuses, and leaves to this one.
SERVED_HERE_ALONE = {
    "clip_qkv": {"backbone": "olmoe", "num_attention_heads": 2, "clip_qkv": 1.0, "n_shared_experts": 0},
    "attention_bias": {"backbone": "qwen3_moe", "attention_bias": True},
    "head_dim": {**MODELS["minimax_m2"], "head_dim": 64},
    "hidden_act": {"backbone": "llama", "n_routed_experts": None, "hidden_act": "gelu"},
    "backbone": {"backbone": "hunyuan_v1_moe", "n_shared_experts": 1, "norm_topk_prob": True},
}


@pytest.fixture(autouse=True)
def restores_process(monkeypatch) -> Iterator[None]:
    """Undoes what the backend leaves in a process: a class that compiles its models, and no latent attention."""
    monkeypatch.setenv("VLLM_MLA_DISABLE", os.environ.get("VLLM_MLA_DISABLE", "0"))
    bases, attributes = CoeModel.__bases__, dict(vars(CoeModel))
    yield
    CoeModel.__bases__ = bases
    for name, value in dict(vars(CoeModel)).items():
        if name not in attributes:
            delattr(CoeModel, name)
        elif value is not attributes[name]:
            setattr(CoeModel, name, attributes[name])


def assert_served(fields: dict, folder, save: dict | None = None, **options) -> None:
    """Asserts that vLLM generates what transformers does with the model of these fields."""
    model = build_model(**fields)
    model.save_pretrained(folder, **save or {})
    prompts = build_prompts()
    expected = generate(model, prompts)
    with engine(folder, model_impl="transformers", **options) as llm:
        assert llm.llm_engine.vllm_config.model_config.using_transformers_backend()
        assert_same_generations(serve(llm, prompts), expected)


@pytest.mark.parametrize("name", SERVED)
def test_tokens_equal_those_of_transformers(name, tmp_path):
    assert_served(SERVED[name], tmp_path)


@pytest.mark.parametrize("name", SERVED_HERE_ALONE)
def test_serves_what_the_other_model_leaves_to_it(name, tmp_path):
    assert_served(SERVED_HERE_ALONE[name], tmp_path)
    with pytest.raises(ValueError, match=rf"`{name}` is .*: `--model-impl transformers`\."), engine(tmp_path):
        pass


@pytest.mark.parametrize("name", WITHOUT_LATENT_KERNEL)
def test_latents_without_a_kernel_need_the_cache_of_heads(name, tmp_path, monkeypatch):
    fields = WITHOUT_LATENT_KERNEL[name]
    with pytest.raises(ValueError, match=r"`kv_lora_rank` is (32|512), .* Set VLLM_MLA_DISABLE=1"):
        assert_served(fields, tmp_path)
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    assert_served(fields, tmp_path)


@pytest.mark.parametrize("amx", [True, False])
def test_expanded_heads_are_cached_alike_on_every_processor(amx, tmp_path, monkeypatch):
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    build_model(backbone="deepseek_v2").save_pretrained(tmp_path)
    config = EngineArgs(str(tmp_path), skip_tokenizer_init=True, model_impl="transformers").create_engine_config()
    assert config.cache_config.block_size % 32 == 0
    assert config.cache_config.enable_prefix_caching and config.scheduler_config.enable_chunked_prefill


def test_compiled_models_and_the_fused_layout(tmp_path):
    options = {"model_impl": "transformers", "enforce_eager": False}
    assert_served_apart(MODELS["qwen2_moe, split"], tmp_path, {"save_original_format": False}, **options)


@pytest.mark.parametrize("use_igate", [True, False])
def test_routers_stay_in_float32(use_igate, tmp_path):
    model = build_model(backbone="qwen2_moe", use_igate=use_igate, topk_method="noaux_tc", first_k_dense_replace=1)
    model.save_pretrained(tmp_path)
    expected = {name: tensor for name, tensor in model.state_dict().items() if ".mlp.gate." in name}
    with engine(tmp_path, model_impl="transformers", dtype="bfloat16") as llm:
        (served,) = llm.apply_model(lambda served: served.state_dict())
    assert served["model.embed_tokens.weight"].dtype == torch.bfloat16
    for name, tensor in expected.items():
        torch.testing.assert_close(served[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    "fields, options, message",
    [
        ({"backbone": "qwen3_moe", "hidden_act": "gelu"}, {}, "`hidden_act` is 'gelu'.* Use transformers"),
        (
            {"backbone": "qwen3_moe", "upcycling": "split", "chain_layers": [1]},
            {},
            r"`chain_layers` is \[1\].* 4 experts.*leave `model_impl` out",
        ),
        (
            {"backbone": "llama", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            {},
            r"`rope_parameters\['rope_type'\]` is 'dynamic'.* Use transformers",
        ),
        (
            {"backbone": "llama"},
            {"enable_expert_parallel": True, "tensor_parallel_size": 2},
            "`enable_expert_parallel` is True",
        ),
        ({"backbone": "granitemoe", "logits_scaling": 6.0}, {}, "`logits_scaling` is 6.0.*leave `model_impl` out"),
        ({"backbone": "llama"}, {"enable_return_routed_experts": True}, "`enable_return_routed_experts` is True"),
    ],
)
def test_refuses_what_it_would_compute_differently(fields, options, message, tmp_path):
    build_model(**fields).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message), engine(tmp_path, model_impl="transformers", **options):
        pass


def test_refuses_a_checkpoint_that_lacks_an_expert(tmp_path):
    """vLLM's loader does not miss one among others of its layer."""
    build_model(backbone="llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks mlp\.experts\.3"), engine(tmp_path, model_impl="transformers"):
        pass
