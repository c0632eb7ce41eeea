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
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding
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


class Backbone(NamedTuple):
    """The classes of a family, and the two things in which its sparse layers differ beyond what fields can say."""

    attention: type[nn.Module]
    rotary_embedding: type[nn.Module]
    norm: type[nn.Module]
    gates_shared_experts: bool = False  # by a sigmoid of the token
    # With a single expert per token: DeepSeek-V2 leaves its weight as it is, the others make it 1.
    normalizes_single_expert: bool = True


# All of them choose by scores over all experts. Softmax over the chosen ones alone is the same as `norm_topk_prob`.
BACKBONES = {
    "deepseek_v2": Backbone(
        CoeAttention, DeepseekV2RotaryEmbedding, DeepseekV2RMSNorm, normalizes_single_expert=False
    ),
    "deepseek_v3": Backbone(DeepseekV3Attention, DeepseekV3RotaryEmbedding, DeepseekV3RMSNorm),
    "qwen2_moe": Backbone(Qwen2MoeAttention, Qwen2MoeRotaryEmbedding, Qwen2MoeRMSNorm, gates_shared_experts=True),
    "qwen3_moe": Backbone(Qwen3MoeAttention, Qwen3MoeRotaryEmbedding, Qwen3MoeRMSNorm),
    "olmoe": Backbone(OlmoeAttention, OlmoeRotaryEmbedding, OlmoeRMSNorm),
    "mixtral": Backbone(MixtralAttention, MixtralRotaryEmbedding, MixtralRMSNorm),
    "llama": Backbone(LlamaAttention, LlamaRotaryEmbedding, LlamaRMSNorm),
    "qwen3": Backbone(Qwen3Attention, Qwen3RotaryEmbedding, Qwen3RMSNorm),
}
