# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What a chain of experts is built on: the attention, rotary embedding and norms of a family of transformers."""

from typing import NamedTuple

from torch import nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RMSNorm, DeepseekV2RotaryEmbedding
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
)
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import (
    Ernie4_5_MoeAttention,
    Ernie4_5_MoeRMSNorm,
    Ernie4_5_MoeRotaryEmbedding,
)
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeAttention, Glm4MoeRMSNorm, Glm4MoeRotaryEmbedding
from transformers.models.granitemoe.modeling_granitemoe import (
    GraniteMoeAttention,
    GraniteMoeRMSNorm,
    GraniteMoeRotaryEmbedding,
)
from transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe import (
    HunYuanMoEV1Attention,
    HunYuanMoEV1RMSNorm,
    HunYuanMoEV1RotaryEmbedding,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.minimax_m2.modeling_minimax_m2 import (
    MiniMaxM2Attention,
    MiniMaxM2RMSNorm,
    MiniMaxM2RotaryEmbedding,
)
from transformers.models.mixtral.modeling_mixtral import MixtralAttention, MixtralRMSNorm, MixtralRotaryEmbedding
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention, OlmoeRMSNorm, OlmoeRotaryEmbedding
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeAttention,
    Qwen2MoeRMSNorm,
    Qwen2MoeRotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RMSNorm, Qwen3RotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
)

from .attention import CoeAttention


class BackboneModules(NamedTuple):
    """The classes of a family."""

    attention: type[nn.Module]
    rotary_embedding: type[nn.Module]
    norm: type[nn.Module]


# What else there is to know of them is in `BACKBONES` of the configuration. All of them choose by scores over all
# experts. Softmax over the chosen ones alone is the same as `norm_topk_prob`.
BACKBONE_MODULES = {
    "deepseek_v2": BackboneModules(CoeAttention, DeepseekV2RotaryEmbedding, DeepseekV2RMSNorm),
    "deepseek_v3": BackboneModules(DeepseekV3Attention, DeepseekV3RotaryEmbedding, DeepseekV3RMSNorm),
    "qwen2_moe": BackboneModules(Qwen2MoeAttention, Qwen2MoeRotaryEmbedding, Qwen2MoeRMSNorm),
    "qwen3_moe": BackboneModules(Qwen3MoeAttention, Qwen3MoeRotaryEmbedding, Qwen3MoeRMSNorm),
    "olmoe": BackboneModules(OlmoeAttention, OlmoeRotaryEmbedding, OlmoeRMSNorm),
    "mixtral": BackboneModules(MixtralAttention, MixtralRotaryEmbedding, MixtralRMSNorm),
    "llama": BackboneModules(LlamaAttention, LlamaRotaryEmbedding, LlamaRMSNorm),
    "qwen3": BackboneModules(Qwen3Attention, Qwen3RotaryEmbedding, Qwen3RMSNorm),
    "glm4_moe": BackboneModules(Glm4MoeAttention, Glm4MoeRotaryEmbedding, Glm4MoeRMSNorm),
    "minimax_m2": BackboneModules(MiniMaxM2Attention, MiniMaxM2RotaryEmbedding, MiniMaxM2RMSNorm),
    "granitemoe": BackboneModules(GraniteMoeAttention, GraniteMoeRotaryEmbedding, GraniteMoeRMSNorm),
    "ernie4_5_moe": BackboneModules(Ernie4_5_MoeAttention, Ernie4_5_MoeRotaryEmbedding, Ernie4_5_MoeRMSNorm),
    "hunyuan_v1_moe": BackboneModules(HunYuanMoEV1Attention, HunYuanMoEV1RotaryEmbedding, HunYuanMoEV1RMSNorm),
}
