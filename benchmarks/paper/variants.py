# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Models that the experiments need and the package does not offer: the layers of a new model are turned into these.

Every variant starts as the model it is made from, with the same weights for the same seed.
"""

import torch
from torch import nn

from modeling_coe import CoeConfig, CoeForCausalLM
from modeling_coe.backbones import BACKBONE_MODULES
from modeling_coe.experts import sharing_weights
from modeling_coe.modeling_coe import CoeDecoderLayer


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


class RenormLayer(CoeDecoderLayer):
    """The pre-norm chain whose iterations all read the stream through a norm, each its own."""

    def extend(self, config: CoeConfig) -> None:
        norm = BACKBONE_MODULES[config.backbone].norm
        self.norms = nn.ModuleList(
            [norm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(self.num_iterations - 1)]
        )

    def chain(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with sharing_weights(self.mlp.experts):
            for iteration, norm in enumerate([self.post_attention_layernorm, *self.norms]):
                y, _ = self.mlp(norm(hidden_states), iteration)
                hidden_states = hidden_states + y
        return hidden_states


VARIANTS = {"scalar": ScalarLayer, "held": HeldLayer, "renorm": RenormLayer}
# Residual rules that a variant knows.
VARIANT_RULES = {"scalar": ("inner", "prenorm"), "held": ("inner", "prenorm"), "renorm": ("prenorm",)}


def build_model(config: CoeConfig, variant: str | None = None) -> CoeForCausalLM:
    """A new model, with the layers of a variant if one is named.

    Raises:
        ValueError: The variant does not know the residual rule.
    """
    model = CoeForCausalLM(config)
    if variant is None:
        return model
    if config.residual_rule not in VARIANT_RULES[variant]:
        raise ValueError(
            f"The variant {variant!r} is made for {VARIANT_RULES[variant]}, not for {config.residual_rule!r}."
        )
    for layer in model.model.layers:
        layer.__class__ = VARIANTS[variant]
        layer.extend(config)
    return model


def expert_flops_per_token(config: CoeConfig, variant: str | None = None) -> int:
    """As [`CoeConfig.expert_flops_per_token`], of a variant."""
    return config.expert_flops_per_token * (2 if variant == "held" else 1)
