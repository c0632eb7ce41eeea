# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""The families that can be converted, one module each. A new one is a new module and a line here."""

from . import (
    cwm,
    deepseek_v2,
    deepseek_v3,
    dots1,
    ernie4_5,
    ernie4_5_moe,
    glm4_moe,
    glm4_moe_lite,
    granite,
    granitemoe,
    helium,
    hunyuan_v1_dense,
    hunyuan_v1_moe,
    hy_v3,
    llama,
    minicpm3,
    minimax_m2,
    ministral,
    mistral,
    mixtral,
    olmoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    seed_oss,
    solar_open,
    youtu,
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
        granitemoe,
        ernie4_5_moe,
        hunyuan_v1_moe,
        hy_v3,
        llama,
        qwen3,
        mistral,
        qwen2,
        ministral,
        cwm,
        seed_oss,
        granite,
        ernie4_5,
        helium,
        hunyuan_v1_dense,
        youtu,
        minicpm3,
    )
}
# What transformers has under another name -> that name.
ALIASES = {alias: family.model_type for family in FAMILIES.values() for alias in family.aliases}
