"""Models on a CUDA device against the same models on the CPU: every implementation of the experts, in training and
generation, with adapters and 8-bit weights. Where there is no device, the CPU stands in for it."""

import copy
import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import is_kernels_available

from modeling_coe import experts as experts_module
from modeling_coe import int8_weight_only, lora_config
from modeling_coe.experts import COE_EXPERTS_FUNCTIONS

from .helpers import EXPERTS_BACKENDS, random_ids, tiny_model


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
on_every_device = pytest.mark.parametrize("device", DEVICES)
FROM_THE_HUB = ("sonicmoe", "deepgemm")
# Products of these need more than the tiny model's widths.
WIDE = {"hidden_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 1, "initializer_range": 0.05}
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 5e-2}


def step(model, input_ids):
    """Logits, and gradients of all that is trained, on the CPU."""
    output = model(input_ids, labels=input_ids, use_cache=False)
    output.loss.backward()
    gradients = {name: p.grad.detach().cpu().float() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return output.logits.detach().cpu().float(), gradients


def assert_same_step(actual, expected, dtype=torch.float32):
    assert actual[1].keys() == expected[1].keys()
    for name in ("logits", *expected[1]):
        a, e = (each[0] if name == "logits" else each[1][name] for each in (actual, expected))
        tolerance = TOLERANCE[dtype] * max(e.abs().max().item(), 1e-3)
        torch.testing.assert_close(a, e, atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@on_every_device
@pytest.mark.parametrize("backend", [*EXPERTS_BACKENDS, "megablocks"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_a_training_step(device, backend, autocast):
    if backend == "megablocks" and importlib.util.find_spec("stk") is None:
        pytest.skip("stanford-stk is not installed")
    model = tiny_model(**WIDE).train()
    model.set_experts_implementation("eager")
    input_ids = random_ids(2, 9)
    expected = step(model, input_ids)
    model = model.to(device)
    model.set_experts_implementation(backend)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        actual = step(model, input_ids.to(device))
    if autocast:  # tokens may choose other experts, which moves gradients of single weights
        assert (actual[0] - expected[0]).abs().mean() < 0.1 * expected[0].abs().mean()
        assert all(gradient.isfinite().all() for gradient in actual[1].values())
    else:
        assert_same_step(actual, expected)


@on_every_device
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=str)
def test_generation(device, options):
    model = tiny_model()
    input_ids = random_ids(2, 6)
    greedy = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = model.generate(input_ids, **greedy)
    actual = model.to(device).generate(input_ids.to(device), **greedy, **options)
    assert torch.equal(actual.cpu(), expected)
    assert model.config._experts_implementation == "grouped_mm"


@on_every_device
def test_adapters(device):
    peft = pytest.importorskip("peft")
    model = tiny_model(**WIDE)
    model = peft.get_peft_model(model, lora_config(model, r=4, init_lora_weights=False)).train()
    input_ids = random_ids(2, 9)
    expected = step(model, input_ids)
    assert_same_step(step(model.to(device), input_ids.to(device)), expected)


@on_every_device
@torch.no_grad()
def test_int8(device, tmp_path):
    pytest.importorskip("torchao")
    tiny_model(**WIDE).save_pretrained(tmp_path)
    options = {"quantization_config": int8_weight_only(), "device_map": device}
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for weight, rounded in zip(plain.parameters(), quantized.parameters(), strict=True):
        if type(rounded.data) is not torch.Tensor:
            weight.copy_(rounded.dequantize())
    input_ids = random_ids(2, 9)
    actual = quantized(input_ids.to(device)).logits.cpu()
    torch.testing.assert_close(actual, plain(input_ids).logits, atol=1e-3, rtol=0)


class TestKernelsOfTheHub:
    """transformers' implementations with kernels that the `kernels` library fetches."""

    @pytest.mark.parametrize("backend", FROM_THE_HUB)
    def test_can_be_chosen(self, backend):
        model = tiny_model()
        model.set_experts_implementation(backend)
        assert model.get_experts_implementation() == {"": backend}
        assert COE_EXPERTS_FUNCTIONS[backend] is not ALL_EXPERTS_FUNCTIONS[backend]

    @pytest.mark.skipif(is_kernels_available(), reason="the `kernels` library is installed")
    @pytest.mark.parametrize("backend", FROM_THE_HUB)
    def test_a_missing_kernel_is_one_line_with_a_remedy(self, backend):
        model = tiny_model(**WIDE).to(torch.bfloat16)
        model.set_experts_implementation(backend)
        with torch.no_grad(), pytest.raises(ImportError, match=rf"^`{backend}` cannot run: .*`?kernels`?") as caught:
            model(random_ids(1, 4))
        message = str(caught.value)
        assert "\n" not in message and message.endswith('"grouped_mm", "batched_mm", "eager".')

    def test_what_cannot_be_trained_says_so(self):
        model = tiny_model(**WIDE).to(torch.bfloat16).train()
        model.set_experts_implementation("deepgemm")
        with pytest.raises(ValueError, match=r"`deepgemm` has no gradients\. Use it under `torch.no_grad\(\)`"):
            model(random_ids(1, 4))

    @pytest.mark.parametrize("trains", [True, False])
    def test_what_runs_is_left_alone(self, monkeypatch, trains):
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "sonicmoe", ALL_EXPERTS_FUNCTIONS["torch_grouped_mm"])
        monkeypatch.setitem(COE_EXPERTS_FUNCTIONS, "sonicmoe", experts_module._from_the_hub("sonicmoe", trains))
        model = tiny_model(**WIDE)
        input_ids = random_ids(1, 4)
        with torch.no_grad():
            expected = model(input_ids).logits
            model.set_experts_implementation("sonicmoe")
            torch.testing.assert_close(model(input_ids).logits, expected)

    @on_every_device
    @pytest.mark.parametrize("backend", FROM_THE_HUB)
    def test_against_the_loop(self, device, backend):
        model = tiny_model(**WIDE).to(device, torch.bfloat16)
        model.set_experts_implementation("eager")
        reference, input_ids = copy.deepcopy(model), random_ids(2, 9).to(device)
        model.set_experts_implementation(backend)
        try:
            with torch.no_grad():
                actual = model(input_ids).logits
        except ImportError as error:
            pytest.skip(str(error))
        with torch.no_grad():
            expected = reference(input_ids).logits
        torch.testing.assert_close(actual, expected, atol=5e-2 * expected.abs().max().item(), rtol=0)
        if backend == "sonicmoe":
            actual, expected = (step(each.train(), input_ids) for each in (model, reference))
            assert_same_step(actual, expected, torch.bfloat16)
