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
"""The families that can be converted, one module each. A new one is a new module and a line here."""

from . import deepseek_v2, deepseek_v3, llama, mistral, mixtral, olmoe, qwen2_moe, qwen3, qwen3_moe


FAMILIES = {
    module.FAMILY.model_type: module.FAMILY
    for module in (deepseek_v2, deepseek_v3, qwen2_moe, qwen3_moe, olmoe, mixtral, llama, qwen3, mistral)
}
