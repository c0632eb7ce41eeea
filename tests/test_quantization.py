"""`quantization_report` against hand counts, and 8-bit experts by torchao."""

import importlib.util
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from modeling_coe.lora import lora_config
from modeling_coe.quantization import ROUTED_EXPERTS, int8_weight_only, quantization_report

from .helpers import assert_equal_up_to_rounding, random_ids, tiny_model


# The others transpose or batch the weights themselves, which torchao's int8 tensors do not support.
INT8_BACKENDS = ("eager", "grouped_mm")
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def mixed_model(**overrides):
    """A dense layer and two sparse ones."""
    return tiny_model(num_hidden_layers=3, first_k_dense_replace=1, **overrides)


@pytest.fixture(autouse=True)
def unexpected_warnings_fail():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*routed experts")
        yield


def experts_size(model) -> int:
    config = model.config
    return 2 * config.n_routed_experts * 3 * config.hidden_size * config.moe_intermediate_size


@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_model_by_hand(tied):
    model = mixed_model(tie_word_embeddings=tied)
    report = quantization_report(model)
    config = model.config
    hidden, width = config.hidden_size, config.moe_intermediate_size
    parameters = {kind: part.parameters for kind, part in report.by_kind.items()}
    attention = parameters.pop("attention")
    assert parameters == {
        "embeddings": (1 if tied else 2) * config.vocab_size * hidden,
        "dense MLPs": 3 * hidden * config.intermediate_size,
        "routers": 2 * 2 * 8 * hidden,
        ROUTED_EXPERTS: experts_size(model),
        "shared experts": 2 * 3 * hidden * width,
        "norms and others": 7 * hidden,
    }
    assert sum(parameters.values()) + attention == report.total.parameters == config.total_parameters
    assert report.total.bytes == 4 * report.total.parameters
    assert report.total.share == report.total.quantized_parameters == report.total.quantized_bytes == 0


def test_adapters_and_a_learned_scale_are_parameters_too():
    model = mixed_model(upcycling="refine")
    assert quantization_report(model).total.parameters == model.config.total_parameters
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(target_modules=[], target_parameters=["mlp.experts.down_proj"])
    report = quantization_report(peft.get_peft_model(model, adapter))
    assert report.by_kind["adapters"].parameters == 2 * 8 * 8 * (32 + 24)
    assert report.by_kind[ROUTED_EXPERTS].parameters == experts_size(model)
    model = mixed_model(upcycling="refine")
    adapter = peft.LoraConfig(target_modules=["o_proj"], modules_to_save=["iteration_scale"], r=2)
    report = quantization_report(peft.get_peft_model(model, adapter))
    assert report.by_kind["adapters"].parameters == 3 * 2 * (64 + 32) + 2 * 32


class Params4bit(nn.Parameter):
    """As bitsandbytes has it: two weights in a byte, scales and the true shape beside them."""

    def __new__(cls, weight: torch.Tensor):
        self = super().__new__(cls, torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.quant_state = SimpleNamespace(shape=weight.shape, absmax=torch.zeros(weight.numel() // 64 + 1))
        return self


class Int8Params(nn.Parameter):
    def __new__(cls, weight: torch.Tensor):
        self = super().__new__(cls, torch.zeros(weight.shape, dtype=torch.int8), requires_grad=False)
        self.SCB = torch.zeros(len(weight))
        return self


class GPTQLinear(nn.Module):
    """Packed weights are buffers, eight to an integer."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.zeros(linear.in_features // 8, linear.out_features, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(1, linear.out_features, dtype=torch.float16))


def replace_linears(model: nn.Module, how: str) -> tuple[int, int]:
    """Quantises every linear module below the layers, as such tools do. Returns their parameters, and bytes after."""
    parameters = num_bytes = 0
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]
    for name, linear in linears:
        size = linear.weight.numel()
        parameters += size
        if how == "gptq":
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, GPTQLinear(linear))
            num_bytes += size // 2 + 2 * linear.out_features
        elif how == "bnb4":
            linear.weight = Params4bit(linear.weight)
            num_bytes += size // 2 + 4 * (size // 64 + 1)
        elif how == "bnb8":
            linear.weight = Int8Params(linear.weight)
            num_bytes += size + 4 * linear.out_features
        else:
            linear.weight = nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)
            linear.weight_scale_inv = nn.Parameter(torch.zeros(1, 1))
            num_bytes += size + 4
    return parameters, num_bytes


@pytest.mark.parametrize("how", ["bnb4", "bnb8", "fp8", "gptq"])
def test_quantisers_of_linear_modules_leave_the_experts(how):
    model = mixed_model()
    before = quantization_report(model)
    parameters, num_bytes = replace_linears(model, how)
    experts = f"{experts_size(model) / model.config.total_parameters:.0%}"
    with pytest.warns(UserWarning, match=rf"^0% of the routed experts.*{experts} of the model.*int8_weight_only"):
        report = quantization_report(model)
    assert report.total.parameters == before.total.parameters
    assert report.total.quantized_parameters == parameters
    assert report.total.quantized_bytes == num_bytes
    assert report.total.bytes == before.total.bytes - 4 * parameters + num_bytes
    for kind in (ROUTED_EXPERTS, "routers", "embeddings", "norms and others"):
        assert report.by_kind[kind].share == 0
        assert report.by_kind[kind].bytes == before.by_kind[kind].bytes
    assert report.by_kind["shared experts"].share == report.by_kind["dense MLPs"].share == 1
    assert "routed experts" in str(report) and "100.0%" in str(report)


def test_experts_in_one_byte_need_no_warning():
    model = mixed_model()
    for layer in model.model.layers[1:]:
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(layer.mlp.experts, name)
            setattr(layer.mlp.experts, name, nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False))
    report = quantization_report(model)
    assert report.by_kind[ROUTED_EXPERTS].share == 1
    assert report.total.quantized_parameters == report.by_kind[ROUTED_EXPERTS].bytes == experts_size(model)


def test_a_dense_model_has_no_experts_to_warn_of():
    model = tiny_model(n_routed_experts=None)
    replace_linears(model, "bnb8")
    assert ROUTED_EXPERTS not in quantization_report(model).by_kind


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and the same in 8 bit, saved."""
    pytest.importorskip("torchao")
    folder = tmp_path_factory.mktemp("quantised")
    torch.manual_seed(0)
    mixed_model(backbone="qwen2_moe", num_key_value_heads=2, head_dim=8).save_pretrained(folder / "plain")
    load(folder / "plain", quantization_config=int8_weight_only()).save_pretrained(folder / "int8")
    return folder


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", **options).eval()


@needs_torchao
def test_int8_reaches_the_experts_and_saves(folders):
    plain = load(folders / "plain")
    quantized = load(folders / "plain", quantization_config=int8_weight_only())
    report = quantization_report(quantized)
    assert report.total.parameters == plain.config.total_parameters
    assert {kind: round(part.share, 2) for kind, part in report.by_kind.items()} == {
        **{ROUTED_EXPERTS: 1.0, "dense MLPs": 1.0},
        "shared experts": 0.99,  # all but their gate
        "attention": 0.98,  # all but the biases
        **{"routers": 0.0, "embeddings": 0.0, "norms and others": 0.0},
    }
    size = {name: (folders / name / "model.safetensors").stat().st_size for name in ("plain", "int8")}
    assert size["int8"] < 0.5 * size["plain"]  # of so small a model much is scales, names and embeddings

    reloaded = load(folders / "int8")
    assert str(quantization_report(reloaded)) == str(report)
    for (name, actual), expected in zip(reloaded.named_parameters(), quantized.parameters(), strict=True):
        assert type(actual.data) is type(expected.data), name
        if type(actual.data) is not torch.Tensor:
            actual, expected = actual.dequantize(), expected.dequantize()
        assert torch.equal(actual, expected), name
    input_ids = random_ids(2, 9)
    with torch.no_grad():
        assert_equal_up_to_rounding(reloaded(input_ids).logits, quantized(input_ids).logits)


@needs_torchao
@pytest.mark.parametrize("backend", INT8_BACKENDS)
@torch.no_grad()
def test_int8_computes_with_the_rounded_weights(folders, backend):
    plain, quantized = load(folders / "plain"), load(folders / "int8")
    quantized.set_experts_implementation(backend)
    for (name, weight), rounded in zip(plain.named_parameters(), quantized.parameters(), strict=True):
        if type(rounded.data) is torch.Tensor:
            assert torch.equal(weight, rounded), name
            continue
        step = weight.abs().amax(dim=-1, keepdim=True) / 127  # one scale per output row
        assert ((weight - rounded.dequantize()).abs() <= 0.51 * step).all(), name
        weight.copy_(rounded.dequantize())
    for length in (9, 1):
        input_ids = random_ids(2, length)
        assert_equal_up_to_rounding(quantized(input_ids).logits, plain(input_ids).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(quantized.generate(input_ids, **options), plain.generate(input_ids, **options))


class TestAdaptersOnInt8:
    @pytest.fixture(params=["plain", "int8"])
    def quantized(self, folders, request):
        """Quantised while it is loaded, and loaded as it was saved."""
        options = {"quantization_config": int8_weight_only()} if request.param == "plain" else {}
        return load(folders / request.param, **options)

    @needs_torchao
    def test_experts_are_refused_before_training(self, quantized):
        peft = pytest.importorskip("peft")
        with pytest.raises(ValueError, match=r"routed experts are quantised \(Int8Tensor\).*experts=False"):
            lora_config(quantized)
        by_hand = peft.LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
        with pytest.raises(ValueError, match=r"routed experts are quantised \(Int8Tensor\).*experts=False"):
            peft.get_peft_model(quantized, by_hand)(random_ids(1, 3))

    @needs_torchao
    def test_what_can_be_adapted_is_trained_saved_and_merged(self, quantized, folders, tmp_path):
        peft = pytest.importorskip("peft")
        config = lora_config(quantized, experts=False, routers=True, r=2)
        model = peft.get_peft_model(quantized, config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        input_ids = random_ids(2, 9)
        losses = []
        for _ in range(8):
            losses.append(model(input_ids, labels=input_ids).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < 0.9 * losses[0]
        model.eval().save_pretrained(tmp_path)
        with torch.no_grad():
            expected = model(input_ids).logits
            again = peft.PeftModel.from_pretrained(load(folders / "int8"), tmp_path).eval()
            assert_equal_up_to_rounding(again(input_ids).logits, expected)
            # Merging rounds the sum of weight and adapter to 8 bits: half a step of each row, as quantising does.
            exact = {
                name: module.get_base_layer().weight.dequantize() + module.get_delta_weight("default")
                for name, module in again.named_modules()
                if isinstance(module, peft.tuners.lora.LoraLayer)
                and hasattr(module.get_base_layer().weight, "dequantize")
                and type(module.get_base_layer().weight.data) is not torch.Tensor
            }
            merged = again.merge_and_unload()
            assert len(exact) == 3 * 4 + 2 * 3
            for name, weight in exact.items():
                rounded = merged.get_submodule(name.removeprefix("base_model.model.")).weight
                assert type(rounded.data).__name__ == "Int8Tensor"
                step = weight.abs().amax(dim=-1, keepdim=True) / 127
                assert ((weight - rounded.dequantize()).abs() <= 0.51 * step).all(), name
            assert quantization_report(merged).by_kind[ROUTED_EXPERTS].share == 1
            difference = (merged(input_ids).logits - expected).abs().max()
            assert difference < 0.1 * (load(folders / "int8")(input_ids).logits - expected).abs().max()

    @needs_torchao
    def test_merging_and_going_back(self, quantized):
        peft = pytest.importorskip("peft")
        config = lora_config(quantized, experts=False, r=2, init_lora_weights=False)
        layer = peft.get_peft_model(quantized, config).get_submodule(
            "base_model.model.model.layers.1.self_attn.o_proj"
        )
        before, adapter = layer.get_base_layer().weight.dequantize(), layer.get_delta_weight("default").detach()
        half_step = (before + adapter).abs().amax(dim=-1, keepdim=True) / 127 * 0.51
        layer.merge()
        assert ((layer.get_base_layer().weight.dequantize() - before - adapter).abs() <= half_step).all()
        layer.unmerge()
        half_step += (before.abs().amax(dim=-1, keepdim=True) + half_step) / 127 * 0.51
        assert ((layer.get_base_layer().weight.dequantize() - before).abs() <= half_step).all()


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match="pip install torchao"):
        int8_weight_only()
