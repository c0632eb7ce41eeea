"""Block-sparse experts against a dense float64 loop, and inside whole models; on the CPU in Triton's interpreter.

`conftest.py` sets `TRITON_INTERPRET=1` where there is no GPU. What needs a process of its own (another environment,
the compiler instead of the interpreter) starts one.
"""

import importlib.util
import os
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import batched_mm_experts_forward

from modeling_coe import experts as experts_module
from modeling_coe import megablocks
from modeling_coe.megablocks import megablocks_backend
from modeling_coe.modeling_coe import CoeExperts

from .helpers import ROOT, enable_checkpointing, random_ids, requires_compiled_grouped_mm, tiny_config, tiny_model
from .test_reference import CASES, gradient, load


HAS_STK = importlib.util.find_spec("stk") is not None and importlib.util.find_spec("triton") is not None

requires_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
requires_interpreter = pytest.mark.skipif(
    "TRITON_INTERPRET" not in os.environ, reason="Triton compiles for the GPU in this process"
)
DEVICES = [pytest.param("cpu", marks=requires_interpreter), pytest.param("cuda", marks=requires_gpu)]
on_every_device = pytest.mark.parametrize("device", DEVICES)
# Errors relative to the largest entry, in units of the dtype's rounding: in fp32 those of long sums show.
ROUNDINGS = {torch.float32: 32, torch.bfloat16: 8, torch.float16: 8}

pytestmark = pytest.mark.skipif(not HAS_STK, reason="stanford-stk and triton are not installed")


@pytest.fixture(autouse=True)
def always_blocks(monkeypatch):
    monkeypatch.setattr(megablocks, "MIN_ROWS_PER_EXPERT", 0)


def make_experts(hidden, width, num_experts, dtype=torch.float32, device="cpu", act="silu") -> CoeExperts:
    config = tiny_config(
        hidden_size=hidden,
        num_attention_heads=1,
        moe_intermediate_size=width,
        n_routed_experts=num_experts,
        num_experts_per_tok=1,
        hidden_act=act,
    )
    config._experts_implementation = "megablocks"
    experts = CoeExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return experts.to(device, dtype)


def random_routing(num_tokens, top_k, num_experts, device="cpu", sentinels=False):
    """Distinct experts for each token; with sentinels, about half of them belong to another rank and weigh nothing."""
    index = torch.rand(num_tokens, num_experts).argsort(dim=1)[:, :top_k]
    weights = torch.rand(num_tokens, top_k)
    if sentinels:
        elsewhere = torch.rand(num_tokens, top_k) < 0.5
        index, weights = index.masked_fill(elsewhere, num_experts), weights.masked_fill(elsewhere, 0)
    return index.to(device), weights.to(device)


def dense_experts(hidden_states, index, weights, gate_up_proj, down_proj, act):
    """Every expert on every token, then weighed: no sorting, no padding, no blocks."""
    output = torch.zeros_like(hidden_states)
    for expert in range(len(gate_up_proj)):
        gate, up = F.linear(hidden_states, gate_up_proj[expert]).chunk(2, dim=-1)
        weight = (weights * (index == expert)).sum(dim=1, keepdim=True)
        output = output + weight * F.linear(ACT2FN[act](gate) * up, down_proj[expert])
    return output


def compare_with_dense(experts, num_tokens, index, weights, dtype, act="silu") -> None:
    """The output and all four gradients of a random projection of it."""
    hidden = experts.down_proj.shape[1]
    hidden_states = torch.randn(num_tokens, hidden).to(experts.down_proj)
    projection = torch.randn_like(hidden_states)
    inputs = [hidden_states, weights, experts.gate_up_proj, experts.down_proj]
    reference = [tensor.detach().double().requires_grad_() for tensor in inputs]
    hidden_states.requires_grad_()
    weights.requires_grad_()

    output = experts(hidden_states, index, weights)
    assert output.dtype == hidden_states.dtype
    actual = output, *torch.autograd.grad((output * projection).sum(), inputs)
    output = dense_experts(reference[0], index, *reference[1:], act)
    expected = output, *torch.autograd.grad((output * projection.double()).sum(), reference)

    for name, a, e in zip(("output", "input", "weights", "gate_up_proj", "down_proj"), actual, expected, strict=True):
        scale = max(e.abs().max().item() if e.numel() else 0, 1.0)
        tolerance = ROUNDINGS[dtype] * torch.finfo(dtype).eps * scale
        torch.testing.assert_close(
            a.double(), e, atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    unused = [expert for expert in range(experts.num_experts) if not (index == expert).any()]
    assert not actual[3][unused].any() and not actual[4][unused].any()


class TestAgainstDense:
    @on_every_device
    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(
        hidden=st.sampled_from([32, 96, 100, 128, 160, 192]),
        width=st.sampled_from([20, 64, 96, 128, 160, 176, 192]),
        num_experts=st.integers(1, 5),
        top_k=st.integers(1, 3),
        num_tokens=st.integers(1, 9),
        dtype=st.sampled_from(list(ROUNDINGS)),
        sentinels=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    def test_any_shape(self, device, hidden, width, num_experts, top_k, num_tokens, dtype, sentinels, seed):
        torch.manual_seed(seed)
        experts = make_experts(hidden, width, num_experts, dtype, device)
        index, weights = random_routing(num_tokens, min(top_k, num_experts), num_experts, device, sentinels)
        compare_with_dense(experts, num_tokens, index, weights, dtype)

    @on_every_device
    def test_the_papers_width(self, device):
        """704 = 5.5 blocks, so that only 2 x 704 is a multiple of 128."""
        experts = make_experts(128, 704, 2, device=device)
        compare_with_dense(experts, 3, *random_routing(3, 1, 2, device), torch.float32)

    @on_every_device
    @pytest.mark.parametrize("expert", [0, 2], ids=["first", "last"])
    def test_all_tokens_on_one_expert(self, device, expert):
        experts = make_experts(96, 64, 3, device=device)
        index = torch.full((300, 1), expert, device=device)
        compare_with_dense(experts, 300, index, torch.rand(300, 1, device=device), torch.float32)

    @on_every_device
    def test_full_and_partial_blocks(self, device):
        experts = make_experts(128, 64, 4, device=device)
        index = torch.tensor([0] * 128 + [1] * 129 + [3] * 127, device=device)[torch.randperm(384)].unsqueeze(1)
        compare_with_dense(experts, 384, index, torch.rand(384, 1, device=device), torch.float32)

    @on_every_device
    @pytest.mark.parametrize("act", ["gelu", "relu2", "sigmoid"])
    def test_any_activation(self, device, act):
        """Exact for sigmoid(0) = 0.5 too: padded columns are gone before the activation."""
        experts = make_experts(128, 40, 2, device=device, act=act)
        compare_with_dense(experts, 5, *random_routing(5, 2, 2, device), torch.float32, act)

    @on_every_device
    def test_only_experts_of_other_ranks(self, device):
        experts = make_experts(96, 64, 2, device=device)
        index = torch.full((5, 2), 2, device=device)
        compare_with_dense(experts, 5, index, torch.zeros(5, 2, device=device), torch.float32)

    @on_every_device
    def test_no_tokens(self, device):
        experts = make_experts(96, 64, 2, device=device)
        index = torch.empty(0, 2, dtype=torch.long, device=device)
        compare_with_dense(experts, 0, index, torch.empty(0, 2, device=device), torch.float32)

    @on_every_device
    @pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
    def test_index_dtypes_and_strides(self, device, index_dtype):
        experts = make_experts(128, 64, 3, device=device)
        experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj.detach().mT.contiguous().mT)
        assert not experts.gate_up_proj.is_contiguous()
        index, weights = random_routing(6, 2, 3, device)
        compare_with_dense(experts, 6, index.to(index_dtype).t().contiguous().t(), weights, torch.float32)

    @on_every_device
    def test_more_column_blocks_than_int16_indices_reach(self, device):
        """Block 256 starts at 32768; only experts behind it have tokens."""
        experts = make_experts(128, 128, 130, device=device)  # two column blocks each
        index = torch.tensor([[129], [128], [129]], device=device)
        compare_with_dense(experts, 3, index, torch.rand(3, 1, device=device), torch.float32)

    @on_every_device
    def test_more_row_blocks_than_int16_indices_reach(self, device):
        """The last of 260 row blocks, alone: its product, and its part of the weight's gradient."""
        num_blocks = 260
        bins = megablocks._sort_into_bins(torch.zeros(num_blocks * 128, 1, dtype=torch.long, device=device), 1)
        topology = megablocks._topology(bins, 1)
        assert all(indices.dtype == torch.int32 for indices in topology)
        # Integers that TF32, which the bare kernels use on a GPU, does not round.
        x = torch.zeros(num_blocks * 128, 128, device=device)
        x[-128:] = torch.randint(-4, 5, (128, 128)).float()
        weight = torch.randint(-4, 5, (128, 128), device=device).float()
        values = torch.zeros(num_blocks, 128, 128, device=device)
        kernels, shape = megablocks_backend().kernels, (len(x), len(weight))
        last = [indices[-1:] for indices in topology[1:3]]
        kernels.sdd(x, weight.t(), shape, values[-1:], topology.offsets, *last)
        torch.testing.assert_close(values[-1], x[-128:] @ weight.t(), atol=1e-4, rtol=0)
        grad_weight = torch.empty_like(weight)
        topology = topology._replace(
            offsets_t=torch.tensor([num_blocks - 1, num_blocks], dtype=torch.int32).to(device)
        )
        kernels.dsd(shape[::-1], values, *topology, True, x, grad_weight)
        torch.testing.assert_close(grad_weight, values[-1].t() @ x[-128:], atol=1e-2, rtol=0)


def run_experts(experts, dtype=torch.float32, num_tokens=7, seed=0):
    torch.manual_seed(seed)
    hidden_states = torch.randn(num_tokens, experts.down_proj.shape[1], dtype=dtype, requires_grad=True)
    index, weights = random_routing(num_tokens, 2, experts.num_experts)
    output = experts(hidden_states, index, weights.requires_grad_())
    leaves = [hidden_states, weights, *(p for p in experts.parameters() if p.requires_grad)]
    return output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)


@requires_interpreter
class TestExperts:
    def test_two_runs_give_the_same_bits(self):
        experts = make_experts(160, 96, 3)
        for first, second in zip(run_experts(experts), run_experts(experts), strict=True):
            assert torch.equal(first, second)

    def test_autocast_computes_in_its_dtype(self):
        """fp32 weights under bf16 autocast: as a bf16 copy of the experts; gradients come back in fp32."""
        experts = make_experts(128, 64, 3)
        with torch.autocast("cpu", torch.bfloat16):
            actual = run_experts(experts)
        expected = run_experts(experts.to(torch.bfloat16), torch.bfloat16)
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == torch.float32
            tolerance = 4 * torch.finfo(torch.bfloat16).eps * e.float().abs().max().item()
            torch.testing.assert_close(a, e.float(), atol=tolerance, rtol=0)

    def test_frozen_experts_compute_no_weight_gradients(self, monkeypatch):
        experts = make_experts(128, 64, 3)
        expected = run_experts(experts)
        kernels = megablocks_backend().kernels
        transposed = []

        def counting_dsd(shape, *args, launch=kernels.dsd):
            transposed.append(args[7])
            launch(shape, *args)

        monkeypatch.setattr(kernels, "dsd", counting_dsd)
        run_experts(experts)
        assert transposed.count(True) == transposed.count(False) == 2
        transposed.clear()
        experts.down_proj.requires_grad_(False)
        run_experts(experts)
        assert transposed.count(True) == 1
        experts.requires_grad_(False)
        actual = run_experts(experts)
        assert transposed.count(True) == 1
        for a, e in zip(actual, expected[:3], strict=True):
            torch.testing.assert_close(a, e)

    def test_edits_of_weights_are_seen_at_once(self):
        """The widths are padded here, so a kept copy would show."""
        experts = make_experts(100, 20, 3)
        torch.manual_seed(0)
        hidden_states, (index, weights) = torch.randn(5, 100), random_routing(5, 2, 3)
        with torch.no_grad():
            first = experts(hidden_states, index, weights)
            experts.down_proj.mul_(2)
            torch.testing.assert_close(experts(hidden_states, index, weights), 2 * first)
            experts.down_proj.data = 3 * experts.down_proj.data
            torch.testing.assert_close(experts(hidden_states, index, weights), 6 * first)
            experts.gate_up_proj.data.zero_()
            assert not experts(hidden_states, index, weights).any()

    def test_weights_that_fit_are_not_copied(self):
        for shape in ((2, 1408, 704), (2, 128, 160)):
            weight = torch.empty(shape)
            assert megablocks.prepare_weight(weight, weight.dtype).data_ptr() == weight.data_ptr()
        assert megablocks.prepare_weight(torch.empty(2, 100, 70), torch.float32).shape == (2, 128, 128)
        assert megablocks.prepare_weight(torch.empty(2, 128, 170), torch.float32).shape == (2, 128, 192)


MODEL = {
    "hidden_size": 64,
    "moe_intermediate_size": 40,
    "n_routed_experts": 4,
    "num_hidden_layers": 1,
    "inner_iter": 2,
}


def loss_and_gradients(model, input_ids):
    model.zero_grad()
    output = model(input_ids, labels=input_ids, use_cache=False)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), output.logits.detach(), gradients


def assert_same_training_step(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual[:2], expected[:2], atol=tolerance, rtol=tolerance)
    assert actual[2].keys() == expected[2].keys()
    for name, wanted in expected[2].items():
        scale = max(wanted.abs().max().item(), 1.0)
        torch.testing.assert_close(actual[2][name], wanted, atol=tolerance * scale, rtol=0)


@requires_interpreter
class TestModel:
    @pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
    def test_training_step_equals_grouped_mm(self, checkpointing):
        model = tiny_model(**MODEL, aux_loss_alpha=0.1, n_shared_experts=1).train()
        input_ids = random_ids(2, 6)
        model.set_experts_implementation("grouped_mm")
        expected = loss_and_gradients(model, input_ids)
        if checkpointing:
            enable_checkpointing(model)
        model.set_experts_implementation("megablocks")
        assert_same_training_step(loss_and_gradients(model, input_ids), expected)

    def test_lora_on_expert_parameters_and_after_merge(self):
        config = LoraConfig(
            r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        )
        model = get_peft_model(tiny_model(**MODEL), config).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        base, input_ids = model.get_base_model(), random_ids(1, 6)
        base.set_experts_implementation("grouped_mm")
        expected = loss_and_gradients(model, input_ids)
        base.set_experts_implementation("megablocks")
        actual = loss_and_gradients(model, input_ids)
        assert actual[2] and all("lora" in name for name in actual[2])
        assert_same_training_step(actual, expected)
        model.eval()
        merged = model.merge_and_unload()
        with torch.no_grad():
            torch.testing.assert_close(merged(input_ids).logits, expected[1], atol=1e-5, rtol=1e-5)

    @pytest.mark.usefixtures("reference_folder")
    @pytest.mark.parametrize("case", CASES)
    def test_official_logits(self, case):
        model, expected = load(case, "megablocks")
        with torch.no_grad():
            logits = model(expected["input_ids"]).logits
        torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)

    @pytest.mark.usefixtures("reference_folder")
    @pytest.mark.parametrize("case", CASES)
    def test_official_gradients(self, case):
        model, expected = load(case, "megablocks")
        model.config.aux_loss_alpha = 0.0
        loss = model.train()(expected["input_ids"], labels=expected["input_ids"]).loss
        torch.testing.assert_close(loss, expected["train.loss"], atol=1e-5, rtol=0)
        loss.backward()
        names = [name for name in expected if name.startswith("grad_noaux.")]
        assert names
        for name in names:
            tolerance = 5e-5 * expected[name].abs().max().item()
            actual = gradient(model, name.removeprefix("grad_noaux."))
            torch.testing.assert_close(actual, expected[name], atol=tolerance, rtol=0)


@requires_interpreter
class TestHandOver:
    @pytest.fixture
    def calls(self, monkeypatch):
        """Which implementation computed each call."""
        calls = []

        def recording(name, function):
            def record(*args):
                calls.append(name)
                return function(*args)

            return record

        for name, function in [
            ("batched_mm_experts_forward", batched_mm_experts_forward),
            ("torch_experts_forward", megablocks.torch_experts_forward),
            ("_block_sparse_experts", megablocks._block_sparse_experts),
        ]:
            monkeypatch.setattr(megablocks, name, recording(name, function))
        return calls

    def test_by_rows_per_expert(self, calls, monkeypatch):
        monkeypatch.setattr(megablocks, "MIN_ROWS_PER_EXPERT", 4)
        experts = make_experts(64, 32, 3)
        outputs = {}
        for num_tokens in (1, 2, 5, 6):  # times two slots: 2, 4, 10 and 12 rows for 3 experts
            outputs[num_tokens] = run_experts(experts, num_tokens=num_tokens)
        assert calls == [
            "batched_mm_experts_forward",
            "torch_experts_forward",
            "torch_experts_forward",
            "_block_sparse_experts",
        ]
        monkeypatch.setattr(megablocks, "MIN_ROWS_PER_EXPERT", 0)
        for num_tokens, handed_over in outputs.items():
            for a, e in zip(run_experts(experts, num_tokens=num_tokens), handed_over, strict=True):
                torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-5)

    def test_generation_hands_over(self, calls, monkeypatch):
        monkeypatch.setattr(megablocks, "MIN_ROWS_PER_EXPERT", 64)
        model = tiny_model()
        input_ids = random_ids(1, 6)
        expected = model.generate(input_ids, max_new_tokens=4, do_sample=False)
        model.set_experts_implementation("megablocks")
        assert torch.equal(model.generate(input_ids, max_new_tokens=4, do_sample=False), expected)
        assert calls and "_block_sparse_experts" not in calls


@requires_interpreter
class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh_compiler(self):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        yield
        torch.compiler.reset()

    def test_one_graph_break_that_says_why(self):
        experts = make_experts(64, 32, 3)
        compiled = torch.compile(lambda *args: experts(*args) * 2, backend="eager")
        for num_tokens in (3, 4, 5, 8):
            args = (torch.randn(num_tokens, 64), *random_routing(num_tokens, 2, 3))
            torch.testing.assert_close(compiled(*args), experts(*args) * 2)
        breaks = torch._dynamo.utils.counters["graph_break"]
        assert len(breaks) == 1 and "the routing decides the number of row blocks" in next(iter(breaks))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4

    def test_hand_over_is_one_graph_for_any_batch(self, monkeypatch):
        monkeypatch.setattr(megablocks, "MIN_ROWS_PER_EXPERT", 64)
        experts = make_experts(64, 32, 3)
        compiled = torch.compile(experts, fullgraph=True, backend="eager")
        for num_tokens in (8, 9, 10, 13):
            args = (torch.randn(num_tokens, 64), *random_routing(num_tokens, 2, 3))
            torch.testing.assert_close(compiled(*args), experts(*args))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # one static, one with a dynamic length

    @requires_compiled_grouped_mm
    def test_few_tokens_keep_the_model_one_graph(self, monkeypatch):
        monkeypatch.setattr(megablocks, "MIN_ROWS_PER_EXPERT", 64)
        model = tiny_model(**MODEL).train()
        model.set_experts_implementation("megablocks")
        input_ids = random_ids(1, 6)
        expected = loss_and_gradients(model, input_ids)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        loss = compiled(input_ids, labels=input_ids, use_cache=False).loss
        torch.testing.assert_close(loss, expected[0])


@requires_interpreter
class TestErrors:
    @pytest.fixture(params=[0, 64], ids=["blocks", "few tokens"], autouse=True)
    def threshold(self, request, monkeypatch):
        """Every condition is checked before a call is handed over."""
        monkeypatch.setattr(megablocks, "MIN_ROWS_PER_EXPERT", request.param)

    @pytest.mark.parametrize(
        "flag, value, text",
        [
            ("is_transposed", True, "transposed weights"),
            ("has_bias", True, "biases"),
            ("has_gate", False, "no gate"),
            ("is_concatenated", False, "interleaved gate and up"),
            ("has_post_expert_norm", True, "a norm after each expert"),
        ],
    )
    def test_layout(self, flag, value, text):
        experts = make_experts(64, 32, 2)
        setattr(experts, flag, value)
        with pytest.raises(ValueError, match=f"{text}.*grouped_mm"):
            run_experts(experts)

    def test_dtype(self):
        with pytest.raises(ValueError, match=r"not in torch.float64.*grouped_mm"):
            run_experts(make_experts(64, 32, 2, torch.float64), torch.float64)

    def test_cpu_without_the_interpreter(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ImportError, match=r"need a CUDA device, and the tensors are on cpu.*grouped_mm"):
            run_experts(make_experts(64, 32, 2))

    def test_another_device(self):
        experts = make_experts(64, 32, 2).to("meta")
        args = [tensor.to("meta") for tensor in (torch.empty(7, 64), *random_routing(7, 2, 2))]
        with pytest.raises(ImportError, match="the tensors are on meta"):
            experts(*args)

    def test_no_source(self, monkeypatch):
        monkeypatch.setattr(megablocks, "_backend", None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"`stk` is not installed.*pip install stanford-stk.*grouped_mm"):
            run_experts(make_experts(64, 32, 2))
        monkeypatch.undo()
        assert megablocks_backend().source is not None  # a failure is not kept

    def test_offsets_beyond_32_bits(self, monkeypatch):
        monkeypatch.setattr(megablocks, "MIN_ROWS_PER_EXPERT", 0)
        monkeypatch.setattr(megablocks, "MAX_ELEMENTS", 128 * 128)
        with pytest.raises(RuntimeError, match=r"weights \(2, 128, 128\) need 32768.*grouped_mm"):
            run_experts(make_experts(64, 32, 2))


@pytest.fixture
def nothing_proven(monkeypatch):
    monkeypatch.setattr(megablocks, "_proven", {})


@pytest.mark.usefixtures("nothing_proven")
class TestDefault:
    """Where `"grouped_mm"` is block-sparse: asked for a device that need not be there, and run in the interpreter."""

    @pytest.mark.parametrize(
        "capability, dtype, autocast, expected",
        [
            ((9, 0), torch.bfloat16, None, False),
            ((10, 0), torch.bfloat16, None, False),
            ((9, 0), torch.bfloat16, torch.bfloat16, False),
            ((8, 0), torch.bfloat16, None, True),
            ((8, 9), torch.float16, None, True),
            ((12, 0), torch.bfloat16, None, True),
            ((9, 0), torch.float16, None, True),
            ((9, 0), torch.float32, torch.bfloat16, False),
            ((9, 0), torch.float32, torch.float16, True),
            ((9, 0), torch.float32, None, False),
            ((8, 0), torch.float64, None, False),
            ((7, 5), torch.float16, None, False),
        ],
    )
    def test_where_torch_has_no_grouped_kernel(self, monkeypatch, capability, dtype, autocast, expected):
        asked = []
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(megablocks, "_is_proven", lambda device, dtype: asked.append((device, dtype)) or True)
        weight = SimpleNamespace(device=torch.device("cuda", 3), dtype=dtype)
        with torch.autocast("cuda", autocast or torch.bfloat16, enabled=False):
            monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: autocast is not None)
            assert megablocks.is_preferred(weight) == expected
        assert asked == ([(torch.device("cuda", 3), autocast or dtype)] if expected else [])

    @requires_interpreter
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_kernels_are_proven_once_whatever_the_caller_does(self, monkeypatch, caplog, dtype, mode):
        before = torch.get_rng_state()
        with mode(), torch.autocast("cpu", torch.bfloat16):
            assert megablocks._is_proven(torch.device("cpu"), dtype)
        assert torch.equal(torch.get_rng_state(), before), "other random numbers than without a proof"
        monkeypatch.setattr(megablocks, "products_are_exact", None)
        assert megablocks._is_proven(torch.device("cpu"), dtype) and not caplog.records

    @requires_interpreter
    @pytest.mark.parametrize("fault", ["forward", "gradient", "error"])
    def test_wrong_kernels_step_aside_with_one_warning(self, monkeypatch, caplog, fault):
        kernels = megablocks_backend().kernels
        name = "sdd" if fault == "forward" else "dsd"
        correct = getattr(kernels, name)

        def launch(*args):
            if fault == "error":
                raise RuntimeError("PTX assembly aborted\nat line 7")
            correct(*args)
            args[-1 if name == "dsd" else 3].view(-1)[-1] += 1

        monkeypatch.setattr(kernels, name, launch)
        monkeypatch.setattr(megablocks.logger, "propagate", True)
        for _ in range(2):
            assert not megablocks._is_proven(torch.device("cpu"), torch.bfloat16)
        (record,) = caplog.records
        expected = "RuntimeError: PTX assembly aborted torch" if fault == "error" else "products are wrong"
        assert expected in record.getMessage() and "\n" not in record.getMessage()

    def test_kernels_that_are_not_installed_are_no_warning(self, monkeypatch, caplog):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(megablocks.logger, "propagate", True)
        assert not megablocks._is_proven(torch.device("cpu"), torch.bfloat16) and not caplog.records

    @requires_interpreter
    def test_a_model_computes_the_same_and_saves_nothing_of_it(self, monkeypatch, tmp_path):
        model = tiny_model(**MODEL).train()
        input_ids = random_ids(2, 6)
        expected = loss_and_gradients(model, input_ids)
        used = []

        def record(*args, compute=megablocks._block_sparse_experts):
            used.append(args)
            return compute(*args)

        monkeypatch.setattr(megablocks, "_block_sparse_experts", record)
        monkeypatch.setattr(experts_module, "_is_computed_here", lambda *args: False)
        assert_same_training_step(loss_and_gradients(model, input_ids), expected)
        assert not used, "block-sparse on the CPU"
        monkeypatch.setattr(experts_module, "prefers_megablocks", lambda weight: True)
        assert_same_training_step(loss_and_gradients(model, input_ids), expected)
        assert len(used) == MODEL["inner_iter"]
        model.save_pretrained(tmp_path)
        assert "experts_implementation" not in (tmp_path / "config.json").read_text()

        for chosen in ("torch_grouped_mm", "batched_mm", "eager"):  # obeyed
            used.clear()
            model.set_experts_implementation(chosen)
            assert_same_training_step(loss_and_gradients(model, input_ids), expected)
            assert not used, chosen

    @requires_interpreter
    def test_a_compiled_model_stays_one_graph(self, monkeypatch):
        monkeypatch.setattr(experts_module, "prefers_megablocks", lambda weight: True)
        experts = make_experts(64, 32, 3)
        experts.config._experts_implementation = "grouped_mm"
        args = (torch.randn(8, 64), *random_routing(8, 2, 3))
        torch.compiler.reset()
        with torch.no_grad():
            actual = torch.compile(experts, fullgraph=True, backend="eager")(*args)
            torch.testing.assert_close(actual, experts(*args))
        torch.compiler.reset()


def run_python(*command: str, path: str | Path = "", **environment: str) -> subprocess.CompletedProcess:
    """A process without the interpreter unless it is asked for; modules in `path` come first."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    inherited["PYTHONPATH"] = os.pathsep.join([str(path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error::RuntimeWarning", *command]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=300)


DOCTOR = ("-m", "modeling_coe.megablocks")


class TestDoctor:
    def test_importing_the_package_imports_no_kernels(self):
        names = ("stk", "megablocks", "kernels", "modeling_coe.megablocks")
        result = run_python("-c", f"import sys, modeling_coe; print([m for m in {names} if m in sys.modules])")
        assert result.stdout.strip() == "[]", result.stderr

    def test_beside_a_broken_megablocks(self, tmp_path):
        (tmp_path / "megablocks.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
        result = run_python(*DOCTOR, path=tmp_path, TRITON_INTERPRET="1")
        assert result.returncode == 0, result.stderr
        assert "source megablocks: no: OSError: libcudart.so.12: cannot open shared object file" in result.stdout
        assert f"source stanford-stk: in use, {version('stanford-stk')}" in result.stdout
        assert f"triton: {version('triton')}" in result.stdout
        assert "Triton: interpreter" in result.stdout or torch.cuda.is_available()
        assert "usable: yes, products checked" in result.stdout

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_without_a_gpu(self):
        result = run_python(*DOCTOR, COE_MEGABLOCKS_MIN_ROWS_PER_EXPERT="32")
        assert result.returncode == 1, result.stderr
        assert "rows per expert from which blocks are used: 32 " in result.stdout
        assert "usable: no. MegaBlocks' Triton kernels need a CUDA device" in result.stdout
        assert '"grouped_mm", "batched_mm", "eager"' in result.stdout


def test_products_on_a_gpu_are_in_fp32_unless_torch_allows_tf32(tmp_path):
    """Launched up to the compiled kernel, for a GPU that need not be there; both settings in turn in one process."""
    result = run_python(
        "-c",
        """if True:
        import torch, triton
        from types import SimpleNamespace
        from triton.backends.compiler import GPUTarget
        from modeling_coe.megablocks import _launch, _sort_into_bins, _topology

        triton.runtime.driver.set_active(SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        ))
        topology = _topology(_sort_into_bins(torch.zeros(1, 1, dtype=torch.long), 1), 1)
        x, values = torch.zeros(128, 128), torch.zeros(1, 128, 128)
        for precision in ("none", "tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = precision
            with _launch(values, x, x) as (kernels, *_):
                launch = dict(GROUP_M=128, ACC_TYPE=triton.language.float32, grid=(1,))
                strides = (128, 1, 128, 1, 128, 1)
                kernel = kernels._sdd_kernel.warmup(x, x, values, 128, 128, 128, *strides, *topology[1:3], **launch)
            kernel = kernel[0] if isinstance(kernel, list) else kernel
            print(precision, "tf32" in kernel.asm["ptx"])
        """,
        TRITON_CACHE_DIR=str(tmp_path),
    )
    assert result.stdout.splitlines() == ["none False", "tf32 True", "ieee False"], result.stderr


class TestSources:
    """With stand-ins for the packages, as modules that exist for one test."""

    @pytest.fixture(autouse=True)
    def install(self, monkeypatch, tmp_path):
        def install(name: str, **modules: str) -> None:
            (tmp_path / name).mkdir()
            for module, code in {"__init__": "", **modules}.items():
                (tmp_path / name / f"{module}.py").write_text(textwrap.dedent(code))

        before = set(sys.modules)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(megablocks, "_backend", None)
        yield install
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("megablocks", "kernels", "hub_build"):
                del sys.modules[name]

    @pytest.mark.parametrize(
        "modules, reason",
        [
            ({"__init__": "raise OSError('libcudart.so.12')"}, "OSError: libcudart.so.12"),
            ({"ops": "import megablocks_ops"}, "ModuleNotFoundError: No module named 'megablocks_ops'"),
            ({"ops": "1 +"}, "SyntaxError: invalid syntax"),
            ({}, "ModuleNotFoundError: No module named 'megablocks.ops'"),
        ],
    )
    def test_a_broken_megablocks_is_a_reason(self, install, modules, reason):
        install("megablocks", **modules)
        backend = megablocks_backend()
        assert backend.source == "stanford-stk" and backend.version == version("stanford-stk")
        assert backend.rejected["megablocks"].startswith(reason)
        assert "not installed" in backend.rejected["kernels-community/megablocks"]

    def test_megablocks_comes_first_and_stays(self, install, monkeypatch):
        install("megablocks", ops="")
        backend = megablocks_backend()
        assert backend.source == "megablocks"
        assert backend.rejected["stanford-stk"] == "not needed, megablocks comes first"
        monkeypatch.setattr(importlib.util, "find_spec", None)
        assert megablocks_backend() is backend

    @pytest.mark.parametrize("complete", [True, False])
    def test_kernels_community(self, install, monkeypatch, complete):
        """The library's module has a name of its own, under which its stk is found; it must have what is launched."""
        install("hub_build", stk="")
        code = """
            import hub_build

            def get_kernel(repo_id, *, version):
                assert (repo_id, version) == ("kernels-community/megablocks", 1)
                return hub_build
            """
        install("kernels", __init__=code)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        kernels = importlib.import_module("stk.backend.triton_kernels")
        if not complete:
            kernels = SimpleNamespace(sdd=kernels.sdd, dsd=kernels.dsd)
        for name in ("hub_build.stk", "hub_build.stk.backend", "hub_build.stk.backend.triton_kernels"):
            monkeypatch.setitem(sys.modules, name, kernels)
        backend = megablocks_backend()
        if complete:
            assert (backend.source, backend.version) == ("kernels-community/megablocks", "version 1")
        else:
            assert backend.source == "stanford-stk"
            assert backend.rejected["kernels-community/megablocks"] == "it lacks _sdd_kernel, _dsd_kernel"

    def test_kernels_community_needs_cuda(self, install, monkeypatch):
        install("kernels")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "need a CUDA device" in megablocks_backend().rejected["kernels-community/megablocks"]
