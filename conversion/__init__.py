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
"""Conversion of mixtures of experts to Chain-of-Experts models with the same function, and back."""

from .checkpoint import ConversionError
from .core import convert
from .mapping import plan_conversion
from .plan import Options, Plan
from .report import describe


__all__ = ["ConversionError", "Options", "Plan", "convert", "describe", "plan_conversion"]
