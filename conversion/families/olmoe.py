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
"""OLMoE: norms over all queries and all keys, optional clipping, no shared expert."""

from ..family import Family


FAMILY = Family(
    model_type="olmoe",
    backbone="olmoe",
    same="head_dim clip_qkv norm_topk_prob",
    renamed={"num_experts": "n_routed_experts", "router_aux_loss_coef": "aux_loss_alpha"},
    constants={"n_shared_experts": None, "seq_aux": False},
    # The width of an expert; there are no dense layers.
    computed={"moe_intermediate_size": lambda config: config.intermediate_size},
)
