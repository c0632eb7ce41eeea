"""`quantization_report` against hand counts, and models in 8 and 4 bits: saved, loaded, adapted, compiled."""

import importlib.util
import json
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from modeling_coe.lora import lora_config
from modeling_coe.quantization import ROUTED_EXPERTS, int4_weight_only, int8_weight_only, quantization_report
from modeling_coe.quantized_linear import QuantizedLinear, prepare_quantized
from modeling_coe.quantized_weights import quantize_int4

from .helpers import assert_equal_up_to_rounding, random_ids, run_isolated, tiny_model


# The others transpose or batch the weights themselves, which torchao's tensors do not support.
QUANTIZED_BACKENDS = ("eager", "grouped_mm")
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def mixed_model(**overrides):
    """A dense layer and two sparse ones."""
    return tiny_model(num_hidden_layers=3, first_k_dense_replace=1, **overrides)


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """Float32 rows are not rounded to bfloat16, however fast that is."""
    monkeypatch.setenv("COE_CPU_KERNEL", "mm")


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


RECIPES = {"int8": int8_weight_only, "int4": int4_weight_only}
every_recipe = pytest.mark.parametrize("recipe", RECIPES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and the same in 8 and in 4 bit, saved."""
    pytest.importorskip("torchao")
    folder = tmp_path_factory.mktemp("quantised")
    torch.manual_seed(0)
    # Inputs in groups of 32, for 4 bits.
    widths = {"moe_intermediate_size": 32, "intermediate_size": 64}
    mixed_model(backbone="qwen2_moe", num_key_value_heads=2, head_dim=8, **widths).save_pretrained(folder / "plain")
    for name, recipe in RECIPES.items():
        load(folder / "plain", quantization_config=recipe()).save_pretrained(folder / name)
    return folder


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", **options).eval()


def step_of(weight: torch.Tensor, recipe: str) -> torch.Tensor:
    """How far apart the numbers are that a quantised weight can be, for every weight."""
    if recipe == "int8":  # one scale per output row
        return (weight.abs().amax(dim=-1, keepdim=True) / 127).expand_as(weight)
    groups = weight.unflatten(-1, (-1, 32))  # whose scales have the 8 bits of bfloat16
    step = 1.02 * (groups.amax(-1, True) - groups.amin(-1, True)) / 15 + 2**-7 * groups.abs().amax(-1, True)
    return step.expand_as(groups).flatten(-2)


def dequantized(parameter: torch.Tensor) -> torch.Tensor:
    return parameter if type(parameter.data) is torch.Tensor else parameter.dequantize(torch.float32)


@needs_torchao
@every_recipe
def test_experts_are_reached_and_saved(folders, recipe):
    plain = load(folders / "plain")
    quantized = load(folders / "plain", quantization_config=RECIPES[recipe]())
    report = quantization_report(quantized)
    assert report.total.parameters == plain.config.total_parameters
    assert {kind: round(part.share, 2) for kind, part in report.by_kind.items()} == {
        **{ROUTED_EXPERTS: 1.0, "dense MLPs": 1.0},
        "shared experts": 0.99,  # all but their gate
        "attention": 0.98,  # all but the biases
        **{"routers": 0.0, "embeddings": 0.0, "norms and others": 0.0},
    }
    experts = report.by_kind[ROUTED_EXPERTS]
    # A scale in float32 and a zero of a byte for a row of 32, or scale and zero in bfloat16.
    assert experts.bytes == experts.parameters * (1 + 5 / 32 if recipe == "int8" else 1 / 2 + 4 / 32)
    size = {name: (folders / name / "model.safetensors").stat().st_size for name in ("plain", recipe)}
    assert size[recipe] < 0.5 * size["plain"]  # of so small a model much is names and embeddings

    reloaded = load(folders / recipe)
    assert str(quantization_report(reloaded)) == str(report)
    for (name, actual), expected in zip(reloaded.named_parameters(), quantized.parameters(), strict=True):
        assert type(actual.data) is type(expected.data), name
        assert torch.equal(dequantized(actual), dequantized(expected)), name
    input_ids = random_ids(2, 9)
    with torch.no_grad():
        assert_equal_up_to_rounding(reloaded(input_ids).logits, quantized(input_ids).logits)


@needs_torchao
@every_recipe
def test_saved_as_torchao_has_it(folders, recipe, tmp_path):
    """What is saved again is the same, tensor for tensor, and of torchao's types: others can read it."""
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    load(folders / recipe).save_pretrained(tmp_path)
    files = [folder / "model.safetensors" for folder in (folders / recipe, tmp_path)]
    first, second = map(load_file, files)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    with safe_open(files[1], framework="pt") as file:
        tensors, _ = unflatten_tensor_state_dict(second, file.metadata())
    weight = tensors["model.layers.1.mlp.experts.down_proj"]
    assert type(weight).__name__ == {"int8": "Int8Tensor", "int4": "Int4Tensor"}[recipe]
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_type"]["default"]
    kinds = {each["_type"] for each in saved["_data"]["fqn_to_config"].values()}
    assert kinds == {{"int8": "Int8WeightOnlyConfig", "int4": "Int4WeightOnlyConfig"}[recipe]}


@needs_torchao
@every_recipe
@pytest.mark.parametrize("backend", QUANTIZED_BACKENDS)
@torch.no_grad()
def test_computes_with_the_rounded_weights(folders, backend, recipe):
    plain, quantized = load(folders / "plain"), load(folders / recipe)
    quantized.set_experts_implementation(backend)
    for (name, weight), rounded in zip(plain.named_parameters(), quantized.parameters(), strict=True):
        if type(rounded.data) is torch.Tensor:
            assert torch.equal(weight, rounded), name
            continue
        assert ((weight - dequantized(rounded)).abs() <= 0.51 * step_of(weight, recipe)).all(), name
        weight.copy_(dequantized(rounded))
    for length in (9, 1):
        input_ids = random_ids(2, length)
        assert_equal_up_to_rounding(quantized(input_ids).logits, plain(input_ids).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(quantized.generate(input_ids, **options), plain.generate(input_ids, **options))


@needs_torchao
@every_recipe
@torch.no_grad()
def test_rounded_rows(folders, monkeypatch, recipe):
    """Rows in bfloat16 where that is faster: logits move by what 8 bits of a row can move them, in every shape."""
    quantized = load(folders / recipe)
    quantized.set_experts_implementation("grouped_mm")
    for shape in ((1, 1), (1, 9), (3, 40)):
        input_ids = random_ids(*shape)
        exact = quantized(input_ids).logits
        for kernel in ("packed", "bfloat16_mm"):
            monkeypatch.setenv("COE_CPU_KERNEL", kernel)
            difference = (quantized(input_ids).logits - exact).norm() / exact.norm()
            # A few tokens choose another expert.
            assert 0 < difference < 0.1, (shape, kernel)
        monkeypatch.setenv("COE_CPU_KERNEL", "mm")


@needs_torchao
def test_4_bits_beside_8(tmp_path):
    """Where inputs are no groups of 32, a weight gets 8 bits, and is saved and multiplied as it is."""
    torch.manual_seed(0)
    mixed_model().save_pretrained(tmp_path / "plain")  # experts of width 24, and a dense MLP of 48
    quantized = load(tmp_path / "plain", quantization_config=int4_weight_only())
    quantized.save_pretrained(tmp_path / "int4")
    reloaded = load(tmp_path / "int4")
    for model in (quantized, reloaded):
        experts = model.model.layers[1].mlp.experts
        kinds = [type(getattr(experts, name)).__name__ for name in ("gate_up_proj", "down_proj")]
        assert kinds == ["PackedInt4Tensor", "Int8Tensor"]
        assert quantization_report(model).by_kind[ROUTED_EXPERTS].share == 1
    reloaded.set_experts_implementation("grouped_mm")
    input_ids = random_ids(2, 9)
    with torch.no_grad():
        assert_equal_up_to_rounding(reloaded(input_ids).logits, quantized(input_ids).logits)


@needs_torchao
def test_4_bits_elsewhere_than_on_the_cpu():
    """What does not work is said while the model is loaded."""
    model = mixed_model(moe_intermediate_size=32)
    experts = model.model.layers[1].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        weight = quantize_int4(getattr(experts, name)).to("meta")
        experts.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    with pytest.raises(ValueError, match=r"4 bits are multiplied on the CPU only; `gate_up_proj` is on meta.*int8_we"):
        prepare_quantized(model)


@needs_torchao
@every_recipe
def test_latent_attention_absorbs(recipe, tmp_path):
    """`kv_b_proj` is left as it is: decoding multiplies queries with it instead of expanding every latent."""
    tiny_model(num_hidden_layers=1).save_pretrained(tmp_path)
    attention = load(tmp_path, quantization_config=RECIPES[recipe]()).model.layers[0].self_attn
    assert type(attention.kv_b_proj) is nn.Linear and type(attention.kv_b_proj.weight) is nn.Parameter
    assert type(attention.kv_a_proj_with_mqa) is type(attention.q_proj) is QuantizedLinear


@needs_torchao
@every_recipe
@torch.no_grad()
def test_compiled(folders, recipe):
    quantized = load(folders / recipe)
    quantized.set_experts_implementation("grouped_mm")
    iteration, hidden_states = quantized.model.layers[1].mlp, torch.randn(2, 9, 32)
    torch._dynamo.reset()
    actual, expected = torch.compile(iteration, backend="eager")(hidden_states), iteration(hidden_states)
    assert torch.equal(actual[1], expected[1])
    assert_equal_up_to_rounding(actual[0], expected[0])


REMOTE = """
import torch
from transformers import AutoModelForCausalLM

folder, results = sys.argv[1:]
inputs = torch.load(results + "/inputs.pt")
for recipe in ("int8", "int4"):
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{recipe}", trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules")
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "QuantizedLinear"
    with torch.no_grad():
        torch.save(model(inputs).logits, f"{results}/{recipe}.pt")
    model.save_pretrained(f"{results}/{recipe}")
"""


@needs_torchao
def test_remote_code(folders, tmp_path):
    """Where this package is not installed, a folder's own code multiplies and saves."""
    input_ids = random_ids(2, 7)
    torch.save(input_ids, tmp_path / "inputs.pt")
    run = run_isolated(REMOTE, tmp_path, folders, tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    for recipe in RECIPES:
        with torch.no_grad():
            for folder in (folders / recipe, tmp_path / recipe):
                assert_equal_up_to_rounding(torch.load(tmp_path / f"{recipe}.pt"), load(folder)(input_ids).logits)


@every_recipe
class TestAdapters:
    @pytest.fixture(params=["quantised", "saved"])
    def quantized(self, folders, request, recipe):
        """Quantised while it is loaded, and loaded as it was saved."""
        if request.param == "saved":
            return load(folders / recipe)
        return load(folders / "plain", quantization_config=RECIPES[recipe]())

    @needs_torchao
    def test_experts_are_refused_before_training(self, quantized):
        peft = pytest.importorskip("peft")
        with pytest.raises(ValueError, match=r"routed experts are quantised \(\w+Tensor\).*experts=False"):
            lora_config(quantized)
        by_hand = peft.LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
        with pytest.raises(ValueError, match=r"routed experts are quantised \(\w+Tensor\).*experts=False"):
            peft.get_peft_model(quantized, by_hand)(random_ids(1, 3))

    @needs_torchao
    def test_what_can_be_adapted_is_trained_saved_and_merged(self, quantized, folders, tmp_path, recipe):
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
            again = peft.PeftModel.from_pretrained(load(folders / recipe), tmp_path).eval()
            assert_equal_up_to_rounding(again(input_ids).logits, expected)
            # Merging rounds the sum of weight and adapter by half a step, as quantising does.
            exact = {
                name: dequantized(module.get_base_layer().weight) + module.get_delta_weight("default")
                for name, module in again.named_modules()
                if isinstance(module, peft.tuners.lora.LoraLayer)
                and hasattr(module.get_base_layer().weight, "dequantize")
                and type(module.get_base_layer().weight.data) is not torch.Tensor
            }
            merged = again.merge_and_unload()
            assert len(exact) == 3 * 4 + 2 * 3
            for name, weight in exact.items():
                rounded = merged.get_submodule(name.removeprefix("base_model.model.")).weight
                assert type(rounded.data).__name__ == {"int8": "Int8Tensor", "int4": "PackedInt4Tensor"}[recipe]
                assert ((weight - dequantized(rounded)).abs() <= 0.51 * step_of(weight, recipe)).all(), name
            assert quantization_report(merged).by_kind[ROUTED_EXPERTS].share == 1
            difference = (merged(input_ids).logits - expected).abs().max()
            limit = 0.1 if recipe == "int8" else 1.0
            assert difference < limit * (load(folders / recipe)(input_ids).logits - expected).abs().max()

    @needs_torchao
    def test_merging_and_going_back(self, quantized, recipe):
        peft = pytest.importorskip("peft")
        config = lora_config(quantized, experts=False, r=2, init_lora_weights=False)
        layer = peft.get_peft_model(quantized, config).get_submodule(
            "base_model.model.model.layers.1.self_attn.o_proj"
        )
        before, adapter = dequantized(layer.get_base_layer().weight), layer.get_delta_weight("default").detach()
        layer.merge()
        merged = dequantized(layer.get_base_layer().weight)
        half_step = 0.51 * step_of(before + adapter, recipe)
        assert ((merged - before - adapter).abs() <= half_step).all()
        layer.unmerge()
        half_step += 0.51 * step_of(merged - adapter, recipe)
        assert ((dequantized(layer.get_base_layer().weight) - before).abs() <= half_step).all()


@pytest.mark.parametrize("recipe", RECIPES.values())
def test_without_torchao(monkeypatch, recipe):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=f"`{recipe.__name__}` needs torchao.*pip install torchao"):
        recipe()
