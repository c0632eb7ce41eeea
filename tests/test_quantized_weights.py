"""Products with weights of 8 and 4 bits, and the two forms of the latter, against float64 and hand-made numbers."""

import copy
import importlib.util

import pytest
import torch
from torch import nn

from configuration_coe.configuration_coe import RESIDUAL_RULES
from modeling_coe import cpu_kernels, quantized_weights
from modeling_coe.cpu_kernels import QUANTIZED_KERNELS
from modeling_coe.grouped_experts import ExpertWeights, Projection, compute_experts
from modeling_coe.modeling_coe import CoeDecoderLayer
from modeling_coe.quantized_linear import QuantizedLinear, prepare_quantized
from modeling_coe.quantized_weights import (
    Int4Tensor,
    PackedInt4Tensor,
    QuantizedMatrices,
    can_pack,
    packed_obstacle,
    quantize_int4,
    widen_int4,
)

from . import naive
from .helpers import tiny_config


pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")

# Rows in bfloat16 have 8 bits.
TOLERANCE = {"mm": 1e-6, "packed": 2**-7, "bfloat16_mm": 2**-7}


def int8_tensor(weight: torch.Tensor) -> torch.Tensor:
    """As `int8_weight_only` makes it."""
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

    module = nn.Module()
    module.parameter = nn.Parameter(weight)
    quantize_(module, FqnToConfig({"parameter": Int8WeightOnlyConfig()}), filter_fn=None)
    return module.parameter


def by_hand(weight: torch.Tensor) -> torch.Tensor:
    """The numbers in float64 that one of torchao's tensors stands for, from its parts."""
    if not isinstance(weight, Int4Tensor):
        return weight.qdata.double() * weight.scale.double()
    *leading, out_features, half = weight.qdata.shape
    q = torch.empty(*leading, out_features, 2 * half, dtype=torch.float64)
    for place, bits in ((0, weight.qdata & 15), (1, weight.qdata >> 4)):
        q[..., place::2] = torch.where(bits > 7, bits.double() - 16, bits.double())
    scale, zero = (tensor.double().mT.repeat_interleave(32, dim=-1) for tensor in (weight.scale, weight.zero_point))
    return q * scale + zero


def random_weight(bits: int, *shape: int) -> torch.Tensor:
    weight = torch.randn(shape) + torch.randn(shape[:-1])[..., None]
    return int8_tensor(weight) if bits == 8 else quantize_int4(weight)


class TestInt4:
    def test_nearest_of_sixteen(self):
        torch.manual_seed(0)
        weight = torch.randn(3, 5, 64)
        weight[0, 0, :32] = 0.25  # a group without a range
        quantized = quantize_int4(weight)
        assert type(quantized) is Int4Tensor and quantized.shape == weight.shape
        assert quantized.qdata.shape == (3, 5, 32) and quantized.scale.shape == (3, 2, 5)
        groups = weight.unflatten(-1, (2, 32))
        step = (groups.amax(-1) - groups.amin(-1)).double() / 15
        error = (by_hand(quantized) - weight).abs().unflatten(-1, (2, 32)).amax(-1)
        # Half a step, and what rounding scale and zero to bfloat16 moves the ends of the range by.
        assert (error <= 0.5 * step + 2**-8 * (8 * step + groups.abs().amax(-1)) + 1e-6).all()
        levels = by_hand(quantized)[1, 1, :32].unique()
        assert 8 < len(levels) <= 16

    @pytest.mark.parametrize("shape", [(48, 32), (16, 64), (2, 80, 96), (3, 128, 32), (64, 64), (1, 704, 32)])
    def test_packing_and_back(self, shape):
        """Also where the last outputs have another order than the rest."""
        torch.manual_seed(0)
        weight = quantize_int4(torch.randn(shape))
        packed = PackedInt4Tensor.pack(weight)
        again = packed.unpack()
        assert type(again) is Int4Tensor
        for name in ("qdata", "scale", "zero_point"):
            actual, expected = getattr(again, name), getattr(weight, name)
            assert torch.equal(actual, expected) and actual.is_contiguous(), name
        assert again.block_size == weight.block_size and again.shape == weight.shape == packed.shape
        assert packed.dtype == torch.bfloat16 and packed.qdata.nbytes == weight.qdata.nbytes
        torch.testing.assert_close(packed.dequantize(torch.float64), by_hand(weight), rtol=0, atol=1e-12)
        parts = (shape[-1] // 32, shape[-2], 2)
        scale = torch.stack((weight.scale, weight.zero_point), dim=-1).view(-1, *parts)[0]
        first = [tensor.qdata.view(-1, *tensor.qdata.shape[-2:])[0] for tensor in (weight, packed)]
        widened = [widen_int4(data, scale, data is first[1], torch.float64) for data in first]
        assert torch.equal(*widened)

    def test_an_unknown_order(self, monkeypatch):
        """Other processors have other orders: weights are found wherever the kernel puts them."""
        shuffle = torch.randperm(48 * 64, generator=torch.Generator().manual_seed(0))

        def convert(q):
            flat = q.flatten()[shuffle].view(-1, 2).to(torch.uint8)
            return (flat[:, 0] | (flat[:, 1] << 4)).view(48, 32)

        caches = (quantized_weights._places, quantized_weights._block_size)
        for cache in caches:
            cache.cache_clear()
        monkeypatch.setattr(quantized_weights, "_in_order_of_kernel", convert)
        weight = quantize_int4(torch.randn(48, 64))
        packed = PackedInt4Tensor.pack(weight)
        assert not torch.equal(packed.qdata, weight.qdata)
        assert torch.equal(packed.unpack().qdata, weight.qdata)
        for cache in caches:
            cache.cache_clear()

    def test_copies_and_parts(self):
        packed = PackedInt4Tensor.pack(quantize_int4(torch.randn(3, 32, 64)))
        parameter = nn.Parameter(packed, requires_grad=False)
        assert type(parameter[1]) is PackedInt4Tensor
        inputs = torch.randn(2, 64)
        expected = inputs @ packed.dequantize(torch.float32)[1].T
        torch.testing.assert_close(nn.functional.linear(inputs, parameter[1]), expected)
        copied = copy.deepcopy(parameter)
        assert type(copied) is PackedInt4Tensor and copied.qdata.data_ptr() != packed.qdata.data_ptr()
        assert torch.equal(copied.dequantize(), packed.dequantize())

    def test_what_the_kernel_cannot_read(self):
        assert "sixteens" in packed_obstacle(4, 64, 24) and "sixteens" in packed_obstacle(4, 48, 32)
        assert packed_obstacle(4, 64, 32) is None
        assert not can_pack(quantize_int4(torch.randn(24, 64)))


class TestProducts:
    @pytest.mark.parametrize("kernel", QUANTIZED_KERNELS)
    @pytest.mark.parametrize("form", ["8 bits", "4 bits", "4 bits, not packed"])
    @pytest.mark.parametrize("sizes", [[1], [3], [1, 1, 1], [5, 1, 40]])
    def test_rows_and_gradients(self, kernel, form, sizes):
        torch.manual_seed(0)
        weight = random_weight(8 if form == "8 bits" else 4, 4, 48, 64)
        expected_weight = by_hand(weight)
        if form == "4 bits":
            weight = PackedInt4Tensor.pack(weight)
        matrices = QuantizedMatrices.of(weight, torch.float32)
        assert matrices.shape == (4, 48, 64) and matrices.mT.shape == (4, 64, 48) and len(matrices.matrices) == 4
        chosen = [3, 0, 2][: len(sizes)]  # one has no row
        rows = torch.randn(sum(sizes), 64)
        product = matrices.mT.multiply(rows, chosen, sizes, kernel)
        expected = torch.cat(
            [part.double() @ expected_weight[i].T for part, i in zip(rows.split(sizes), chosen, strict=True)]
        )
        assert product.dtype == torch.float32
        assert (product - expected).abs().max() <= TOLERANCE[kernel] * expected.abs().max()
        grads = torch.randn(sum(sizes), 48)
        actual = matrices.multiply(grads, chosen, sizes, "mm")
        expected = torch.cat(
            [part.double() @ expected_weight[i] for part, i in zip(grads.split(sizes), chosen, strict=True)]
        )
        assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()

    @pytest.mark.parametrize("bits", [8, 4])
    def test_kernels_are_measured(self, bits):
        """In classes of their own, and what cannot compute says why."""
        for dtype, able in ((torch.float32, 3), (torch.bfloat16, 2), (torch.float64, 1)):
            product = cpu_kernels.Product.of(cpu_kernels.QUANTIZED_KINDS[bits], dtype, 64, 32, 5)
            outcome = cpu_kernels.measure(product)
            assert list(outcome) == list(QUANTIZED_KERNELS)
            assert sum(isinstance(result, float) for result in outcome.values()) == able
        assert "16 features" in str(
            cpu_kernels.measure(cpu_kernels.Product.of(cpu_kernels.QUANTIZED_KINDS[8], torch.float32, 24, 32, 5))
        )

    def test_memory_that_the_kernel_must_not_load(self):
        """Vectors begin at multiples of 32 bytes; a tensor may begin anywhere."""
        weight = int8_tensor(torch.randn(32, 64))
        expected = by_hand(weight)
        memory = torch.empty(32 * 64 + 1, dtype=torch.int8)
        weight.qdata = memory[1:].view(32, 64).copy_(weight.qdata)
        rows = torch.randn(3, 64)
        matrices = QuantizedMatrices.of(weight, torch.float32)
        assert not matrices.is_readable
        product = matrices.mT.multiply(rows, [0], [3], "packed")
        assert (product - rows.double() @ expected.T).abs().max() <= 1e-5
        matrices = QuantizedMatrices.of(int8_tensor(torch.randn(32, 64)), torch.bfloat16)
        unaligned = torch.randn(3 * 64 + 1, dtype=torch.bfloat16)[1:].view(3, 64)
        for part in (unaligned, rows.bfloat16().T.contiguous().T):
            product = matrices.mT.multiply(part, [0], [3], "packed")
            assert torch.equal(product, matrices.mT.multiply(part.clone().contiguous(), [0], [3], "packed"))

    def test_without_the_kernels(self, monkeypatch):
        """Of a release of torch that has renamed them."""
        monkeypatch.delattr(torch, "_weight_int8pack_mm")
        for bits in (8, 4):
            if bits == 4:
                monkeypatch.setattr(quantized_weights, "hasattr", lambda *args: False, raising=False)
            product = cpu_kernels.Product.of(cpu_kernels.QUANTIZED_KINDS[bits], torch.float32, 64, 32, 1)
            assert "has no" in cpu_kernels.measure(product)["packed"]


class TestExperts:
    @pytest.mark.parametrize("kernel", QUANTIZED_KERNELS)
    @pytest.mark.parametrize("bits", [8, 4])
    @pytest.mark.parametrize("num_tokens", [0, 1, 2, 30])
    def test_uneven_routing_over_ranks(self, monkeypatch, kernel, bits, num_tokens):
        """Experts without a token, one with most of them, and ids of experts that another rank has."""
        torch.manual_seed(0)
        monkeypatch.setenv("COE_CPU_KERNEL", kernel)
        gate_up, down = (random_weight(bits, 6, *shape) for shape in ((64, 32), (32, 32)))
        for weight in (gate_up, down):
            weight.scale = weight.scale / 6
            if bits == 4:
                weight.zero_point = weight.zero_point / 6
        expected_gate_up, expected_down = by_hand(gate_up), by_hand(down)
        if bits == 4:
            gate_up, down = PackedInt4Tensor.pack(gate_up), PackedInt4Tensor.pack(down)
        tokens = torch.randn(num_tokens, 32)
        index = torch.randint(0, 3, (num_tokens, 3))
        index[:, 0] = 4
        index[1::2, 2] = 6 + torch.arange(len(index[1::2]))  # another rank's
        weights = torch.rand(num_tokens, 3)
        projections = [Projection(QuantizedMatrices.of(weight, torch.float32)) for weight in (gate_up, down)]
        expected = torch.zeros(num_tokens, 32, dtype=torch.float64)
        for token in range(num_tokens):
            for expert, weight in zip(index[token].tolist(), weights[token].tolist(), strict=True):
                if expert < 6:
                    gate, up = expected_gate_up[expert].chunk(2)
                    expected[token] += weight * naive.swiglu(tokens[token].double(), gate, up, expected_down[expert])
        with torch.no_grad():
            output = compute_experts(tokens, index, weights, ExpertWeights(*projections), nn.SiLU())
        assert output.shape == (num_tokens, 32)
        if num_tokens:
            assert (output - expected).abs().max() <= 8 * TOLERANCE[kernel] * expected.abs().max()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize("rule", RESIDUAL_RULES)
def test_every_residual_rule(monkeypatch, rule, num_tokens, bits):
    """Outputs, and the gradients of the input and of what is not quantised, against float64 with the same weights."""
    monkeypatch.setenv("COE_CPU_KERNEL", "mm")
    torch.manual_seed(0)
    config = tiny_config(**{"moe_intermediate_size": 32, "n_shared_experts": 1, **RESIDUAL_RULES[rule]})
    config._attn_implementation, config._experts_implementation = "eager", "grouped_mm"
    layer = CoeDecoderLayer(config, layer_idx=0)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            nn.init.normal_(parameter, mean=float("layernorm" in name), std=0.2)
    reference = {}
    for name, parameter in list(layer.named_parameters()):
        module = layer.get_submodule(name.rpartition(".")[0])
        if ".experts." in name or ".shared_experts." in name:
            quantized = int8_tensor(parameter.data) if bits == 8 else quantize_int4(parameter.data)
            module.register_parameter(name.rpartition(".")[2], nn.Parameter(quantized, requires_grad=False))
            reference[name] = by_hand(quantized)
        else:
            reference[name] = parameter.detach().double().requires_grad_()
    prepare_quantized(layer)
    assert isinstance(layer.mlp.shared_experts.down_proj, QuantizedLinear)
    hidden_states = torch.randn(num_tokens, config.hidden_size, requires_grad=True)
    double = hidden_states.detach().double().requires_grad_()
    expected = naive.chain(double, reference, config)
    projection = torch.randn(expected.shape)
    with torch.no_grad():
        assert (layer.chain(hidden_states[None])[0] - expected).abs().max() <= 1e-5 * expected.abs().max()
    output = layer.chain(hidden_states[None])[0]
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad and "self_attn" not in name}
    trained.pop("input_layernorm.weight")
    actual = torch.autograd.grad((output * projection).sum(), [hidden_states, *trained.values()])
    wanted = torch.autograd.grad(
        (expected * projection.double()).sum(), [double, *(reference[name] for name in trained)]
    )
    for name, a, b in zip(["input", *trained], actual, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-4 * max(b.abs().max(), 1), name


class TestLinear:
    @pytest.mark.parametrize("bits", [8, 4])
    @pytest.mark.parametrize("bias", [False, True])
    def test_is_a_linear_module(self, monkeypatch, bits, bias):
        monkeypatch.setenv("COE_CPU_KERNEL", "mm")
        linear = nn.Linear(64, 48, bias=bias)
        weight = int8_tensor(linear.weight.data) if bits == 8 else quantize_int4(linear.weight.data)
        expected_weight = by_hand(weight)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        prepare_quantized(model := nn.ModuleList([linear]))
        assert type(linear) is QuantizedLinear and isinstance(linear, nn.Linear)
        assert linear.in_features == 64 and linear.weight.shape == (48, 64)
        inputs = torch.randn(2, 5, 64, requires_grad=True)
        expected = inputs.double() @ expected_weight.T + (linear.bias.double() if bias else 0)
        output = linear(inputs)
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-4)
        (gradient,) = torch.autograd.grad(output.sum(), inputs)
        torch.testing.assert_close(gradient.double(), expected_weight.sum(0).expand_as(inputs), rtol=0, atol=1e-4)
        if bias:
            assert torch.autograd.grad(linear(inputs).sum(), linear.bias)[0].eq(10).all()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear(inputs).dtype == torch.bfloat16
        compiled = torch.compile(linear, backend="eager")
        torch.testing.assert_close(compiled(inputs), output)
        saved = model.state_dict()["0.weight"]
        assert type(saved).__name__ == ("Int8Tensor" if bits == 8 else "Int4Tensor")
        assert torch.equal(by_hand(saved), expected_weight)
