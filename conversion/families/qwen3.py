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
"""Qwen3, dense: norms of queries and keys."""

from ..family import Family


FAMILY = Family(
    model_type="qwen3",
    backbone="qwen3",
    same="head_dim sliding_window layer_types",
    constants={"n_shared_experts": None, "seq_aux": False},
    implied=("use_sliding_window", "max_window_layers"),  # in `sliding_window` and `layer_types`
    dense=True,
)
