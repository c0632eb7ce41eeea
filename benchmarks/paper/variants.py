# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Models that the experiments need and the package does not offer: the layers of a new model are turned into these.

Every variant starts as the model it is made from, with the same weights for the same seed.
"""

import copy
from typing import Any

import torch
from torch import nn

from benchmarks.paper.experiments import RENORM
from modeling_coe import CoeConfig, CoeForCausalLM
from modeling_coe.backbones import BACKBONE_MODULES
from modeling_coe.experts import sharing_weights
from modeling_coe.modeling_coe import CoeDecoderLayer, scaled


class ScalarLayer(CoeDecoderLayer):
    """One iteration whose output is multiplied by a learned number: all that collinear updates would add up to."""

    def extend(self, config: CoeConfig) -> None:
        self.scale = nn.Parameter(torch.ones(()))

    def chain(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = self.post_attention_layernorm(hidden_states)
        stream = hidden_states if self.residual_rule == "prenorm" else x
        y, _ = self.mlp(x)
        return stream + self.scale * y


class HeldLayer(CoeDecoderLayer):
    """Two iterations of the experts, and with the weights, that the router chooses once; the second's output is
    multiplied by a learned number. The configuration says one iteration, since one is routed."""

    def extend(self, config: CoeConfig) -> None:
        self.scale = nn.Parameter(torch.ones(()))

    def chain(self, hidden_states: torch.Tensor) -> torch.Tensor:
        mlp, x = self.mlp, self.post_attention_layernorm(hidden_states)
        _, top_k_weights, top_k_index = mlp.gate[0](x)
        with sharing_weights(mlp.experts):
            for scale in (1, self.scale):
                y = mlp.experts(x.flatten(0, 1), top_k_index, top_k_weights).view_as(x)
                if mlp.shared_experts is not None:
                    y = y + mlp.shared_experts(x)
                x, hidden_states = x + scale * y, hidden_states + scale * y
        return hidden_states if self.residual_rule == "prenorm" else x


class LoopLayer(CoeDecoderLayer):
    """Iterates over the whole layer, attention and experts, with one attention for all iterations: `iteration_norm`
    gives attention norms too, `reinject` and `residual_scale` are for both, `branch_norm` for the experts. It has no
    cache, so a model of it generates by computing all positions again."""

    def extend(self, config: CoeConfig) -> None:
        norm = BACKBONE_MODULES[config.backbone].norm
        count = self.num_iterations - 1 if config.iteration_norm else 0
        self.attention_norms = nn.ModuleList([norm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(count)])

    def attention(self, iteration: int) -> nn.Module:
        return self.self_attn

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        first = hidden_states
        attention_norms, norms = [
            [own, *later] if later else [own] * self.num_iterations
            for own, later in (
                (self.input_layernorm, self.attention_norms),
                (self.post_attention_layernorm, self.iteration_norms),
            )
        ]
        with sharing_weights(self.mlp.experts):
            for t in range(self.num_iterations):
                read = hidden_states
                if t > 0 and self.reinject is not None:
                    read = read + self.reinject / (t + 1) * (first - read)
                attended, _ = self.attention(t)(hidden_states=attention_norms[t](read), **kwargs)
                attended = scaled(attended, self.iteration_multiplier)
                y, _ = self.mlp(norms[t](read + attended), t)
                hidden_states = hidden_states + attended + self.scale_output(y, t)
        return hidden_states


class LoopOwnLayer(LoopLayer):
    """The same with an attention of its own for every iteration."""

    def extend(self, config: CoeConfig) -> None:
        super().extend(config)
        self.later_attentions = nn.ModuleList([copy.deepcopy(self.self_attn) for _ in range(self.num_iterations - 1)])
        for weight in self.later_attentions.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=config.initializer_range)

    def attention(self, iteration: int) -> nn.Module:
        return self.later_attentions[iteration - 1] if iteration else self.self_attn


VARIANTS = {"scalar": ScalarLayer, "held": HeldLayer, "loop": LoopLayer, "loop_own": LoopOwnLayer}
# Residual rules that a variant knows.
VARIANT_RULES = {
    "scalar": ("inner", "prenorm"),
    "held": ("inner", "prenorm"),
    "loop": ("prenorm",),
    "loop_own": ("prenorm",),
}


def build_model(config: CoeConfig, variant: str | None = None) -> CoeForCausalLM:
    """A new model, with the layers of a variant if one is named.

    Raises:
        ValueError: The variant does not know the residual rule.
    """
    model = CoeForCausalLM(config)
    if variant in (None, RENORM):
        return model
    if config.residual_rule not in VARIANT_RULES[variant]:
        raise ValueError(
            f"The variant {variant!r} is made for {VARIANT_RULES[variant]}, not for {config.residual_rule!r}."
        )
    for layer in model.model.layers:
        layer.__class__ = VARIANTS[variant]
        layer.extend(config)
    if issubclass(VARIANTS[variant], LoopLayer):
        config.use_cache = model.generation_config.use_cache = False
    return model


def expert_flops_per_token(config: CoeConfig, variant: str | None = None) -> int:
    """As [`CoeConfig.expert_flops_per_token`], of a variant."""
    return config.expert_flops_per_token * (2 if variant == "held" else 1)
