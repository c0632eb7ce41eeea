# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What every part of the conversion raises, and how it quotes what libraries raise."""


class ConversionError(ValueError):
    """Why a conversion cannot be done, in words for whoever asked for it."""


def kind_and_message(error: BaseException) -> str:
    """What a library has raised, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
