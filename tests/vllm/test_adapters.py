"""Adapters of PEFT, served by vLLM: those of linear layers generate what they do under PEFT, others are refused."""

from pathlib import Path

import pytest
import torch

from .helpers import assert_same_generations, build_model, build_prompts, engine, generate, serve


peft = pytest.importorskip("peft")

ATTENTION = {
    "latent": ({"q_lora_rank": 24}, ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]),
    "grouped": ({"backbone": "qwen2_moe"}, ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "grouped and MLPs": (
        {"backbone": "qwen3", "first_k_dense_replace": 1},
        ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
    ),
}


def save_adapter(model: torch.nn.Module, folder: Path, **options) -> "peft.PeftModel":
    """Adapts a model in place, with weights that matter, and saves the adapter."""
    torch.manual_seed(3)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.mark.parametrize("case", ATTENTION)
def test_adapters_generate_what_they_do_under_peft(case, tmp_path):
    from vllm.lora.request import LoRARequest

    fields, modules = ATTENTION[case]
    model = build_model(**fields)
    model.save_pretrained(tmp_path / "base")
    prompts = build_prompts()
    without = generate(model, prompts)
    expected = generate(save_adapter(model, tmp_path / "adapter", target_modules=modules), prompts)
    assert [generation.tokens for generation in without] != [generation.tokens for generation in expected]
    with engine(tmp_path / "base", enable_lora=True, max_lora_rank=8) as llm:
        adapter = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
        assert_same_generations(serve(llm, prompts, lora_request=adapter), expected)
        assert_same_generations(serve(llm, prompts), without)


@pytest.mark.parametrize(
    "options",
    [
        {"target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": []},
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": ["q_proj"]},
    ],
)
def test_adapters_of_experts_are_refused(options, tmp_path):
    from vllm.lora.request import LoRARequest

    model = build_model(backbone="qwen2_moe")
    model.save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", **options)
    with engine(tmp_path / "base", enable_lora=True, max_lora_rank=8) as llm:
        before = serve(llm, [[1, 2, 3]])
        with pytest.raises(ValueError, match=r"received.*mlp\.experts"):
            llm.llm_engine.add_lora(LoRARequest("adapter", 1, str(tmp_path / "adapter")))
        assert serve(llm, [[1, 2, 3]]) == before


def test_adapters_of_absorbed_projections_are_refused(tmp_path):
    """vLLM's latent attention multiplies `kv_b_proj` into others when it loads, where no adapter reaches it."""
    from vllm.lora.request import LoRARequest

    model = build_model(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)
    model.save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", target_modules=["kv_b_proj"])
    adapter = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
    with engine(tmp_path / "base", enable_lora=True) as llm, pytest.raises(ValueError, match=r"received.*kv_b_proj"):
        llm.llm_engine.add_lora(adapter)
