# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What every part of the conversion raises."""


class ConversionError(ValueError):
    """Why a conversion cannot be done, in words for whoever asked for it."""
