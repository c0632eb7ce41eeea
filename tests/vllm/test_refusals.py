"""What vLLM does not serve says so, with the field's name, before anything is computed."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from .helpers import CONTEXT, build_model, engine, serve


DIFFERENT = {
    "hidden_act": {"hidden_act": "gelu"},
    "attention_bias of qwen3": {"backbone": "qwen3", "attention_bias": True},
    "attention_bias of qwen3_moe": {"backbone": "qwen3_moe", "attention_bias": True},
    "attention_bias of olmoe": {"backbone": "olmoe", "num_attention_heads": 2, "attention_bias": True},
    "clip_qkv": {"backbone": "olmoe", "num_attention_heads": 2, "clip_qkv": 2.0},
    "backbone hunyuan_v1_moe": {"backbone": "hunyuan_v1_moe"},
    "rope_type": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    "rope_parameters": {
        "backbone": "llama",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "hidden_size": {"hidden_size": 80},
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_would_be_computed_differently(case, tmp_path):
    build_model(**DIFFERENT[case]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=case.partition(" ")[0]), engine(tmp_path):
        pass


@pytest.mark.parametrize("backbone", ["deepseek_v2", "deepseek_v3", "llama"])
def test_angles_of_the_rotary_embedding_are_compared(backbone):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from vllm_coe.attention import check_rotary_embedding

    config = build_model(backbone=backbone).config
    width = config.qk_rope_head_dim or config.head_dim
    with set_current_vllm_config(VllmConfig()):
        check_rotary_embedding(get_rope(width, CONTEXT, rope_parameters=config.rope_parameters), config)
        other = config.rope_parameters | {"rope_theta": 1.01 * config.rope_parameters["rope_theta"]}
        with pytest.raises(ValueError, match="rope_theta"):
            check_rotary_embedding(get_rope(width, CONTEXT, rope_parameters=other), config)


def test_options_that_count_one_call_of_the_experts(tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    from vllm_coe.configuration import differences

    build_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="enable_return_routed_experts"):
        EngineArgs(str(tmp_path), enable_return_routed_experts=True).create_engine_config()
    config = EngineArgs(str(tmp_path)).create_engine_config()
    assert not list(differences(config))
    config.parallel_config.enable_eplb = True  # which vLLM refuses by itself on CPUs
    assert [problem.partition(" ")[0] for problem in differences(config)] == ["`enable_eplb`"]


def test_heads_without_a_kernel(tmp_path):
    build_model(backbone="llama", head_dim=16).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="head_dim=16"), engine(tmp_path) as llm:
        serve(llm, [[1, 2, 3]])


def test_quantised_weights(tmp_path):
    model = build_model()
    model.config.quantization_config = {"quant_method": "torchao"}
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantization_config"), engine(tmp_path):
        pass


@pytest.mark.parametrize("layout", ["official", "fused"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("model.layers.1.mlp.gate.1.weight", "gate.1.weight"),
        ("model.layers.1.mlp.experts", "experts"),
        ("model.layers.1.self_attn.kv_b_proj.weight", "kv_b_proj"),
    ],
)
def test_checkpoints_that_lack_a_weight(layout, wrong, message, tmp_path):
    build_model().save_pretrained(tmp_path, save_original_format=layout == "official")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    lacking = next(name for name in tensors if name.startswith(wrong))
    save_file({name: tensor for name, tensor in tensors.items() if name != lacking}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(message)), engine(tmp_path):
        pass


@pytest.mark.parametrize("name", ["mlp.gate.2.weight", "self_attn.o_proj.bias"])
def test_checkpoints_with_a_weight_too_many(name, tmp_path):
    build_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file) | {f"model.layers.1.{name}": torch.zeros(8, 64)}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name.rpartition(".")[0]), engine(tmp_path):
        pass
