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
"""Model cards of Chain-of-Experts models: what a model is, how it was made and how to load it."""

from .cards import CARD_NAME, REPORT_NAME, attach, render, write
from .facts import origin


__all__ = ["CARD_NAME", "REPORT_NAME", "attach", "origin", "render", "write"]
