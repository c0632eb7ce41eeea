"""Configuration of Chain-of-Experts models."""

from .configuration_coe import CoeConfig


__all__ = ["CoeConfig"]
