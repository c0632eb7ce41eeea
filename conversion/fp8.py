# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Weights in FP8 with a scale for every block, as DeepSeek-V3 has them: which they are, and what they stand for."""

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.utils import is_accelerate_available

from .errors import ConversionError


DTYPES = {"F8_E4M3": torch.float8_e4m3fn}
SCALES = "_scale_inv"  # follows on the name of a weight
_FORMATS = ("e4m3", "float8_e4m3fn")
_REMEDY = "Convert the original weights in float32, bfloat16 or float16, or in FP8 with a scale for every block."


class BlockScaling(NamedTuple):
    """How the weights of a source are scaled.

    Args:
        block: Rows and columns that a scale is for.
        dtype: What the weights become where no other is asked for: that of the configuration, or bfloat16.
    """

    block: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, config: dict[str, Any]) -> "BlockScaling | None":
        """What a config.json says, `None` where nothing is quantised.

        Raises:
            ConversionError: The weights are quantised in another way; the message names the field.
        """
        quantization = config.get("quantization_config") or config.get("compression_config")
        if not quantization:
            return None
        fields = quantization if isinstance(quantization, dict) else {"quant_method": quantization}
        if (method := fields.get("quant_method")) != "fp8":
            raise _other("quant_method", method)
        if (scheme := fields.get("activation_scheme", "dynamic")) != "dynamic":
            raise _other("activation_scheme", scheme)
        if (fmt := fields.get("fmt", _FORMATS[0])) not in _FORMATS:
            raise _other("fmt", fmt)
        block = fields.get("weight_block_size")
        if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
            raise _other("weight_block_size", block)
        if not is_accelerate_available():
            raise ConversionError(
                "The source is in FP8, which transformers loads with accelerate alone, and every conversion is "
                "verified by that. Install it: `pip install accelerate`."
            )
        dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
        is_wide = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
        return cls(tuple(block), dtype if is_wide else torch.bfloat16)

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a weight: the last block of a row or column may be cut off."""
        return tuple(-(-size // block) for size, block in zip(shape, self.block, strict=True))

    def dequantize(self, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """What a weight (rows, columns) in FP8 stands for, in float32, as transformers computes it."""
        rows, columns = weight.shape
        # transformers knows a block by the sizes of weight and scales alone, so all have to be whole.
        missing = (0, -columns % self.block[1], 0, -rows % self.block[0])
        whole = F.pad(weight.float(), missing) if any(missing) else weight
        name = "layer.weight"
        tensors = Fp8Dequantize(hf_quantizer=None).convert({name: whole, f"{name}{SCALES}": scales.float()})
        return tensors[name][0][:rows, :columns]


def _other(field: str, value: Any) -> ConversionError:
    return ConversionError(f"The source is quantised, with `quantization_config.{field}={value!r}`. {_REMEDY}")
