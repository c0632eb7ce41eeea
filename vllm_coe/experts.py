# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""One iteration of the chain on vLLM's fused experts.

Shapes: T tokens, H hidden, K experts chosen per token and iteration.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.llama import LlamaMLP
from vllm.platforms import current_platform

from configuration_coe import BACKBONES, CoeConfig
from modeling_coe.modeling_coe import CoeRouter


class HandedOverRouter(BaseRouter):
    """Takes weights and experts that were chosen outside, in place of the logits that vLLM's routers choose by."""

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return RoutingMethodType.Custom  # kernels that route by themselves have others

    @staticmethod
    def hand_over(top_k_weights: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor:
        """Weights and experts (T, K) as one float32 tensor (T, 2K), which holds ids of experts exactly."""
        return torch.cat((top_k_weights.float(), top_k_index.float()), dim=-1)

    def _compute_routing(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        top_k_weights, top_k_index = router_logits.split(self.top_k, dim=-1)
        return top_k_weights.contiguous(), top_k_index.to(indices_type or torch.int32).contiguous()


class SharedExperts(LlamaMLP):
    """The MLP that every token passes, gated by a sigmoid where the backbone has that."""

    def __init__(self, *args, gate: ReplicatedLinear | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = gate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = super().forward(hidden_states)
        return output if self.gate is None else F.sigmoid(self.gate(hidden_states)[0]) * output


class CoeMoE(nn.Module):
    """One iteration of the chain, as `modeling_coe`'s: its router, the experts it chooses, and the shared experts.

    All iterations of a layer call one runner of fused experts. What it returns is summed over the ranks already, so
    that the next iteration routes by the whole.
    """

    def __init__(self, vllm_config: VllmConfig, layer_idx: int, prefix: str):
        super().__init__()
        config: CoeConfig = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        self.use_igate = config.use_igate
        self.gate = (
            nn.ModuleList([CoeRouter(config, layer_idx) for _ in range(config.num_iterations(layer_idx))])
            if config.use_igate
            else CoeRouter(config, layer_idx)
        )
        self.shares_once = config.upcycling == "split"
        # The runner computes shared experts beside the routed ones, in every call, and sums over the ranks. It takes
        # none with a bias, which each rank would add.
        self.shares_inside = not self.shares_once and not config.mlp_bias
        self.shared_experts = None
        if config.shared_expert_width:
            if BACKBONES[config.backbone].gates_shared_experts:
                self.shared_expert_gate = ReplicatedLinear(
                    config.hidden_size, 1, bias=False, prefix=f"{prefix}.shared_expert_gate"
                )
            self.shared_experts = SharedExperts(
                config.hidden_size,
                config.shared_expert_width,
                config.hidden_act,
                quant_config=quant_config,
                bias=config.mlp_bias,
                reduce_results=not self.shares_inside,
                gate=getattr(self, "shared_expert_gate", None),
                prefix=f"{prefix}.shared_experts",
            )
        top_k = config.experts_per_iteration(layer_idx)
        # With adapters enabled vLLM gives the experts a kernel that can hold some, which these never do (`model.py`).
        without_lora = copy.copy(vllm_config)
        without_lora.lora_config = None
        with set_current_vllm_config(without_lora):
            self.runner = FusedMoEFactory(
                num_experts=config.n_routed_experts,
                top_k=top_k,
                hidden_size=config.hidden_size,
                intermediate_size=config.moe_intermediate_size,
                router=HandedOverRouter(top_k, config.n_routed_experts),
                router_logits_dtype=torch.float32,
                shared_experts=self.shared_experts if self.shares_inside else None,
                quant_config=quant_config,
                prefix=f"{prefix}.experts",
            )

    @property
    def experts(self) -> nn.Module:
        return self.runner

    def forward(
        self, hidden_states: torch.Tensor, iteration: int = 0, used_experts: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `modeling_coe`'s `CoeMoE`, for hidden states (T, H)."""
        if self.runner.is_monolithic:
            raise ValueError(
                f"The kernel of {type(self.runner.routed_experts.quant_method).__name__} routes by itself, with one "
                "router a layer. Choose another by `--moe-backend triton`, or leave `--quantization` out."
            )
        router = self.gate[iteration] if self.use_igate else self.gate
        _, top_k_weights, top_k_index = router(hidden_states, used_experts)
        weights, experts = top_k_weights, top_k_index
        if (expert_map := self.runner.expert_map) is not None and current_platform.is_cpu():
            # The other kernels leave out the experts of other ranks; vLLM's CPU kernel takes all ids for its own.
            experts = expert_map[top_k_index]
            weights, experts = weights.masked_fill(experts < 0, 0.0), experts.clamp(min=0)
        # A copy, since the runner may write to its input, which the chain has not done with.
        output = self.runner(hidden_states.clone(), HandedOverRouter.hand_over(weights, experts))
        is_shared = self.shared_experts is not None and not (self.shares_once and iteration > 0)
        if is_shared and not self.shares_inside:
            output = output + self.shared_experts(hidden_states)
        return output, top_k_index
