# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Model cards of Chain-of-Experts models: what a model is, how it was made and how to load it."""

from .cards import CARD_NAME, REPORT_NAME, attach, inherited, render, write
from .facts import origin


__all__ = ["CARD_NAME", "REPORT_NAME", "attach", "inherited", "origin", "render", "write"]
