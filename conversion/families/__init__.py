# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""The families that can be converted, one module each. A new one is a new module and a line here."""

from . import (
    deepseek_v2,
    deepseek_v3,
    dots1,
    glm4_moe,
    glm4_moe_lite,
    llama,
    minimax_m2,
    mistral,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    solar_open,
)


FAMILIES = {
    module.FAMILY.model_type: module.FAMILY
    for module in (
        deepseek_v2,
        deepseek_v3,
        glm4_moe,
        glm4_moe_lite,
        minimax_m2,
        dots1,
        solar_open,
        qwen2_moe,
        qwen3_moe,
        olmoe,
        mixtral,
        llama,
        qwen3,
        mistral,
    )
}
# What transformers has under another name -> that name.
ALIASES = {alias: family.model_type for family in FAMILIES.values() for alias in family.aliases}
