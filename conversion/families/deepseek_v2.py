# Copyright 2026 The CoE Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""DeepSeek-V2: latent attention, shared experts, softmax scores, whole groups of experts left out."""

from ..family import Family


FAMILY = Family(
    model_type="deepseek_v2",
    backbone="deepseek_v2",
    same=(
        "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim mlp_bias "
        "moe_intermediate_size n_routed_experts n_shared_experts first_k_dense_replace topk_method "
        "n_group topk_group routed_scaling_factor aux_loss_alpha seq_aux"
    ),
    constants={"norm_topk_prob": False},
    required={"scoring_func": "softmax", "moe_layer_freq": 1},
    implied=("head_dim", "qk_head_dim"),
    left_out={"norm_topk_prob": "transformers' DeepSeek-V2 does not normalise"},
)
