"""What the plugin takes from vLLM without a promise that it stays: what breaks without it."""

import inspect

import pytest
import torch


pytest.importorskip("vllm")

from vllm.config import CompilationConfig, LoRAConfig, ModelConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.llama import LlamaAttention
from vllm.model_executor.models.transformers.base import Base
from vllm.platforms.cpu import CpuPlatform
from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS


def test_registries_are_dictionaries_by_name():
    """Without them latent attention is not recognised, and nothing is refused."""
    assert "deepseek_v3" not in MODEL_ARCH_CONFIG_CONVERTORS and isinstance(MODEL_ARCH_CONFIG_CONVERTORS, dict)
    assert "DeepseekV32ForCausalLM" in MODELS_CONFIG_MAP


def test_attention_of_llama_is_scaled_after_its_rotary_embedding_is_made():
    """Otherwise the scale and the rotary embedding of other backbones would be those of Llama."""
    source = inspect.getsource(LlamaAttention.__init__)
    rotary, attention = source.index("self._init_rotary_emb("), source.index("self.attn = ")
    assert source.index("self.scaling = ") < rotary < attention < source.rindex("self.scaling")


def test_routers_are_asked_by_compute_routing():
    """Otherwise the handed-over weights and experts would be taken for logits."""
    assert "self._compute_routing(" in inspect.getsource(BaseRouter._select_experts)
    assert "router" in inspect.signature(FusedMoEFactory).parameters
    assert "self.router.select_experts(" in inspect.getsource(MoERunner._apply_quant_method)


def test_runners_reduce_what_they_return():
    """Otherwise the next iteration would route by a part of the sum."""
    assert "_maybe_reduce_final_output(" in inspect.getsource(MoERunner.forward)
    assert inspect.signature(FusedMoEFactory).parameters["reduce_results"].default is True


def test_layers_can_be_found_by_name():
    """Counted calls would give the second iteration the experts of the next layer."""
    assert "fast_moe_cold_start" in CompilationConfig.__dataclass_fields__


def test_adapters_of_modules_that_are_not_listed_are_refused():
    """Otherwise an adapter of the experts, or of what was absorbed, would be loaded and not applied."""
    assert "target_modules" in LoRAConfig.__dataclass_fields__
    assert "self.model.lora_manager = self" in inspect.getsource(LoRAModelManager.__init__)
    assert "self.supported_lora_modules" in inspect.getsource(LoRAModelManager.__init__)
    assert "expected_lora_modules" in inspect.signature(LoRAModel.from_local_checkpoint).parameters


def test_the_latent_cache_is_laid_out_by_what_the_processor_has():
    """Otherwise the tests would not see what a processor without AMX does with heads that are cached expanded."""
    source = inspect.getsource(CpuPlatform.check_and_update_config)
    assert f"torch.cpu.{torch.cpu._is_amx_tile_supported.__name__}()" in source and '"use_mla"' in source
    assert 'os.environ["VLLM_MLA_DISABLE"] = "1"' in inspect.getsource(Base._get_attn_cls)
    assert "envs.VLLM_MLA_DISABLE" in inspect.getsource(ModelConfig.use_mla.fget)
