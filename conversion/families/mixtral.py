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
"""Mixtral: weights are the softmax over the chosen experts, which is that over all of them, normalised."""

from ..family import Family


FAMILY = Family(
    model_type="mixtral",
    backbone="mixtral",
    same="head_dim sliding_window",
    renamed={"num_local_experts": "n_routed_experts", "router_aux_loss_coef": "aux_loss_alpha"},
    constants={"n_shared_experts": None, "norm_topk_prob": True, "seq_aux": False},
    # The width of an expert; there are no dense layers.
    computed={"moe_intermediate_size": lambda config: config.intermediate_size},
    derived={"intermediate_size": lambda config: config.moe_intermediate_size},
    left_out={"router_jitter_noise": "chains are trained without noise on the routers' input"},
    keys={
        "block_sparse_moe.gate.weight": "mlp.gate.weight",
        "block_sparse_moe.experts.*.w1.weight": "mlp.experts.*.gate_proj.weight",
        "block_sparse_moe.experts.*.w3.weight": "mlp.experts.*.up_proj.weight",
        "block_sparse_moe.experts.*.w2.weight": "mlp.experts.*.down_proj.weight",
    },
)
