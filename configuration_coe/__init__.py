"""Configuration of Chain-of-Experts models."""

from .configuration_coe import BACKBONES, RESIDUAL_RULES, Backbone, CoeConfig


__all__ = ["BACKBONES", "RESIDUAL_RULES", "Backbone", "CoeConfig"]
