# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What of a model is quantised, and a recipe that reaches the routed experts.

Most quantisers replace linear modules. Routed experts are fused 3D parameters of a module that is none, so they keep
their dtype, and nobody says so: a model "in 8 bit" may hold nine tenths of its parameters in bfloat16.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import TorchAoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from .quantized_weights import GROUP_SIZE, PackedInt4Tensor, can_pack, is_quantized, quantize_int4


ROUTED_EXPERTS = "routed experts"
# The first that matches the name of a parameter is its kind.
_KINDS = (
    ("lora_", "adapters"),
    (".modules_to_save.", "adapters"),
    (".mlp.experts.", ROUTED_EXPERTS),
    (".mlp.shared_expert", "shared experts"),
    (".mlp.gate.", "routers"),
    (".mlp.", "dense MLPs"),
    (".self_attn.", "attention"),
    ("embed_tokens.", "embeddings"),
    ("lm_head.", "embeddings"),
    ("", "norms and others"),
)
# What quantised modules keep beside their weight. These count as memory and not as parameters.
_BESIDE_THE_WEIGHT = {
    "weight_scale",
    "weight_scale_inv",
    "activation_scale",
    "input_scale",
    "scales",
    "qzeros",
    "g_idx",
    "gate_up_proj_scale_inv",
    "down_proj_scale_inv",
}


@dataclass
class QuantizedShare:
    """How many parameters there are, how many of them are quantised, and the bytes of each."""

    parameters: int = 0
    quantized_parameters: int = 0
    bytes: int = 0
    quantized_bytes: int = 0

    @property
    def share(self) -> float:
        """Share of the parameters that is quantised, from 0 to 1."""
        return self.quantized_parameters / self.parameters if self.parameters else 0.0

    def add(self, parameters: int, num_bytes: int, quantized: bool) -> None:
        self.parameters += parameters
        self.bytes += num_bytes
        if quantized:
            self.quantized_parameters += parameters
            self.quantized_bytes += num_bytes


@dataclass
class QuantizationReport:
    """What [`quantization_report`] found: `total`, and the same `by_kind` of parameter."""

    total: QuantizedShare = field(default_factory=QuantizedShare)
    by_kind: dict[str, QuantizedShare] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{'':18}{'parameters':>15}{'quantised':>11}{'bytes':>15}"]
        for kind, part in (*self.by_kind.items(), ("total", self.total)):
            lines.append(f"{kind:18}{part.parameters:>15,}{part.share:>11.1%}{part.bytes:>15,}")
        return "\n".join(lines)


def quantization_report(model: nn.Module) -> QuantizationReport:
    """Counts which parameters of a model are quantised, kind by kind, and warns where the routed experts are not.

    Recognises, without importing them, tensor subclasses (torchao), weights in one byte or less (bitsandbytes, fp8,
    mxfp4) and packed buffers (GPTQ, AWQ). A shared tensor counts once.

    Args:
        model (`nn.Module`): Any model; one that is not quantised is reported as such, without a warning.

    Returns:
        `QuantizationReport`: Its `print` is a table.
    """
    report = QuantizationReport()
    for name, parameters, num_bytes, quantized in _weights(model):
        kind = next(kind for part, kind in _KINDS if part in f".{name}")
        for part in (report.total, report.by_kind.setdefault(kind, QuantizedShare())):
            part.add(parameters, num_bytes, quantized)
    experts = report.by_kind.get(ROUTED_EXPERTS)
    if report.total.quantized_parameters and experts is not None and experts.share < 1:
        warnings.warn(
            f"{experts.share:.0%} of the routed experts' parameters are quantised. They are "
            f"{experts.parameters / report.total.parameters:.0%} of the model, which is {report.total.share:.0%} "
            "quantised: quantisers of linear modules, such as bitsandbytes, leave fused 3D experts as they are. "
            "`modeling_coe.int8_weight_only` and `int4_weight_only` reach them.",
            stacklevel=2,
        )
    return report


def int8_weight_only() -> TorchAoConfig:
    """8-bit weights for torchao, symmetric with one scale per output row: linear modules and the routed experts.

    The output head, embeddings, norms, routers and `kv_b_proj` of latent attention keep their dtype. To be used as
    `quantization_config`:

    ```python
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=int8_weight_only())
    ```

    `save_pretrained` and `from_pretrained` keep the 8 bits, in the fused layout.

    On the CPU rows are multiplied by the 8 bits as they are stored, or by one widened matrix at a time, as
    `cpu_kernels.py` chooses; those of float32 models are rounded to bfloat16 where that is faster
    (`COE_CPU_KERNEL=mm`: never). Elsewhere torchao multiplies, with one expert's weight at a time.

    Raises:
        ImportError: torchao is not installed.
    """
    try:
        from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise ImportError(_NO_TORCHAO.format("int8_weight_only")) from error

    return TorchAoConfig(FqnToConfig(dict.fromkeys(_QUANTIZED_WEIGHTS, Int8WeightOnlyConfig())))


def int4_weight_only() -> TorchAoConfig:
    """4-bit weights for torchao, with a scale and a zero in bfloat16 for every 32 inputs: 5 bits a weight.

    What is quantised, and how it is used and saved, is as with [`int8_weight_only`]. Weights whose inputs are no
    multiple of 32 get 8 bits.

    On the CPU only: torchao's kernels for GPUs multiply with linear modules, and not with one expert of several.

    Raises:
        ImportError: torchao is not installed.
    """
    try:
        from torchao.quantization import FqnToConfig, Int4WeightOnlyConfig
    except ImportError as error:
        raise ImportError(_NO_TORCHAO.format("int4_weight_only")) from error

    int4 = Int4WeightOnlyConfig(group_size=GROUP_SIZE)
    return _Int4Config(FqnToConfig(dict.fromkeys(_QUANTIZED_WEIGHTS, int4)))


_NO_TORCHAO = "`{}` needs torchao, which is not installed: `pip install torchao`."
# torchao knows parameters that are not called `weight` by name only. Latent attention that absorbs `kv_b_proj`, a
# small part of a model, reads the weight itself.
_QUANTIZED_WEIGHTS = (r"re:.*\.mlp\.experts\.(gate_up|down)_proj", r"re:.*(?<!kv_b)_proj(_with_mqa)?\.weight")


class _Int4Config(TorchAoConfig):
    """Is saved as torchao's own recipe, whose quantisation needs a library for GPUs, and quantises by ours."""

    def get_apply_tensor_subclass(self) -> Any:
        recipe = copy.copy(self.quant_type)
        int4 = _int4_recipe()()
        recipe.fqn_to_config = recipe.module_fqn_to_config = dict.fromkeys(recipe.fqn_to_config, int4)
        return recipe


@functools.cache
def _int4_recipe() -> type:
    try:
        from torchao.core.config import AOBaseConfig
        from torchao.quantization import Int8Tensor, PerRow
        from torchao.quantization.transform_module import register_quantize_module_handler
    except ImportError as error:
        raise ImportError(_NO_TORCHAO.format("int4_weight_only")) from error

    @dataclass
    class Int4Recipe(AOBaseConfig):
        """torchao's `Int4WeightOnlyConfig` on the CPU, and 8 bits where inputs do not fit its groups."""

    @register_quantize_module_handler(Int4Recipe)
    def quantize(module: nn.Module, recipe: Int4Recipe, *, parameter_name: str = "weight") -> nn.Module:
        weight = getattr(module, parameter_name)
        if weight.shape[-1] % GROUP_SIZE:
            quantized = Int8Tensor.from_hp(weight.detach(), PerRow())
        else:
            quantized = quantize_int4(weight)
            if weight.device.type == "cpu" and can_pack(quantized):
                quantized = PackedInt4Tensor.pack(quantized)
        setattr(module, parameter_name, nn.Parameter(quantized, requires_grad=False))
        return module

    return Int4Recipe


class _LayerRecipe(TorchAoConfig):
    def get_apply_tensor_subclass(self) -> Any:
        recipe = super().get_apply_tensor_subclass()
        first, *others = getattr(recipe, "fqn_to_config", {None: recipe}).values()
        if any(other != first for other in others):
            return recipe
        return _int4_recipe()() if type(first).__name__ == "Int4WeightOnlyConfig" else first


def layer_recipe(config: QuantizationConfigMixin) -> QuantizationConfigMixin:
    """The configuration of a loaded model's quantiser, such that whoever quantises a linear module of it anew (PEFT
    does, after merging an adapter) gets what torchao takes for a module, where the model has a single recipe."""
    if type(config) not in (TorchAoConfig, _Int4Config):
        return config
    config = copy.copy(config)
    config.__class__ = _LayerRecipe
    return config


def was_loaded_quantized(model: nn.Module) -> bool:
    """Whether a model's weights were torchao's tensors already where it was loaded from."""
    quantizer = getattr(model, "hf_quantizer", None)
    return (
        quantizer is not None and quantizer.pre_quantized and isinstance(quantizer.quantization_config, TorchAoConfig)
    )


def _weights(model: nn.Module) -> Iterator[tuple[str, int, int, bool]]:
    """Name, number of parameters, bytes and whether it is quantised, of every weight and what belongs to it."""
    seen = set()
    for prefix, module in model.named_modules():
        tensors = [(name, tensor, True) for name, tensor in module.named_parameters(recurse=False)]
        # Packed weights are buffers; what else is one (rotary frequencies, selection biases) is no parameter.
        tensors += [(name, tensor, False) for name, tensor in module.named_buffers(recurse=False)]
        is_packed = any(name == "qweight" for name, _, _ in tensors)
        for name, tensor, is_parameter in tensors:
            if id(tensor) in seen or not (is_parameter or is_packed or name in _BESIDE_THE_WEIGHT):
                continue
            seen.add(id(tensor))
            is_weight = name not in _BESIDE_THE_WEIGHT
            quantized = not is_weight or name == "qweight" or _is_quantized(tensor)
            parameters = _logical_size(module, tensor) if is_weight else 0
            yield f"{prefix}.{name}", parameters, _num_bytes(tensor), quantized


def _is_quantized(tensor: torch.Tensor) -> bool:
    data = tensor.data
    return is_quantized(data) or type(data).__module__.split(".")[0] == "torchao" or data.element_size() == 1


def _logical_size(module: nn.Module, tensor: torch.Tensor) -> int:
    """Number of weights that a tensor stands for, which may hold several in one element."""
    state = getattr(tensor, "quant_state", None)  # bitsandbytes' 4 bits
    if state is not None:
        return state.shape.numel()
    is_packed = tensor.dtype in (torch.uint8, torch.int32)
    if is_packed and hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features * module.out_features
    return tensor.numel()


def _num_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor with the scales inside it."""
    data = tensor.data
    if hasattr(data, "__tensor_flatten__"):
        names, _ = data.__tensor_flatten__()
        return sum(_num_bytes(getattr(data, name)) for name in names)
    # bitsandbytes keeps the scales as attributes of the parameter.
    scales = (getattr(getattr(tensor, "quant_state", None), "absmax", None), getattr(tensor, "SCB", None))
    return data.nbytes + sum(scale.nbytes for scale in scales if scale is not None)


__all__ = ["QuantizationReport", "QuantizedShare", "int4_weight_only", "int8_weight_only", "quantization_report"]
