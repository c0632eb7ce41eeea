# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Chain-of-Experts (CoE, arXiv 2506.18945): a decoder whose sparse layers chain their experts.

With `h` the residual stream after attention, C iterations, and one router per iteration, a sparse layer computes

    x_0     = post_attention_layernorm(h)
    y_t     = sum_k w_t[k] * expert_{i_t[k]}(x_t) + shared_experts(x_t),    (i_t, w_t) = router_t(x_t)
    x_{t+1} = x_t + y_t                                                     t = 0 .. C-1
    output  = x_C

and the other residual rules of `CoeConfig` (paper section 3, equations 5-10). Attention, rotary embedding and norms
are transformers' own, those of DeepSeek-V2 or another of the `backbones`. From top to bottom: router, experts, one
iteration, the layer that owns the chain, the models.

Shapes: B batch, S length, T = B * S tokens, H hidden, N experts, K chosen per token and iteration, I expert width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.nn import functional as F
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.dynamic_module_utils import custom_object_save
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Experts,
    DeepseekV2MLP,
    DeepseekV2PreTrainedModel,
    DeepseekV2TopkRouter,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import (
    _CAN_RECORD_REGISTRY,
    OutputRecorder,
    capture_outputs,
    install_output_capuring_hook,
)

from .backbones import BACKBONE_MODULES
from .balancing import balancing_losses, label_token_share, packed_sequences, router_scores
from .checkpoint import check_chain_keys, read_keys
from .configuration_coe import BACKBONES, CoeConfig
from .experts import COE_EXPERTS_FUNCTIONS, sharing_weights
from .quantization import layer_recipe, was_loaded_quantized
from .quantized_linear import prepare_quantized
from .releases import CACHE, cache_argument, initialize_rotary_embedding, slice_logits_to_keep, takes_cache
from .staging import staged_files
from .state_dict import (
    check_gatherable,
    fuse_expert_weights,
    gather_state_dict,
    is_sharded,
    rename_iteration_scale,
)


logger = logging.get_logger(__name__)


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """`factor * tensor`, at no cost where the factor is 1, as it is for most families."""
    return tensor if factor == 1 else tensor * factor


class CoeRouter(DeepseekV2TopkRouter):
    """Chooses K of N experts for every token and weighs them, in fp32 (or wider) whatever the model's dtype.

    Extends DeepSeek-V2's router by sigmoid scores, the selection bias of DeepSeek-V3, normalised weights, and choosing
    among the experts that earlier iterations have not used.
    """

    def __init__(self, config: CoeConfig, layer_idx: int = 0):
        super().__init__(config)
        # In a model that is built in half precision too, as in transformers from 5.24 on.
        self.weight = nn.Parameter(self.weight.float())
        self.top_k = config.experts_per_iteration(layer_idx)
        # A split layer ranks the experts of all its iterations, and each iteration takes its part of them.
        self.num_ranked = self.top_k * (config.num_iterations(layer_idx) if config.upcycling == "split" else 1)
        self.scoring_func = config.scoring_func
        normalizes_single_expert = BACKBONES[config.backbone].normalizes_single_expert
        self.norm_topk_prob = config.norm_topk_prob and (self.num_ranked > 1 or normalizes_single_expert)
        # The official code leaves normalised weights unscaled; DeepSeek-V3, where sigmoid scores come from, does not.
        if self.norm_topk_prob and self.scoring_func == "softmax":
            self.routed_scaling_factor = 1.0
        if self.topk_method == "noaux_tc":
            self.e_score_correction_bias = nn.Buffer(torch.zeros(self.num_experts, dtype=torch.float32))

    def _apply(self, *args, **kwargs) -> "CoeRouter":
        # What `to`, `half` and the like do. A selection bias moves by a thousandth a step, which half precision cannot
        # hold: it goes to another device, and to no dtype below float32.
        bias = getattr(self, "e_score_correction_bias", None)
        super()._apply(*args, **kwargs)
        if bias is not None and self.e_score_correction_bias.itemsize < torch.float32.itemsize:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device, torch.float32)
        return self

    def forward(
        self, hidden_states: torch.Tensor, used_experts: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor`): (B, S, H) or (T, H).
            used_experts (`torch.Tensor`, *optional*): (T, U) experts of earlier iterations of a split layer, which
                are not chosen again and count among those that the weights are normalised over.

        Returns:
            Raw logits (T, N), weights (T, K) and indices (T, K, int64) of the chosen experts, in no order.
        """
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        if self.training and self.weight.itemsize < torch.float32.itemsize and not torch.compiler.is_compiling():
            logger.warning_once(
                f"Routers are trained with weights in {self.weight.dtype}, as FSDP2's `param_dtype` and casts of the "
                "whole model make them, and some tokens choose other experts than in float32. Call "
                "`model.shard_routers(mesh)` before FSDP2 shards the model, or train under autocast."
            )
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with maybe_autocast(hidden_states.device.type, enabled=False):
            router_logits = F.linear(hidden_states.to(dtype), self.weight.to(dtype))
            scores = router_scores(router_logits, self.scoring_func)
            top_k_index = self.choose(scores, used_experts)
            top_k_weights = scores.gather(-1, top_k_index)
            if self.norm_topk_prob:
                top_k_weights = top_k_weights / (top_k_weights.sum(dim=-1, keepdim=True) + 1e-20)
            if self.routed_scaling_factor != 1:
                top_k_weights = top_k_weights * self.routed_scaling_factor
        first = 0 if used_experts is None else used_experts.shape[-1]
        taken = slice(first, first + self.top_k)
        return router_logits, top_k_weights[:, taken], top_k_index[:, taken]

    def choose(self, scores: torch.Tensor, used_experts: torch.Tensor | None = None) -> torch.Tensor:
        """Indices (T, K) of the experts chosen by their scores (T, N) under `topk_method`. In a split layer they are
        (T, C * K): those used before, then the others in falling order."""
        if self.topk_method == "noaux_tc":
            scores = scores + self.e_score_correction_bias.to(scores.dtype)
        if self.topk_method != "greedy" and (num_groups := self.num_group or 1) > 1:
            grouped = scores.view(-1, num_groups, self.num_experts // num_groups)
            # DeepSeek-V2 ranks a group by its best expert, DeepSeek-V3 by its best two.
            best = min(2, grouped.shape[-1]) if self.topk_method == "noaux_tc" else 1
            group_scores = grouped.topk(best, dim=-1).values.sum(dim=-1)
            kept_groups = group_scores.topk(self.topk_group or 1, dim=-1, sorted=False).indices
            dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, kept_groups, False)
            scores = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)
        if used_experts is not None:
            scores = scores.scatter(-1, used_experts, float("inf"))
        return scores.topk(self.num_ranked, dim=-1, sorted=self.num_ranked > self.top_k).indices


@use_experts_implementation(experts_interface=COE_EXPERTS_FUNCTIONS)
class CoeExperts(DeepseekV2Experts):
    """The N experts of one layer as two fused parameters, `gate_up_proj` (N, 2I, H) and `down_proj` (N, H, I).

    `experts_implementation` decides which kernel computes them; this forward is the `"eager"` one.
    """

    def __init__(self, config: CoeConfig):
        super().__init__(config)
        self.stop_sharing()
        self.register_load_state_dict_pre_hook(fuse_expert_weights)

    def stop_sharing(self) -> None:
        """Forgets what the iterations of a chain share while they run, see `sharing_weights`."""
        self.is_sharing_weights, self.shared_weights, self.adapters = False, {}, {}

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor`): (T, H).
            top_k_index (`torch.Tensor`): (T, K) experts; ids of N and more are computed by another rank.
            top_k_weights (`torch.Tensor`): (T, K) routing weights, fp32 or wider.

        Returns:
            `torch.Tensor`: (T, H) weighted sum of the chosen experts, accumulated in the dtype of the weights and
            returned in the dtype of `hidden_states`.
        """
        if hasattr(self.gate_up_proj, "ds_id"):
            # It compares which modules the ranks have called; the activation is called once for every expert chosen.
            raise ValueError(
                '`experts_implementation="eager"` does not work with DeepSpeed ZeRO-3, which needs the same calls of '
                'modules on every rank. Set `experts_implementation="grouped_mm"` or `"batched_mm"`.'
            )
        gate_up_proj, down_proj = self.gate_up_proj, self.down_proj
        output = torch.zeros(hidden_states.shape, dtype=top_k_weights.dtype, device=hidden_states.device)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:
                continue
            token, slot = torch.where(top_k_index == expert)
            expert_output = F.linear(hidden_states[token], gate_up_proj[expert])
            expert_output = F.linear(self._apply_gate(expert_output), down_proj[expert])
            output.index_add_(0, token, expert_output * top_k_weights[token, slot, None])
        return output.to(hidden_states.dtype)


class CoeMoE(nn.Module):
    """One iteration of the chain: its router, the routed experts it chooses, and the shared experts.

    The loop over iterations lives in [`CoeDecoderLayer`], so that whoever reduces over ranks at the end of this module
    does so before the next iteration routes.
    """

    def __init__(self, config: CoeConfig, layer_idx: int = 0):
        super().__init__()
        self.use_igate = config.use_igate
        self.gate = (
            nn.ModuleList([CoeRouter(config, layer_idx) for _ in range(config.num_iterations(layer_idx))])
            if config.use_igate
            else CoeRouter(config, layer_idx)
        )
        self.experts = CoeExperts(config)
        self.shares_once = config.upcycling == "split"
        self.shared_experts = self.shared_expert_gate = None
        if config.shared_expert_width:
            self.shared_experts = DeepseekV2MLP(config, intermediate_size=config.shared_expert_width)
            if BACKBONES[config.backbone].gates_shared_experts:
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, iteration: int = 0, used_experts: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor`): (B, S, H), the input `x_t` of this iteration.
            iteration (`int`, defaults to 0): t, from 0 to C-1; chooses the router.
            used_experts (`torch.Tensor`, *optional*): (T, t * K) experts of the earlier iterations of a split layer,
                which are not chosen again.

        Returns:
            `y_t` without any residual, (B, S, H), and the experts chosen, (T, K), int64.
        """
        router = self.gate[iteration] if self.use_igate else self.gate
        _, top_k_weights, top_k_index = router(hidden_states, used_experts)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        output = self.experts(tokens, top_k_index, top_k_weights).view_as(hidden_states)
        if self.shared_experts is not None and not (self.shares_once and iteration > 0):
            shared_output = self.shared_experts(hidden_states)
            if self.shared_expert_gate is not None:
                shared_output = self.shared_expert_gate(hidden_states).sigmoid() * shared_output
            output = output + shared_output
        return output, top_k_index


class CoeIterationScale(nn.Module):
    """The learned vectors `s_t` of a converted chain, (C-1, H): how much of an iteration's output the next one sees.

    A module of its own, so that PEFT can train it as a whole beside low-rank adapters (`modules_to_save`).
    """

    def __init__(self, num_iterations: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_iterations - 1, hidden_size))

    def forward(self, y: torch.Tensor, iteration: int) -> torch.Tensor:
        """`s_t * y_t`, of the shape and dtype of `y` (B, S, H)."""
        return self.weight[iteration].to(y.dtype) * y


class ExpertChain:
    """The chain of one layer, for decoder layers of any engine's parts. Reads what `build_chain` has set, and the
    modules `post_attention_layernorm` and `mlp` (called as [`CoeMoE`])."""

    def build_chain(self, config: CoeConfig, layer_idx: int, norm: type[nn.Module]) -> None:
        """Gives layer `layer_idx` what its chain has, if it has one; `norm` is the engine's class."""
        self.num_iterations = config.num_iterations(layer_idx)
        self.residual_rule = config.residual_rule_of(layer_idx)
        if not self.num_iterations:
            return
        self.iteration_multiplier, self.reinject = config.iteration_multiplier(layer_idx), config.reinject
        self.iteration_norms = self.branch_norms = None
        # Only these rules have the un-normalised stream to read.
        self.chains_stream = config.iteration_norm and self.residual_rule in ("prenorm", "refine", "split")

        def norms(count: int) -> nn.ModuleList:
            return nn.ModuleList([norm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(count)])

        if config.iteration_norm and self.num_iterations > 1:
            self.iteration_norms = norms(self.num_iterations - 1)
        if config.branch_norm:
            self.branch_norms = norms(self.num_iterations)
        if self.residual_rule in ("refine", "split"):
            self.iteration_scale = CoeIterationScale(self.num_iterations, config.hidden_size)

    def chain(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Runs the C iterations on the residual stream `h` (B, S, H) and returns the layer's output, of that shape."""
        rule, used_experts = self.residual_rule, None
        x = self.post_attention_layernorm(hidden_states)
        z = z_0 = hidden_states if self.chains_stream else x
        with sharing_weights(self.mlp.experts):
            for iteration in range(self.num_iterations):
                if iteration > 0:
                    x = self.read(z_0, z, iteration)
                y, chosen_experts = self.mlp(x, iteration, used_experts)
                y = self.scale_output(y, iteration)
                if rule == "split":
                    used_experts = chosen_experts if iteration == 0 else torch.cat((used_experts, chosen_experts), -1)
                if rule in ("prenorm", "split"):
                    hidden_states = hidden_states + y
                z = self.step(z_0, z, y, iteration)
        if rule in ("prenorm", "split"):
            return hidden_states
        if rule == "refine":
            return hidden_states + y
        return hidden_states + z if rule in ("outer", "both") else z

    def read(self, z_0: torch.Tensor, z: torch.Tensor, iteration: int) -> torch.Tensor:
        """`x_t` for t > 0, what the experts read: `z_t`, with some of `z_0` and through a norm where there are such
        options."""
        if self.reinject is not None:
            z = z + self.reinject / (iteration + 1) * (z_0 - z)
        return z if self.iteration_norms is None else self.iteration_norms[iteration - 1](z)

    def scale_output(self, y: torch.Tensor, iteration: int) -> torch.Tensor:
        """`y_t` of what the experts return, normed and scaled where there are such options."""
        y = y if self.branch_norms is None else self.branch_norms[iteration](y)
        return scaled(y, self.iteration_multiplier)

    def step(self, z_0: torch.Tensor, z: torch.Tensor, y: torch.Tensor, iteration: int) -> torch.Tensor:
        """`z_{t+1}` by the residual rule, all (B, S, H)."""
        if self.residual_rule in ("inner", "both", "prenorm"):
            return z + y
        if self.residual_rule == "init":
            return z_0 + y
        if self.residual_rule in ("refine", "split"):
            is_last = iteration == self.num_iterations - 1
            return z if is_last else z + self.iteration_scale(y, iteration)
        return y


class CoeDecoderLayer(ExpertChain, GradientCheckpointingLayer):
    """Attention, then the chain of experts, or a plain pre-norm MLP where the layer is dense."""

    def __init__(self, config: CoeConfig, layer_idx: int):
        super().__init__()
        backbone = BACKBONE_MODULES[config.backbone]
        self.is_sparse = config.is_sparse_layer(layer_idx)
        self.residual_multiplier = config.residual_multiplier
        self.self_attn = backbone.attention(config, layer_idx)
        self.mlp = CoeMoE(config, layer_idx) if self.is_sparse else DeepseekV2MLP(config)
        self.input_layernorm = backbone.norm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = backbone.norm(config.hidden_size, eps=config.rms_norm_eps)
        self.build_chain(config, layer_idx, backbone.norm)
        if hasattr(self, "iteration_scale"):
            self.register_load_state_dict_pre_hook(rename_iteration_scale)

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attention_output, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **cache_argument(cache),
            **kwargs,
        )
        hidden_states = hidden_states + scaled(attention_output, self.residual_multiplier)
        if not self.is_sparse:
            output = self.mlp(self.post_attention_layernorm(hidden_states))
            return hidden_states + scaled(output, self.residual_multiplier)
        return self.chain(hidden_states)


# What a saved folder needs to load where this package is not installed.
AUTO_MAP = {
    "AutoConfig": "configuration_coe.CoeConfig",
    "AutoModel": "modeling_coe.CoeModel",
    "AutoModelForCausalLM": "modeling_coe.CoeForCausalLM",
    "AutoModelForSequenceClassification": "modeling_coe.CoeForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_coe.CoeForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_coe.CoeForQuestionAnswering",
}


@auto_docstring
class CoePreTrainedModel(DeepseekV2PreTrainedModel):
    config: CoeConfig
    _no_split_modules = ["CoeDecoderLayer"]
    # Routers and their selection biases: an expression for transformers, and parts of names, which vLLM looks for.
    _keep_in_fp32_modules_strict = [r"mlp\.gate\b", "mlp.gate.weight", *(f"mlp.gate.{digit}" for digit in range(10))]
    _can_record_outputs = {
        "hidden_states": [OutputRecorder(CoeDecoderLayer, index=0)],
        "attentions": [OutputRecorder(backbone.attention, index=1) for backbone in BACKBONE_MODULES.values()],
        "router_logits": [OutputRecorder(CoeRouter, index=0)],
        "router_indices": [OutputRecorder(CoeRouter, index=2)],
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # covers the routers' weights and the experts' 3D parameters
        initialize_rotary_embedding(module)
        if isinstance(module, CoeRouter) and module.topk_method == "noaux_tc":
            init.zeros_(module.e_score_correction_bias)
        if isinstance(module, CoeIterationScale):
            init.zeros_(module.weight)

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        # transformers records for the classes that a model was built as. FSDP2 makes a class of its own for a built
        # model, and a process that unpickles one builds none: no router would be recorded, nor balanced, there.
        _CAN_RECORD_REGISTRY.setdefault(str(cls), cls._can_record_outputs)

    def _get_name(self) -> str:
        # The name that tables of names hold (see the end of this file), FSDP2's class or not.
        return self._model_class().__name__

    @classmethod
    def _model_class(cls) -> type:
        """This class, or the one below it where FSDP2 made `cls`, whose module is torch's."""
        return next(base for base in cls.__mro__ if not issubclass(base, FSDPModule))

    @classmethod
    def is_remote_code(cls) -> bool:
        # transformers would save the code of the module that FSDP2's class is from.
        return super().is_remote_code() and cls is cls._model_class()

    def shard_routers(self, mesh: DeviceMesh, offload_policy: OffloadPolicy | None = None) -> None:
        """Makes every router a unit of FSDP2 of its own, in float32. Call it before `fully_shard` or accelerate shards
        the rest with a `param_dtype` that would cast the routers; `from_pretrained(distributed_config=...)` does it.

        Args:
            mesh (`DeviceMesh`): The mesh that the rest of the model is sharded over, see `fully_shard`.
            offload_policy (`OffloadPolicy`, *optional*): That of the rest of the model.
        """
        for module in self.modules():
            if isinstance(module, CoeRouter):
                # Small enough to stay whole until the backward pass.
                options = {"reshard_after_forward": False, "offload_policy": offload_policy or OffloadPolicy()}
                fully_shard(module, mesh=mesh, **options)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        num_experts, ep_size = model.config.n_routed_experts or 0, getattr(distributed_config, "ep_size", 1)
        if num_experts % ep_size:
            raise ValueError(
                f"`n_routed_experts={num_experts}` does not divide over `ep_size={ep_size}`. Set an `ep_size` that "
                "divides it, or leave it out: `fsdp_size` shards any number of experts."
            )
        if mesh_manager is not None:
            model._prepare_for_fsdp(distributed_config, mesh_manager)
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def _prepare_for_fsdp(self, distributed_config, mesh_manager) -> None:
        """Lets transformers' FSDP2 keep tied embeddings one weight, and routers in float32."""
        fsdp_size, tp_size = distributed_config.fsdp_size, distributed_config.tp_size
        is_replicated = getattr(distributed_config, "dp_replicate_size", 1) > 1  # 5.19 has none
        if self.config.tie_word_embeddings and fsdp_size > 1:
            # transformers ties the two weights after sharding them. Where a shard is padded, each has a padded copy of
            # its own from then on, of which an optimizer moves one. Tied before, and without a rule of the head, they
            # are one weight of the root.
            if tp_size == 1:
                self.tie_weights(recompute_mapping=False)
                self._fsdp_plan.pop("lm_head", None)
            elif self.config.vocab_size % (fsdp_size * tp_size):
                raise ValueError(
                    f"`vocab_size={self.config.vocab_size}` does not divide over `fsdp_size * tp_size = "
                    f"{fsdp_size * tp_size}`, where tied embeddings train wrongly. Set `tie_word_embeddings=False` "
                    "or pad the vocabulary with `resize_token_embeddings`."
                )
        if distributed_config.fsdp_mixed_precision and (fsdp_size > 1 or is_replicated):
            mesh = mesh_manager.get_mesh(("dp_replicate", "fsdp") if is_replicated else "fsdp")
            self.shard_routers(mesh, CPUOffloadPolicy() if distributed_config.fsdp_cpu_offload else None)

    def _resolve_parallel_plans(self, distributed_config) -> tuple[dict[str, str], ...]:
        # From 5.23 on, a model in half precision has rules for the routers too, which may be units already.
        *plans, fsdp_plan = super()._resolve_parallel_plans(distributed_config)
        units = {name for name, module in self.named_modules() if isinstance(module, FSDPModule)}
        return *plans, {name: style for name, style in fsdp_plan.items() if name not in units}

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, **kwargs):
        # Given tensors and adapters (which name the keys they expect) need not be whole models.
        is_whole_model = state_dict is None and "expected_keys" not in kwargs
        is_checked = is_whole_model and load_config.hf_quantizer is None and not load_config.ignore_mismatched_sizes
        if is_checked:
            keys = read_keys(checkpoint_files)
            for transform in load_config.weight_mapping or []:
                if isinstance(transform, WeightRenaming):
                    keys = [transform.rename_source_key(key)[0] for key in keys]
            check_chain_keys(keys, model.config)
        loaded = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, **kwargs)
        if is_checked:
            # The only shared experts that may be too many have no elements: there is nothing to report.
            unexpected = loaded[0].unexpected_keys
            unexpected -= {key for key in unexpected if ".mlp.shared_experts." in key}
        if load_config.hf_quantizer is not None:
            load_config.hf_quantizer.quantization_config = layer_recipe(load_config.hf_quantizer.quantization_config)
            prepare_quantized(model)
        return loaded

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        **kwargs,
    ) -> None:
        """Saves like [`PreTrainedModel.save_pretrained`], but whole or not at all: the files are written to a hidden
        folder inside `save_directory` and moved at the end (not with `push_to_hub` or `distributed_checkpoint`). The
        folder also carries the code it needs to load with `trust_remote_code=True` where this package is missing, and
        a model card unless it has one.

        All ranks call it for a model that FSDP2 has sharded, whoever called that: the weights are gathered and rank 0
        writes. `ValueError` where they cannot be gathered from here (FSDP1, ZeRO-3), or where `distributed_checkpoint`
        is asked for a model that was not loaded with a `distributed_config`; nothing is written then."""
        is_distributed_checkpoint = kwargs.get("distributed_checkpoint", False)
        if is_distributed_checkpoint and not self.is_distributed_loading_by_transformers:
            raise ValueError(
                "`distributed_checkpoint=True` needs a model that `from_pretrained(distributed_config=...)` has "
                "sharded. Leave it out: the weights of any sharded model are gathered."
            )
        is_gathered = False
        if state_dict is None and not self.is_distributed_loading_by_transformers:
            check_gatherable(self)
            is_gathered = is_sharded(self)
            if is_gathered:
                state_dict = gather_state_dict(self)
        if self._model_class().__module__ == __name__:  # the code of a subclass elsewhere is its author's to map
            self.config.auto_map = dict(AUTO_MAP)
        if was_loaded_quantized(self):
            # transformers cannot undo how it has read torchao's tensors. They are in the fused layout anyway.
            kwargs.setdefault("save_original_format", False)
        kwargs |= {"is_main_process": is_main_process, "state_dict": state_dict, "max_shard_size": max_shard_size}
        is_writer = self.should_save_on_this_rank(is_main_process)
        if push_to_hub or is_distributed_checkpoint or not is_writer:
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
            if is_writer:
                self._write_code(save_directory)
        else:
            with staged_files(save_directory) as staging:
                super().save_pretrained(staging, **kwargs)
                self._write_code(staging)
                if not (Path(save_directory) / "README.md").exists():
                    self.write_model_card(staging, name=Path(save_directory).resolve().name)
        # The parent's barrier came before the files were in place.
        self.barrier_after_gathered_checkpoint_save(getattr(self.config, "distributed_config", None))
        if is_gathered:
            dist.barrier()

    def _write_code(self, folder: str | Path) -> None:
        """Writes the code of a model that FSDP2 has made a class for, which transformers leaves out of a folder."""
        if isinstance(self, FSDPModule):
            custom_object_save(CoePreTrainedModel, folder)
            custom_object_save(self.config, folder)  # not the module of that name beside the model's

    def write_model_card(self, folder: str | Path, **details) -> None:
        """Writes the model card of a folder, or completes it. The installed package puts `model_cards.write` in this
        place; the code that a folder carries writes none."""

    def _upload_modified_files(self, working_dir: str | Path, repo_id: str, *args, **kwargs):
        # transformers has just put the card of the repository there or, where that has none, an empty form.
        self.write_model_card(working_dir, repo_id=repo_id)
        self._write_code(working_dir)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


@dataclass
class CoeModelOutputWithPast(MoeModelOutputWithPast):
    """
    Output of [`CoeModel`].

    Args:
        router_indices (`tuple[torch.Tensor, ...]`, *optional*):
            Experts (T, K) chosen in every router call, in the order of `router_logits`, with
            `output_router_indices=True`.
    """

    router_indices: tuple[torch.Tensor, ...] | None = None


class _CapturingHook:
    """transformers' hook that records an output of a module, in a form that can be pickled."""

    def __init__(self, key: str, index: int):
        self.key, self.index = key, index
        module = nn.Module()
        install_output_capuring_hook(module, key, index)
        (self.hook,) = module._forward_hooks.values()

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.hook(module, args, output)

    def __reduce__(self) -> tuple:
        return type(self), (self.key, self.index)


@auto_docstring
class CoeModel(CoePreTrainedModel):
    def __init__(self, config: CoeConfig):
        super().__init__(config)
        config.validate()  # fields may have been set after construction
        backbone = BACKBONE_MODULES[config.backbone]
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [CoeDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = backbone.norm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = backbone.rotary_embedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()
        self._install_capturing_hooks()

    def _install_capturing_hooks(self) -> None:
        # Training always records the routers. transformers would install its hooks on first use, where they break a
        # compiled first call, and cannot be pickled.
        for key, recorders in self._can_record_outputs.items():
            for recorder in recorders:
                for module in self.modules():
                    if isinstance(module, recorder.target_class):
                        module.register_forward_hook(_CapturingHook(key, recorder.index))
        self._output_capturing_hooks_installed = True

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CoeModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must pass exactly one of input_ids or inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if cache is not None:
            self._check_cached_latents(cache)

        # One mask per kind of layer where the backbone has kinds; `generate` may have made them already.
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = create_masks_for_generate(
                self.config, inputs_embeds, attention_mask, cache, position_ids=position_ids
            )
        # After the masks, which keep packed sequences (told by the caller's positions) apart only without a cache.
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past_length = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + past_length
        hidden_states = scaled(inputs_embeds, self.config.embedding_multiplier)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer_idx, decoder_layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=masks[self.config.layer_types[layer_idx]] if isinstance(masks, dict) else masks,
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **cache_argument(cache),
                **kwargs,
            )
        return CoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})

    def _check_cached_latents(self, cache: Cache) -> None:
        """Refuses the keys and values of heads, which PEFT's prefix tuning makes, where attention has latents."""
        rank = self.config.kv_lora_rank
        if rank is None:
            return
        cached = getattr(cache.layers[0], "keys", None) if cache.layers else None
        if not isinstance(cached, torch.Tensor) or cached.dim() != 4:
            return
        if (cached.shape[1], cached.shape[3]) != (1, rank):
            raise ValueError(
                f"The cache holds keys of {cached.shape[1]} heads of width {cached.shape[3]}, but "
                f"`backbone={self.config.backbone!r}` caches one latent of width `kv_lora_rank={rank}` for all "
                "heads. Prefix tuning does not fit latent attention; use prompt tuning or LoRA."
            )


@dataclass
class CoeCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """
    Output of [`CoeForCausalLM`].

    Args:
        loss (`torch.Tensor`, *optional*):
            Cross-entropy; in training plus `aux_loss_alpha * aux_loss + router_z_loss_coef * router_z_loss`, scaled by
            the batch's share of label tokens where `num_items_in_batch` is given.
        aux_loss (`torch.Tensor`, *optional*):
            Load-balancing loss summed over layers and iterations, without its coefficient. Present in training with
            `aux_loss_alpha > 0`, and whenever router logits are asked for.
        router_z_loss (`torch.Tensor`, *optional*):
            Router z-loss summed over layers and iterations, without its coefficient, where that is not 0.
        logits (`torch.Tensor`): (B, S, vocabulary) scores before softmax.
        router_logits (`tuple[torch.Tensor, ...]`, *optional*):
            Raw logits (T, N) of every router call, with `output_router_logits=True`: sparse layers in order, the
            iterations of each in order.
        router_indices (`tuple[torch.Tensor, ...]`, *optional*):
            Experts (T, K) chosen in every router call, in the order of `router_logits`.
    """

    router_z_loss: torch.Tensor | None = None
    router_indices: tuple[torch.Tensor, ...] | None = None


@auto_docstring
class CoeForCausalLM(CoePreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: CoeConfig):
        super().__init__(config)
        self.model = CoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def needs_balancing(self) -> bool:
        """Whether the training loss of this model has a balancing term."""
        config = self.config
        return config.num_sparse_layers > 0 and (config.aux_loss_alpha > 0 or config.router_z_loss_coef > 0)

    def init_continuous_batching(self, *args, **kwargs) -> ContinuousBatchingManager:
        # `generate_batch`, `continuous_batching_context_manager` and `transformers serve` all come through here.
        if BACKBONES[self.config.backbone].has_latent_attention:
            raise ValueError(
                f"`backbone={self.config.backbone!r}` has latent attention, which transformers' paged cache does not "
                "hold. Use `generate` with padded prompts, or `transformers serve` without `--continuous-batching`."
            )
        return super().init_continuous_batching(*args, **kwargs)

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs) -> None:
        if enable:
            self._refuse_reentrant_checkpointing(kwargs.get("gradient_checkpointing_func"))
        super()._set_gradient_checkpointing(enable, **kwargs)

    def _refuse_reentrant_checkpointing(self, checkpointing_func: Callable | None) -> None:
        # Router logits recorded inside a reentrant checkpoint (torch's default kind) have no gradient.
        keywords = getattr(checkpointing_func, "keywords", {"use_reentrant": False})
        if self.needs_balancing and keywords.get("use_reentrant") is not False:
            raise ValueError(
                "Checkpointing with `use_reentrant=True`, or with it unset, cuts the gradient of the router losses "
                f"(`aux_loss_alpha={self.config.aux_loss_alpha}`, "
                f"`router_z_loss_coef={self.config.router_z_loss_coef}`). Use `use_reentrant=False`, or set both to 0."
            )

    @can_return_tuple
    @auto_docstring
    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CoeCausalLMOutputWithPast:
        r"""
        output_router_logits (`bool`, *optional*):
            Whether to return the routers' logits and choices, and with them the auxiliary loss, in evaluation too.
            Defaults to `config.output_router_logits`. The loss of a training step does not depend on it.

        Example:

        ```python
        >>> import modeling_coe
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer

        >>> model = AutoModelForCausalLM.from_pretrained("path/to/coe")
        >>> tokenizer = AutoTokenizer.from_pretrained("path/to/coe")
        >>> inputs = tokenizer("Tom has 3 apples and buys 4 more.", return_tensors="pt")
        >>> tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=20))
        ```"""
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        record_routers = output_router_logits or (self.training and self.needs_balancing)
        if self.training and self.model.gradient_checkpointing:
            self._refuse_reentrant_checkpointing(self.model._gradient_checkpointing_func)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=record_routers,
            output_router_indices=record_routers,
            **cache_argument(cache),
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(scaled(hidden_states, 1 / self.config.logits_scaling))

        loss = aux_loss = router_z_loss = None
        if record_routers and outputs.router_logits:
            batch_size, length = outputs.last_hidden_state.shape[:2]
            aux_loss, router_z_loss = balancing_losses(
                outputs.router_logits,
                outputs.router_indices,
                self.config,
                batch_size=batch_size,
                token_mask=_token_mask(attention_mask, length),
                sequence_ids=None if position_ids is None else packed_sequences(position_ids, batch_size),
            )
        if labels is None and aux_loss is not None and self.training and "num_items_in_batch" in kwargs:
            logger.warning_once(
                "The loss is computed outside of the model (`label_smoothing_factor` or `compute_loss_func`), without "
                f"its balancing term (`aux_loss_alpha={self.config.aux_loss_alpha}`). Add `config.aux_loss_alpha * "
                "outputs.aux_loss` in a `compute_loss_func`, or balance by selection biases."
            )
        if labels is not None:
            if labels.shape != logits.shape[:-1]:
                raise ValueError(
                    f"`labels` has shape {tuple(labels.shape)}, but the logits are for {tuple(logits.shape[:-1])} "
                    "(batch, length). Pass one label per input token, -100 where no loss is wanted; the model shifts "
                    "them itself."
                )
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if self.training and aux_loss is not None:
                share = label_token_share(
                    labels.to(loss.device), kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
                )
                balancing = self.config.aux_loss_alpha * aux_loss
                if router_z_loss is not None:
                    balancing = balancing + self.config.router_z_loss_coef * router_z_loss
                loss = loss + share * balancing.to(loss.device)

        return CoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            router_z_loss=router_z_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
            router_indices=outputs.router_indices if output_router_logits else None,
            **{CACHE: getattr(outputs, CACHE)},
        )


def _token_mask(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """The (B, S) mask of real tokens among the last `length` ones, or `None` where the mask does not tell. Numbers
    other than 0, which collators give the sequences of a packed row, are true."""
    is_padding_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2
    return attention_mask[:, -length:].bool() if is_padding_mask else None


class CoeForSequenceClassification(GenericForSequenceClassification, CoePreTrainedModel):
    pass


class CoeForTokenClassification(GenericForTokenClassification, CoePreTrainedModel):
    pass


class CoeForQuestionAnswering(GenericForQuestionAnswering, CoePreTrainedModel):
    pass


# The installed package and a folder's own code both need these two to load a checkpoint: per-expert tensors on disk
# become fused ones in memory (as for DeepSeek-V2), scales become modules, and the heads find their backbone.
register_checkpoint_conversion_mapping(
    CoeConfig.model_type,
    [
        *get_checkpoint_conversion_mapping("deepseek_v2"),
        WeightRenaming(r"iteration_scale(?!\.)", "iteration_scale.weight"),
    ],
    overwrite=True,
)
AutoModel.register(CoeConfig, CoeModel, exist_ok=True)

# Tables of names. `Trainer` shifts the labels that it smooths for the classes in one alone: others would learn to
# repeat their input. Pipelines, servers and harnesses look there too.
for _names, _model_class in (
    (MODEL_MAPPING_NAMES, CoeModel),
    (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, CoeForCausalLM),
    (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, CoeForSequenceClassification),
    (MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, CoeForTokenClassification),
    (MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, CoeForQuestionAnswering),
):
    _names[CoeConfig.model_type] = _model_class.__name__

__all__ = [
    "CoeForCausalLM",
    "CoeForQuestionAnswering",
    "CoeForSequenceClassification",
    "CoeForTokenClassification",
    "CoeModel",
    "CoePreTrainedModel",
]
