# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Conversion of mixtures of experts to Chain-of-Experts models with the same function, and back."""

from .checkpoint import ConversionError
from .converter import convert
from .plan import Options, Plan
from .planner import plan_conversion
from .report import describe


__all__ = ["ConversionError", "Options", "Plan", "convert", "describe", "plan_conversion"]
