"""The experts on the CPU against a float64 loop over tokens and slots, and against transformers' own functions."""

import copy
import gc
import mmap
import pickle
import weakref
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM
from transformers.integrations import moe
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from modeling_coe import experts as experts_module
from modeling_coe import grouped_experts
from modeling_coe.experts import COE_EXPERTS_FUNCTIONS, sharing_weights
from modeling_coe.modeling_coe import CoeDecoderLayer, CoeExperts

from .helpers import TINY, enable_checkpointing, random_ids, requires_compiled_grouped_mm, tiny_config, tiny_model


GATED_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu", "mish", "linear")


class Call(NamedTuple):
    tokens: torch.Tensor
    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor


def make_experts(
    num_experts: int = 5, hidden_size: int = 12, width: int = 8, dtype=torch.float64, backend="grouped_mm", **overrides
) -> CoeExperts:
    config = tiny_config(
        n_routed_experts=num_experts,
        num_experts_per_tok=1,
        hidden_size=hidden_size,
        moe_intermediate_size=width,
        **overrides,
    )
    config._experts_implementation = backend
    experts = CoeExperts(config).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return experts


def make_call(experts, num_tokens: int, top_k: int = 2, *, sentinels: bool = False, dtype=None) -> Call:
    """Random tokens and routing, which may choose an expert twice; `sentinels` are another rank's experts."""
    dtype = dtype or experts.down_proj.dtype
    tokens = torch.randn(num_tokens, experts.hidden_dim).to(dtype)
    index = torch.randint(experts.num_experts + 3 * sentinels, (num_tokens, top_k))
    weights = torch.rand(num_tokens, top_k).to(torch.promote_types(dtype, torch.float32))
    weights[index >= experts.num_experts] = 0
    return Call(tokens.requires_grad_(), index, weights.requires_grad_())


def with_backend(experts: CoeExperts, backend: str) -> CoeExperts:
    """A copy of `experts` computed by another function."""
    experts = copy.deepcopy(experts)
    experts.config._experts_implementation = backend
    return experts


def loop(experts, gate_up_proj, down_proj):
    """A function like `experts`, one token and slot at a time."""

    def compute(tokens, top_k_index, top_k_weights):
        outputs = [tokens.sum(dim=0, keepdim=True)[:0]]
        for token, index, weights in zip(tokens, top_k_index.tolist(), top_k_weights, strict=True):
            output = torch.zeros_like(token)
            for expert, weight in zip(index, weights, strict=True):
                if expert < len(down_proj):
                    gate, up = (gate_up_proj[expert] @ token).chunk(2)
                    output = output + weight * (down_proj[expert] @ (experts.act_fn(gate) * up))
            outputs.append(output[None])
        return torch.cat(outputs)

    return compute


def in_a_row(compute, calls: list[Call]) -> torch.Tensor:
    """The outputs of all calls, each of which gets the output of the one before it added to its tokens."""
    outputs = []
    for tokens, top_k_index, top_k_weights in calls:
        outputs.append(compute(tokens + outputs[-1] if outputs else tokens, top_k_index, top_k_weights))
    return torch.stack(outputs)


def results(compute, calls: list[Call], parameters) -> list[torch.Tensor | None]:
    """Output and the gradients of a projection of it: parameters, tokens and routing weights of every call."""
    return [output := in_a_row(compute, calls), *gradients_of(output, calls, parameters)]


def gradients_of(output: torch.Tensor, calls: list[Call], parameters) -> list[torch.Tensor | None]:
    torch.manual_seed(1)
    projection = torch.randn(output.shape, dtype=torch.float64).to(output.dtype)
    inputs = [*parameters, *(tensor for call in calls for tensor in (call.tokens, call.top_k_weights))]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    # Nothing in the loop depends on the weights where no expert is chosen.
    gradients = iter(torch.autograd.grad((output * projection).sum(), wanted, materialize_grads=True))
    return [next(gradients) if tensor.requires_grad else None for tensor in inputs]


def shared_results(experts, calls: list[Call]) -> list[torch.Tensor | None]:
    def compute(*call):
        return experts(*call)

    with sharing_weights(experts):
        return results(compute, calls, experts.parameters())


def loop_results(experts, calls: list[Call]) -> list[torch.Tensor | None]:
    def double(tensor):
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    parameters = [double(parameter) for parameter in experts.parameters()]
    calls = [Call(double(tokens), index, double(weights)) for tokens, index, weights in calls]
    return results(loop(experts, *parameters), calls, parameters)


def assert_close(actual, expected, tolerance: float) -> None:
    """Every tensor within `tolerance` of the largest value of its counterpart (or of 1)."""
    assert len(actual) == len(expected)
    for position, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert (a is None) == (b is None), position
        if a is not None and b.numel():
            error = (a.double() - b.double()).abs().max().item() / max(b.abs().max().item(), 1.0)
            assert error <= tolerance, f"tensor {position}: {error:.1e}"  # also where it is NaN


def assert_computes(experts, calls: list[Call], tolerance: float = 1e-10) -> None:
    assert_close(shared_results(experts, calls), loop_results(experts, calls), tolerance)
    assert not experts.shared_weights and not experts.is_sharing_weights


@pytest.fixture
def only_upstream(monkeypatch):
    """Fails where this package computes the experts itself."""

    def refuse(*_):
        raise AssertionError("computed here")

    monkeypatch.setattr(experts_module.ExpertWeights, "__init__", refuse)


class TestAgainstTheLoop:
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(
        num_tokens=st.one_of(st.integers(0, 3), st.integers(4, 40)),
        num_experts=st.integers(1, 7),
        hidden_size=st.integers(1, 9).map(lambda n: 4 * n),
        width=st.integers(1, 17),
        top_k=st.integers(1, 4),
        num_calls=st.integers(1, 4),
        sentinels=st.booleans(),
        activation=st.sampled_from(GATED_ACTIVATIONS),
        seed=st.integers(0, 2**31),
    )
    def test_output_and_gradients(
        self,
        dtype,
        tolerance,
        num_tokens,
        num_experts,
        hidden_size,
        width,
        top_k,
        num_calls,
        sentinels,
        activation,
        seed,
    ):
        torch.manual_seed(seed)
        experts = make_experts(num_experts, hidden_size, width, dtype, hidden_act=activation)
        with torch.no_grad():
            for parameter in experts.parameters():  # keeps a chain of any width near 1
                parameter.mul_(2 / parameter.shape[-1] ** 0.5)
        calls = [make_call(experts, num_tokens, top_k, sentinels=sentinels) for _ in range(num_calls)]
        assert_computes(experts, calls, tolerance)
        separate = results(experts, calls, experts.parameters())
        assert_close(separate, loop_results(experts, calls), tolerance)

    @pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
    def test_activations(self, activation):
        """Among them the identity, whose input is its output."""
        experts = make_experts(hidden_act=activation)
        assert_computes(experts, [make_call(experts, 9) for _ in range(2)])

    @pytest.mark.parametrize("num_tokens", [0, 1, 2, 40])
    def test_all_tokens_on_one_expert(self, num_tokens):
        experts = make_experts()
        calls = [make_call(experts, num_tokens, 1) for _ in range(3)]
        for call in calls:
            call.top_k_index.fill_(3)
        assert_computes(experts, calls)
        for gradient in shared_results(experts, calls)[1:3]:
            assert torch.equal(gradient[[0, 1, 2, 4]], torch.zeros_like(gradient[[0, 1, 2, 4]]))

    @pytest.mark.parametrize("num_tokens", [1, 6])
    @pytest.mark.parametrize("slots", [[0], [2], [0, 1, 2]], ids=["first", "last", "all"])
    def test_experts_of_another_rank(self, num_tokens, slots):
        """They add nothing and get no gradient, whatever lies at their places."""
        experts = make_experts()
        calls = [make_call(experts, num_tokens, 3) for _ in range(2)]
        for call in calls:
            call.top_k_index[:, slots] = torch.randint(5, 9, (num_tokens, len(slots)))
            call.top_k_weights.data[:, slots] = 0
        assert_computes(experts, calls)
        for call in calls:
            call.top_k_weights.data[:, slots] = torch.nan
        actual = shared_results(experts, calls)
        assert all(tensor.isfinite().all() for tensor in actual)
        for gradient in actual[4::2]:
            assert not gradient[:, slots].any()
        with torch.no_grad():
            assert_close([experts(*calls[0])], actual[0][:1], 1e-12)

    @pytest.mark.parametrize("num_tokens", [1, 2, 40])
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.bfloat16, 2e-2)])
    def test_every_token_uses_every_expert(self, monkeypatch, num_tokens, dtype, tolerance):
        taken = []
        compute = grouped_experts._all_experts
        monkeypatch.setattr(grouped_experts, "_all_experts", lambda *args: taken.append(1) or compute(*args))
        experts = make_experts(dtype=dtype)
        tokens, _, weights = make_call(experts, num_tokens, top_k=5)
        order = torch.stack([torch.randperm(5) for _ in range(num_tokens)])
        # A choice of another rank, and one that is made twice, leave an expert out, which must not be read.
        for change, index, is_taken in (
            (None, order, True),
            (4, order.masked_fill(order == 4, 5), False),
            (4, order.masked_fill(order == 4, 0), False),
        ):
            weights = weights.masked_fill(index > 4, 0)
            gate_up_proj, down_proj = (parameter.detach().double() for parameter in experts.parameters())
            expected = loop(experts, gate_up_proj, down_proj)(tokens.double(), index, weights.double())
            if change is not None:
                experts.down_proj.data[change] = float("nan")
            taken.clear()
            with torch.no_grad():
                actual = experts(tokens, index, weights)
                with torch.autocast("cpu", torch.bfloat16):
                    assert_close([experts(tokens, index, weights)], [actual], tolerance)
            assert actual.dtype == dtype and bool(taken) is is_taken
            assert_close([actual.double()], [expected], tolerance)
            experts.down_proj.data[4] = 0.1

    def test_strided_inputs(self):
        experts = make_experts()
        plain = make_call(experts, 6, 2)
        strided = Call(
            plain.tokens.detach().t().contiguous().t().requires_grad_(),
            plain.top_k_index.t().contiguous().t(),
            plain.top_k_weights.detach().repeat_interleave(2, dim=1)[:, ::2].requires_grad_(),
        )
        assert not any(tensor.is_contiguous() for tensor in strided)
        assert_computes(experts, [strided, plain])
        repeated = Call(plain.tokens[:1].expand(6, -1), plain.top_k_index[:1].expand(6, -1), plain.top_k_weights)
        torch.testing.assert_close(experts(*repeated), loop(experts, *experts.parameters())(*repeated))
        with torch.no_grad():
            torch.testing.assert_close(experts(*(t[:1] for t in strided)), experts(*(t[:1] for t in plain)))

    def test_calls_of_different_lengths(self):
        experts = make_experts()
        calls = [make_call(experts, num_tokens) for num_tokens in (2, 5, 3)]
        expected = torch.autograd.grad(
            sum(loop(experts, *experts.parameters())(*call).sum() for call in calls), experts.parameters()
        )
        with sharing_weights(experts):
            output = sum(experts(*call).sum() for call in calls)
        assert_close(torch.autograd.grad(output, experts.parameters()), expected, 1e-10)

    @pytest.mark.parametrize("num_tokens", [11, 70])  # joins the calls' rows, adds the calls' products
    @pytest.mark.parametrize("cached_bytes", [0, 300, 900])
    def test_experts_in_blocks(self, monkeypatch, cached_bytes, num_tokens):
        """Forward, backward and the gradients of the weights, as many experts as the caches and the memory have room
        for at a time: the result does not depend on it."""
        experts = make_experts(7)
        calls = [make_call(experts, num_tokens, sentinels=True) for _ in range(3)]
        whole = shared_results(experts, calls)
        monkeypatch.setattr(grouped_experts, "_CACHED_BYTES", cached_bytes)
        monkeypatch.setattr(grouped_experts, "LARGE_BYTES", 0)
        blocks = list(grouped_experts._blocks(torch.tensor([4, 0, 0, 1, 3, 2, 0]), 128))
        assert len(blocks) == {0: 4, 300: 4, 900: 2}[cached_bytes]
        assert_computes(experts, calls)
        assert_close(shared_results(experts, calls), whole, 1e-12)
        with torch.no_grad():
            assert_close([experts(*calls[0])], whole[0][:1], 1e-12)

    @pytest.mark.parametrize("num_tokens", [1, 3])
    @pytest.mark.parametrize("grad", [False, True])
    def test_experts_not_chosen_are_not_read(self, num_tokens, grad):
        experts = make_experts(8)
        call = make_call(experts, num_tokens, 4)
        call.top_k_index.copy_(torch.tensor([1, 6, 9, 4]))
        call.top_k_weights.data[:, 2] = 0
        expected = loop_results(experts, [call])
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter[[0, 2, 3, 5, 7]] = torch.nan
        if grad:
            assert_close(shared_results(experts, [call]), expected, 1e-10)
        with torch.no_grad():
            assert_close([experts(*call)], expected[0], 1e-10)


class TestAgainstTransformers:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        num_tokens=st.integers(2, 40),
        num_experts=st.integers(1, 9),
        top_k=st.integers(1, 8),
        width=st.integers(1, 12).map(lambda n: 4 * n),
        seed=st.integers(0, 2**31),
    )
    def test_float32_output(self, num_tokens, num_experts, top_k, width, seed):
        torch.manual_seed(seed)
        experts = make_experts(num_experts, 32, width, torch.float32)
        call = make_call(experts, num_tokens, top_k)
        with torch.no_grad():
            assert_close([experts(*call)], [with_backend(experts, "torch_grouped_mm")(*call)], 1e-5)

    @pytest.mark.parametrize("backend", ["eager", "batched_mm", "torch_grouped_mm"])
    def test_gradients(self, backend):
        experts = make_experts(dtype=torch.float32)
        calls = [make_call(experts, 17) for _ in range(3)]
        other = with_backend(experts, backend)
        assert_close(shared_results(experts, calls), results(other, calls, other.parameters()), 1e-5)

    def test_two_runs_are_bit_equal(self):
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            experts = make_experts(dtype=torch.float32)
            runs.append(shared_results(experts, [make_call(experts, 33, 3) for _ in range(3)]))
        assert all(map(torch.equal, *runs))

    def test_names(self):
        assert COE_EXPERTS_FUNCTIONS["grouped_mm"] is experts_module.grouped_mm_experts_forward
        assert COE_EXPERTS_FUNCTIONS["torch_grouped_mm"] is moe.grouped_mm_experts_forward
        assert COE_EXPERTS_FUNCTIONS["batched_mm"] is moe.batched_mm_experts_forward
        assert ALL_EXPERTS_FUNCTIONS["grouped_mm"] is moe.grouped_mm_experts_forward

    def test_other_models_keep_their_function(self, only_upstream):
        options = {**TINY, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 0}
        model = DeepseekV2ForCausalLM(DeepseekV2Config(**options))
        model.set_experts_implementation("grouped_mm")
        model(random_ids(1, 5)).logits.sum().backward()
        chain = tiny_model()
        chain.set_experts_implementation("torch_grouped_mm")
        chain(random_ids(1, 5)).logits.sum().backward()
        chain.set_experts_implementation("grouped_mm")
        with pytest.raises(AssertionError, match="computed here"):
            chain(random_ids(1, 5))


class TestDtypes:
    @pytest.mark.parametrize("num_tokens", [1, 30])
    @pytest.mark.parametrize("token_dtype", [None, torch.float32], ids=["tokens alike", "float32 tokens"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype, token_dtype, num_tokens):
        experts = make_experts(6, 32, 24, dtype)
        call = make_call(experts, num_tokens, 4, dtype=token_dtype)
        actual, expected = shared_results(experts, [call]), loop_results(experts, [call])
        with torch.no_grad():
            actual.append(experts(*call))
        tensors = [call.tokens, *experts.parameters(), call.tokens, call.top_k_weights, call.tokens]
        for a, b, like in zip(actual, [*expected, expected[0]], tensors, strict=True):
            assert a.dtype == like.dtype
            assert (a - b).norm() <= 2 * torch.finfo(dtype).eps * b.norm()

    @pytest.mark.parametrize("token_dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("num_tokens", [1, 12])
    @pytest.mark.parametrize("backward", ["inside", "outside"])
    def test_autocast(self, monkeypatch, backward, num_tokens, dtype, token_dtype):
        """As linear modules do, experts compute in autocast's dtype, and gradients have that of the weights. Without
        gradients a few tokens are computed in the weights' dtype, which is cheaper than a copy of all weights."""
        experts = make_experts(6, 32, 24, dtype)
        calls = [make_call(experts, num_tokens, 4, dtype=token_dtype) for _ in range(2)]
        computed_in, casts = [], []
        compute, cast = grouped_experts.compute_experts, grouped_experts.Projection.to

        def record(tokens, *args):
            computed_in.append(tokens.dtype)
            return compute(tokens, *args)

        monkeypatch.setattr(experts_module, "compute_experts", record)
        monkeypatch.setattr(grouped_experts.Projection, "to", lambda *args: casts.append(1) or cast(*args))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with sharing_weights(experts):
                output = in_a_row(experts, calls)
            with torch.no_grad(), sharing_weights(experts):
                without_gradient = in_a_row(experts, calls)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward == "inside"):
            gradients = gradients_of(output, calls, experts.parameters())
        assert computed_in == [torch.bfloat16] * 2 + [torch.bfloat16 if num_tokens == 12 else dtype] * 2
        # Two projections, cast once for both calls.
        assert len(casts) == (0 if dtype == torch.bfloat16 else 2 if num_tokens == 1 else 4)
        assert [gradient.dtype for gradient in gradients[:3]] == [dtype, dtype, token_dtype]
        expected = loop_results(experts, calls)
        assert_close([output, *gradients, without_gradient], [*expected, expected[0]], 2**-5)

    @pytest.mark.parametrize("num_tokens", [1, 12])
    @pytest.mark.parametrize("widths", [(32, 24), (32, 11), (21, 16), (22, 12)], ids=str)
    def test_autocast_where_others_compute(self, monkeypatch, widths, num_tokens):
        """transformers' grouped products, as on a GPU, have autocast's dtype too, and rows of 16 bytes. All calls have
        one copy of the weights."""
        experts = make_experts(6, *widths, torch.float32)
        calls = [make_call(experts, num_tokens, 4, dtype=torch.float32) for _ in range(2)]
        multiplied, product = [], torch.nn.functional.grouped_mm

        def record(rows, matrices, **options):
            multiplied.append((rows.dtype, matrices.dtype, matrices.data_ptr()))
            return product(rows, matrices, **options)

        monkeypatch.setattr(torch.nn.functional, "grouped_mm", record)
        monkeypatch.setattr(experts_module, "_is_computed_here", lambda *args: False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with sharing_weights(experts):
                output = in_a_row(experts, calls)
            gradients = gradients_of(output, calls, experts.parameters())
            with torch.no_grad(), sharing_weights(experts):
                without_gradient = in_a_row(experts, calls)
        assert not experts.shared_weights
        dtypes = [torch.bfloat16] * 4 + [torch.bfloat16 if num_tokens == 12 else torch.float32] * 4
        assert [each[:2] for each in multiplied] == [(dtype, dtype) for dtype in dtypes]
        for gate_up, down, gate_up_again, down_again in (multiplied[:4], multiplied[4:]):
            assert (gate_up, down) == (gate_up_again, down_again)
        assert {each.dtype for each in (output, *gradients)} == {torch.float32}
        expected = loop_results(experts, calls)
        # Of two calls in a row, some gradients are rounded much.
        assert_close([output, *gradients, without_gradient], [*expected, expected[0]], 2**-3)

    @pytest.mark.parametrize("is_here", [True, False])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_a_call_without_gradient_before_one_with(self, is_here, dtype, monkeypatch):
        """As of a reentrant checkpoint around one iteration: its cast or padded copy would give no gradients."""
        experts = make_experts(6, 32, 11, torch.float32)
        call = make_call(experts, 12, 4, dtype=torch.float32)
        if not is_here:
            monkeypatch.setattr(experts_module, "_is_computed_here", lambda *args: False)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16), sharing_weights(experts):
            with torch.no_grad():
                without_gradient = experts(*call)
            output = experts(*call)
            gradients = gradients_of(output, [call], experts.parameters())
        expected = loop_results(experts, [call])
        tolerance = 2**-4 if dtype == torch.bfloat16 else 1e-5
        assert_close([output, *gradients, without_gradient], [*expected, expected[0]], tolerance)

    @pytest.mark.parametrize("widths", [(32, 24), (21, 11)], ids=str)
    def test_autocast_where_it_is_compiled(self, widths):
        experts = make_experts(6, *widths, torch.float32)
        call = make_call(experts, 12, 4, dtype=torch.float32)
        torch.compiler.reset()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = torch.compile(in_a_row, backend="aot_eager", fullgraph=True)(experts, [call])
            gradients = gradients_of(output, [call], experts.parameters())
        assert {each.dtype for each in (output, *gradients)} == {torch.float32}
        assert_close([output, *gradients], loop_results(experts, [call]), 2**-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("hidden_size, width", [(32, 24), (32, 11), (21, 16), (22, 13)])
    def test_any_width_where_others_compute(self, monkeypatch, hidden_size, width, dtype):
        monkeypatch.setattr(experts_module, "_is_computed_here", lambda *args: False)
        experts = make_experts(6, hidden_size, width, dtype)
        calls = [make_call(experts, 12, 4) for _ in range(2)]
        assert_close(shared_results(experts, calls), loop_results(experts, calls), 16 * torch.finfo(dtype).eps)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
    def test_a_device_without_autocast(self, mode):
        experts = make_experts(6, 32, 24, torch.bfloat16)
        call = make_call(experts, 12)
        experts, call = experts.to("meta"), [each.to("meta") for each in call]
        with mode(), sharing_weights(experts):
            assert in_a_row(experts, [call]).shape == (1, 12, 32)

    def test_autocast_leaves_float64(self):
        experts = make_experts()
        call = make_call(experts, 12)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_computes(experts, [call])


class TestSharing:
    """The calls of one layer compute their weights' gradients together."""

    @pytest.fixture
    def experts(self):
        return make_experts()

    @pytest.fixture
    def calls(self, experts):
        return [make_call(experts, 7) for _ in range(3)]

    @pytest.fixture
    def expected(self, experts, calls):
        return loop_results(experts, calls)[1:3]

    @staticmethod
    def loss(experts, calls):
        with sharing_weights(experts):
            output = in_a_row(experts, calls)
        torch.manual_seed(1)
        return (output * torch.randn(output.shape, dtype=torch.float64)).sum()

    @staticmethod
    def gradients(experts):
        return [parameter.grad for parameter in experts.parameters()]

    @pytest.mark.parametrize("shared, expected", [(True, 1), (False, 3)])
    def test_weights_are_reached_once(self, experts, calls, shared, expected):
        output = self.loss(experts, calls) if shared else in_a_row(experts, calls)
        nodes, todo = set(), [output.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                todo += [following for following, _ in node.next_functions]
        assert (
            sum(
                "AccumulateGrad" in [after.name().rsplit("::")[-1] for after, _ in node.next_functions if after]
                and "Weight" in node.name()
                for node in nodes
            )
            == expected
        )

    def test_two_passes_accumulate(self, experts, calls, expected):
        other = [make_call(experts, 4) for _ in range(2)]
        expected = [a + b for a, b in zip(expected, loop_results(experts, other)[1:3], strict=True)]
        self.loss(experts, calls).backward()
        self.loss(experts, other).backward()
        assert_close(self.gradients(experts), expected, 1e-10)

    def test_graphs_side_by_side(self, experts, calls, expected):
        """Two forward passes before any backward, then both at once."""
        first, second = self.loss(experts, calls), self.loss(experts, calls)
        second.backward()
        first.backward()
        (self.loss(experts, calls) + self.loss(experts, calls)).backward()
        assert_close(self.gradients(experts), [4 * tensor for tensor in expected], 1e-10)

    def test_backward_twice_doubles(self, experts, calls, expected):
        loss = self.loss(experts, calls)
        loss.backward(retain_graph=True)
        once = [gradient.clone() for gradient in self.gradients(experts)]
        assert_close(once, expected, 1e-10)
        loss.backward()
        assert all(torch.equal(2 * a, b) for a, b in zip(once, self.gradients(experts), strict=True))

    def test_gradient_of_an_activation_first(self, experts, calls):
        """A pass that ends before it reaches the weights leaves nothing for the next one to count again."""
        with sharing_weights(experts):
            first = experts(*calls[0])
            second = experts(first, *calls[1][1:])
        expected = loop_results(experts, [calls[0]])
        for _ in range(2):
            torch.autograd.grad(second.sum(), first, retain_graph=True)
        torch.manual_seed(1)
        projection = torch.randn(1, *first.shape, dtype=torch.float64)
        gradients = torch.autograd.grad((first * projection).sum(), experts.parameters(), retain_graph=True)
        assert_close(gradients, expected[1:3], 1e-10)
        compute = loop(experts, *experts.parameters())
        expected = torch.autograd.grad(compute(compute(*calls[0]), *calls[1][1:]).sum(), experts.parameters())
        second.sum().backward()
        assert_close(self.gradients(experts), expected, 1e-10)

    def test_gradient_of_one_weight_only(self, experts, calls, expected):
        loss = self.loss(experts, calls)
        for parameter, wanted in zip(experts.parameters(), expected, strict=True):
            assert_close(torch.autograd.grad(loss, parameter, retain_graph=True), [wanted], 1e-10)
        loss.backward(inputs=[experts.down_proj])
        assert experts.gate_up_proj.grad is None
        assert_close([experts.down_proj.grad], expected[1:], 1e-10)

    @pytest.mark.parametrize("frozen", [["gate_up_proj"], ["down_proj"], ["gate_up_proj", "down_proj"]], ids=str)
    def test_frozen_weights(self, experts, calls, frozen, monkeypatch):
        for name in frozen:
            getattr(experts, name).requires_grad_(False)
        assert_computes(experts, calls)
        if len(frozen) == 2:
            monkeypatch.setattr(grouped_experts._PendingGradients, "add", None)
            shared_results(experts, calls)

    @pytest.mark.parametrize("fixed", [["tokens"], ["top_k_weights"], ["tokens", "top_k_weights"]], ids=str)
    def test_inputs_without_gradient(self, experts, calls, fixed):
        for name in fixed:
            getattr(calls[0], name).requires_grad_(False)
        assert_computes(experts, calls)

    def test_a_call_without_gradient_first(self, experts, calls):
        """A reentrant checkpoint around one iteration, or another thread, calls the experts without gradient."""
        expected = loop_results(experts, calls[:1])[1:3]
        with sharing_weights(experts):
            with torch.no_grad():
                experts(*calls[1])
            output = experts(*calls[0])
        torch.manual_seed(1)
        (output * torch.randn(1, *output.shape, dtype=torch.float64)).sum().backward()
        assert_close(self.gradients(experts), expected, 1e-10)

    def test_nothing_is_shared_without_gradient(self, experts, calls):
        with torch.no_grad(), sharing_weights(experts):
            experts(*calls[0])
            assert not experts.is_sharing_weights and not experts.shared_weights

    def test_gradient_of_a_gradient_is_right_or_refused(self):
        experts = make_experts(dtype=torch.float32)
        call = make_call(experts, 3)
        gradients = []
        for backend in ("eager", "grouped_mm"):
            module = with_backend(experts, backend)
            output = module(*call).sum() + call.tokens.square().sum()
            try:
                gradient = torch.autograd.grad(output, call.tokens, create_graph=True)[0]
                gradients += torch.autograd.grad(gradient.square().sum(), call.tokens)
            except RuntimeError:
                assert backend == "grouped_mm"
                return
        torch.testing.assert_close(*gradients)

    @pytest.mark.parametrize("ends", ["in backward", "without backward", "in a partial backward"])
    def test_weights_are_released_with_the_graph(self, experts, calls, ends):
        """Weights may be temporaries, merged with an adapter's for one forward pass: no cycle may hold them."""
        merged = {name: parameter * 1 for name, parameter in experts.named_parameters()}
        alive = [weakref.ref(tensor) for tensor in merged.values()]
        gc.collect()
        gc.disable()
        try:
            with sharing_weights(experts):
                output = torch.func.functional_call(experts, merged, tuple(calls[0]))
            if ends == "in backward":
                output.sum().backward()
            elif ends == "in a partial backward":
                torch.autograd.grad(output.sum(), calls[0].tokens)
            del merged, output
            assert [reference() for reference in alive] == [None, None]
        finally:
            gc.enable()

    @pytest.mark.parametrize("tokens", [1, 5])
    @pytest.mark.parametrize("grad", [False, True])
    def test_edited_weights_are_seen(self, experts, tokens, grad):
        call = make_call(experts, tokens)

        def check():
            expected = loop(experts, *experts.parameters())(*call)
            with torch.set_grad_enabled(grad), sharing_weights(experts):
                torch.testing.assert_close(experts(*call), expected)

        check()
        with torch.no_grad():
            experts.down_proj.mul_(3)
        check()
        experts.gate_up_proj.data = experts.gate_up_proj.data.flip(0)
        check()
        experts.down_proj.data[:] = experts.down_proj.data.flip(0)
        check()
        experts.load_state_dict(make_experts().state_dict())
        check()
        experts.gate_up_proj = torch.nn.Parameter(torch.randn_like(experts.gate_up_proj))
        check()

    def test_copies_after_a_training_step(self, experts, calls, expected):
        self.loss(experts, calls).backward()
        for twin in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
            twin.zero_grad()
            self.loss(twin, calls).backward()
            assert_close(self.gradients(twin), expected, 1e-10)
        assert_close(self.gradients(experts), expected, 1e-10)


class TestLayer:
    @pytest.fixture
    def layer(self):
        config = tiny_config(inner_iter=3)
        config._experts_implementation = "grouped_mm"
        layer = CoeDecoderLayer(config, 0).double()
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return layer

    @staticmethod
    def gradients(layer, compute) -> list[torch.Tensor]:
        torch.manual_seed(2)
        hidden_states = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
        layer.zero_grad()
        compute(hidden_states).square().sum().backward()
        return [hidden_states.grad, *(parameter.grad for parameter in layer.mlp.parameters())]

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpoint_around_the_chain(self, layer, use_reentrant):
        expected = self.gradients(layer, layer.chain)
        actual = self.gradients(layer, lambda h: checkpoint(layer.chain, h, use_reentrant=use_reentrant))
        assert_close(actual, expected, 1e-12)

    @pytest.mark.parametrize("iterations", [[0], [1], [0, 1, 2]], ids=str)
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpoint_around_iterations(self, layer, use_reentrant, iterations):
        expected = self.gradients(layer, layer.chain)
        forward = layer.mlp.forward

        def checkpointed(hidden_states, iteration, *used_experts):
            if iteration in iterations:
                return checkpoint(forward, hidden_states, iteration, *used_experts, use_reentrant=use_reentrant)
            return forward(hidden_states, iteration, *used_experts)

        layer.mlp.forward = checkpointed
        assert_close(self.gradients(layer, layer.chain), expected, 1e-12)

    def test_an_error_inside_the_chain_leaves_nothing_shared(self, layer):
        expected = self.gradients(layer, layer.chain)
        with pytest.raises(IndexError):
            layer.num_iterations = 4  # one more than there are routers
            layer.chain(torch.randn(2, 5, 32, dtype=torch.float64))
        assert not layer.mlp.experts.shared_weights and not layer.mlp.experts.is_sharing_weights
        layer.num_iterations = 3
        assert all(map(torch.equal, self.gradients(layer, layer.chain), expected))


@pytest.mark.parametrize("aux_loss_alpha", [0.0, 0.1])
def test_gradient_checkpointing_of_the_model(aux_loss_alpha):
    model = tiny_model(inner_iter=3, aux_loss_alpha=aux_loss_alpha).train()
    input_ids = random_ids(2, 9)
    gradients = []
    for enabled in (False, True):
        if enabled:
            enable_checkpointing(model, {"use_reentrant": False})
        model.zero_grad()
        model(input_ids, labels=input_ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert_close(*reversed(gradients), 1e-6)


class TestStepsAside:
    @pytest.mark.parametrize(
        "backend, grad", [("eager", False), pytest.param("aot_eager", True, marks=requires_compiled_grouped_mm)]
    )
    def test_compiled(self, only_upstream, backend, grad):
        torch.compiler.reset()
        experts = with_backend(make_experts(dtype=torch.float32), "grouped_mm")
        compiled = torch.compile(experts, fullgraph=True, backend=backend)
        other = with_backend(experts, "torch_grouped_mm")
        for num_tokens in (1, 6):
            calls = [make_call(experts, num_tokens)]
            if grad:
                actual = results(compiled, calls, experts.parameters())
                assert_close(actual, results(other, calls, other.parameters()), 1e-5)
            with torch.no_grad():
                torch.testing.assert_close(compiled(*calls[0]), other(*calls[0]))

    def test_compiled_chain(self, only_upstream):
        torch.compiler.reset()
        model = tiny_model(inner_iter=2, num_hidden_layers=1).train()
        input_ids = random_ids(1, 6)
        loss = torch.compile(model, fullgraph=True, backend="eager")(input_ids, labels=input_ids).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.model.layers[0].mlp.parameters())

    @pytest.mark.parametrize("kind", ["subclass", "strided"])
    def test_weights_of_another_kind(self, only_upstream, kind):
        class Subclass(torch.Tensor):
            pass

        experts = make_experts(dtype=torch.float32)
        call = make_call(experts, 6)
        expected = loop_results(experts, [call])
        weight = experts.down_proj.detach()
        weight = weight.as_subclass(Subclass) if kind == "subclass" else weight.mT.contiguous().mT
        experts.down_proj = torch.nn.Parameter(weight)
        assert_close(shared_results(experts, [call]), expected, 1e-5)
        with torch.no_grad():
            assert_close([experts(*(tensor[:1] for tensor in call))], expected[0][:, :1], 1e-5)

    def test_activation_with_parameters(self, only_upstream):
        experts = make_experts(dtype=torch.float32)
        experts.act_fn = torch.nn.PReLU()
        call = make_call(experts, 6)
        with sharing_weights(experts):
            experts(*call).sum().backward()
        actual, experts.act_fn.weight.grad = experts.act_fn.weight.grad, None
        loop(experts, experts.gate_up_proj, experts.down_proj)(*call).sum().backward()
        torch.testing.assert_close(actual, experts.act_fn.weight.grad)

    @pytest.mark.parametrize("reason", ["FSDP", "ZeRO-3"])
    def test_weights_that_come_and_go(self, reason, monkeypatch):
        experts = make_experts()
        calls = [make_call(experts, 6) for _ in range(2)]
        expected = loop_results(experts, calls)
        if reason == "FSDP":
            experts.__class__ = type("FSDPCoeExperts", (FSDPModule, CoeExperts), {})
        else:
            monkeypatch.setattr(experts_module, "is_deepspeed_zero3_enabled", lambda: True)
        with sharing_weights(experts):
            assert not experts.is_sharing_weights
            assert_close(results(experts, calls, experts.parameters()), expected, 1e-10)
            assert not experts.shared_weights

    def test_lora_on_the_fused_weights(self):
        peft = pytest.importorskip("peft")
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        input_ids = random_ids(2, 9)
        outcomes = []
        for backend in ("grouped_mm", "torch_grouped_mm"):
            model = tiny_model(inner_iter=3).train()
            model.set_experts_implementation(backend)
            config = peft.LoraConfig(target_modules=[], target_parameters=parameters, r=3, init_lora_weights=False)
            torch.manual_seed(4)
            model = peft.get_peft_model(model, config)
            output = model(input_ids, labels=input_ids, use_cache=False)
            output.loss.backward()
            trained = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
            outcomes.append([output.logits, *trained])
        assert len(trained) == 8 and all(gradient.any() for gradient in trained)
        assert_close(*outcomes, 1e-5)


class TestLargeGradients:
    def test_as_gradients(self):
        """What training does with `.grad`, against a gradient in torch's own memory."""
        experts = make_experts(2, 2**11, 2**10, torch.float32)
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        weight, call = experts.gate_up_proj, make_call(experts, 3)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            assert weight.nbytes >= 2**25
        optimizer = torch.optim.SGD([weight], lr=0.5)
        other = with_backend(experts, "eager")
        (wanted,) = torch.autograd.grad(other(*call).square().sum(), other.gate_up_proj)
        before = weight.detach().clone()
        for set_to_none in (True, False):
            optimizer.zero_grad(set_to_none=set_to_none)
            assert weight.grad is None or not weight.grad.any()
            for times in (1, 2):
                experts(*call).square().sum().backward()
                torch.testing.assert_close(weight.grad, times * wanted, atol=1e-4, rtol=1e-4)
        weight.grad.detach_()
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        torch.testing.assert_close(weight.grad, wanted / wanted.norm(), atol=1e-6, rtol=1e-3)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), before - 0.5 * wanted / wanted.norm(), atol=1e-6, rtol=1e-4)
        optimizer.zero_grad()
        gc.collect()
        assert weight.isfinite().all()


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] = self.counts.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN in this build of torch")
class TestOneDnn:
    @pytest.fixture(autouse=True)
    def onednn(self, monkeypatch):
        monkeypatch.setenv("COE_CPU_KERNEL", "onednn")

    @pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 31, 33, 100])
    @pytest.mark.parametrize("hidden_size, width", [(12, 5), (16, 16), (36, 17)])
    @pytest.mark.parametrize("num_experts", [1, 3])
    def test_output_and_gradients(self, num_experts, hidden_size, width, num_tokens):
        experts = make_experts(num_experts, hidden_size, width, torch.float32)
        calls = [make_call(experts, num_tokens, 2, sentinels=num_experts > 1) for _ in range(2)]
        assert_computes(experts, calls, 2e-5)

    def test_is_used(self):
        experts = make_experts(1, 32, 16, torch.float32)
        with Operators() as operators:
            shared_results(experts, [make_call(experts, 20, 1)])
        assert operators.counts["mkldnn._linear_pointwise.default"] == 6
        assert not any(name.startswith("aten.mm") for name in operators.counts)

    def test_not_for_other_dtypes(self):
        for dtype in (torch.bfloat16, torch.float64):
            experts = make_experts(1, 32, 16, dtype)
            with Operators() as operators:
                shared_results(experts, [make_call(experts, 20, 1)])
            assert "mkldnn._linear_pointwise.default" not in operators.counts

    def test_autocast_does_not_lower_it(self):
        """Its products are of float32, in the backward of a pass without autocast, say."""
        experts = make_experts(1, 32, 16, torch.float32)
        call = make_call(experts, 20, 1)
        output = in_a_row(experts, [call])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = [output, *gradients_of(output, [call], experts.parameters())]
        assert_close(actual, loop_results(experts, [call]), 1e-5)
