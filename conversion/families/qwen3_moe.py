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
"""Qwen3-MoE: norms of queries and keys, no shared expert."""

from ..family import Family


FAMILY = Family(
    model_type="qwen3_moe",
    backbone="qwen3_moe",
    same="head_dim sliding_window moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers",
    renamed={"num_experts": "n_routed_experts", "router_aux_loss_coef": "aux_loss_alpha"},
    constants={"n_shared_experts": None, "seq_aux": False},
    derived={"use_sliding_window": lambda config: config.sliding_window is not None},
    implied=("max_window_layers",),  # all layers have the window, or none
)
