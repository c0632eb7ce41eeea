# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Chain-of-Experts for vLLM: the layers and models, and how they read a checkpoint.

Shapes: T tokens of all sequences together, H hidden.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.lora.model_manager import LoRAModelManager
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsPP
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from configuration_coe import BACKBONES, CoeConfig
from modeling_coe import CoeForCausalLM as CoeForCausalLMOfTransformers
from modeling_coe.checkpoint import check_chain_keys, shorten
from modeling_coe.modeling_coe import ExpertChain, scaled

from .attention import build_attention
from .configuration import module_name
from .experts import CoeMoE


class CoeDecoderLayer(ExpertChain, nn.Module):
    """Attention, then the chain of experts, or a plain pre-norm MLP where the layer is dense."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config: CoeConfig = vllm_config.model_config.hf_config
        layer_idx = int(prefix.rpartition(".")[2])
        self.residual_multiplier = config.residual_multiplier
        self.self_attn = build_attention(vllm_config, layer_idx, f"{prefix}.self_attn")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.build_chain(config, layer_idx, RMSNorm)
        if not self.num_iterations:
            self.mlp = LlamaMLP(
                config.hidden_size,
                config.intermediate_size,
                config.hidden_act,
                quant_config=vllm_config.quant_config,
                bias=config.mlp_bias,
                prefix=f"{prefix}.mlp",
            )
            return
        self.mlp = CoeMoE(vllm_config, layer_idx, f"{prefix}.mlp")

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        attention_output = self.self_attn(positions, self.input_layernorm(hidden_states))
        hidden_states = hidden_states + scaled(attention_output, self.residual_multiplier)
        if not self.num_iterations:
            output = self.mlp(self.post_attention_layernorm(hidden_states))
            return hidden_states + scaled(output, self.residual_multiplier)
        return self.chain(hidden_states)


@support_torch_compile
class CoeModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: CoeConfig = vllm_config.model_config.hf_config
        self.embedding_multiplier = config.embedding_multiplier
        pipeline = get_pp_group()
        self.embed_tokens = self.norm = PPMissingLayer()
        if pipeline.is_first_rank or (config.tie_word_embeddings and pipeline.is_last_rank):
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.embed_tokens",
            )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: CoeDecoderLayer(vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        if pipeline.is_last_rank:
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if not get_pp_group().is_first_rank:
            hidden_states = intermediate_tensors["hidden_states"]
        else:
            if inputs_embeds is None:
                inputs_embeds = self.embed_input_ids(input_ids)
            hidden_states = scaled(inputs_embeds, self.embedding_multiplier)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states = layer(positions, hidden_states)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states})
        return self.norm(hidden_states)


class CoeForCausalLM(nn.Module, SupportsLoRA, SupportsPP):
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
        "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
    }
    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: CoeConfig = vllm_config.model_config.hf_config
        self.config, self.quant_config = config, vllm_config.quant_config
        self.caches_latents = vllm_config.model_config.use_mla
        self.model = CoeModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size, scale=1 / config.logits_scaling)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    @property
    def lora_manager(self) -> LoRAModelManager | None:
        """What holds the adapters, set by vLLM."""
        return self._lora_manager

    @lora_manager.setter
    def lora_manager(self, manager: LoRAModelManager) -> None:
        if self.caches_latents:
            # Decoding multiplies by what was absorbed of it. vLLM refuses adapters of modules that are not listed.
            manager.supported_lora_modules.remove("kv_b_proj")
        self._lora_manager = manager

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Reads the official layout on disk (one tensor per expert and projection) and the fused one.

        Raises:
            ValueError: A router, an expert or another weight is missing or too many; the message names it.
        """
        names: list[str] = []

        def named() -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in weights:
                if weight.numel():  # the official code stores shared experts of width 0 where there are none
                    names.append(module_name(name))
                    yield names[-1], weight

        loaded = AutoWeightsLoader(self).load_weights(named(), mapper=self._weights_mapper())
        check_chain_keys([*names, *self._names_elsewhere(names)], self.config)
        self._check_other_keys(names)
        return loaded

    def _weights_mapper(self) -> WeightsMapper:
        stacked = {
            f"{mlp}.{projection}_proj": (f"{mlp}.gate_up_proj", shard)
            for mlp in (".mlp", ".mlp.shared_experts")  # the experts have a way of their own
            for shard, projection in enumerate(("gate", "up"))
        }
        if not BACKBONES[self.config.backbone].has_latent_attention:
            stacked |= {f".self_attn.{shard}_proj": (".self_attn.qkv_proj", shard) for shard in ("q", "k", "v")}
        elif self.caches_latents and self.config.q_lora_rank is not None:
            stacked |= {
                ".self_attn.q_a_proj": (".self_attn.fused_qkv_a_proj", 0),
                ".self_attn.kv_a_proj_with_mqa": (".self_attn.fused_qkv_a_proj", 1),
            }
        return WeightsMapper(orig_to_new_substr={".mlp.experts.": ".mlp.runner."}, orig_to_new_stacked=stacked)

    def _check_other_keys(self, names: list[str]) -> None:
        """Compares names of weights outside the chain with those of transformers' model: vLLM itself misses no weight
        of a linear layer, and drops a bias that the configuration does not have."""
        with torch.device("meta"):
            model = CoeForCausalLMOfTransformers(self.config)
        expected = set(model.state_dict())
        missing = {name for name in expected - set(names) if ".mlp.experts." not in name}
        if self.config.tie_word_embeddings:
            missing.discard("lm_head.weight")
        dropped = {name for name in set(names) - expected if name.endswith(".bias")}
        for problem, wrong in (("lacks", missing), ("has, beyond the model's,", dropped)):
            if wrong:
                raise ValueError(
                    f"The checkpoint {problem} {shorten(sorted(wrong))}. Correct it or its configuration."
                )

    def _names_elsewhere(self, names: list[str]) -> Iterator[str]:
        """Names of the experts that other ranks compute, which vLLM does not read here: as those computed here."""
        for layer_idx, layer in enumerate(self.model.layers):
            expert_map = layer.mlp.runner.expert_map if isinstance(getattr(layer, "mlp", None), CoeMoE) else None
            if expert_map is None:
                continue
            here = int((expert_map >= 0).nonzero()[0])
            prefix = f"model.layers.{layer_idx}.mlp.experts."
            for name in names:
                if name.startswith(f"{prefix}{here}."):
                    for expert in (expert_map < 0).nonzero().flatten().tolist():
                        yield name.replace(f"{prefix}{here}.", f"{prefix}{expert}.", 1)
