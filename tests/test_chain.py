"""The chain of one layer against the naive float64 loop, and the whole model against transformers' DeepSeek models."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from configuration_coe import RESIDUAL_RULES
from modeling_coe import CoeForCausalLM
from modeling_coe.modeling_coe import CoeDecoderLayer, CoeRouter

from . import naive
from .helpers import (
    EXPERTS_BACKENDS,
    TINY,
    assert_equal_up_to_rounding,
    random_ids,
    tiny_config,
    tiny_model,
)


ROUTERS = {
    "greedy": {},
    "greedy, normalised and scaled": {"norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "greedy, scaled": {"routed_scaling_factor": 2.5},
    "group limited": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "sigmoid": {"scoring_func": "sigmoid", "routed_scaling_factor": 1.5},
    "selection bias": {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
}


# Options that stabilise a chain, each alone and all together.
STABILISERS = {
    "iteration_norm": {"iteration_norm": True},
    "branch_norm": {"branch_norm": True},
    "residual_scale": {"residual_scale": 1.7},
    "reinject": {"reinject": 0.8},
}
STABILISERS["all"] = {name: value for option in STABILISERS.values() for name, value in option.items()}


def make_layer(config, seed: int, dtype: torch.dtype) -> CoeDecoderLayer:
    torch.manual_seed(seed)
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    layer = CoeDecoderLayer(config, layer_idx=0)
    if dtype == torch.float64:  # transformers' norm rounds to float32
        norm = type(layer.input_layernorm)
        for name in [name for name, module in layer.named_modules() if type(module) is norm]:
            layer.set_submodule(name, torch.nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps))
    layer = layer.to(dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
        for buffer in layer.buffers():
            torch.nn.init.normal_(buffer, std=0.1)
    return layer


def compare_with_naive(layer, config, hidden_states, backend: str, tolerance: float) -> None:
    """Forward and all gradients of a random projection of the output."""
    config._experts_implementation = backend
    hidden_states.requires_grad_()
    projection = torch.randn_like(hidden_states)
    output = layer.chain(hidden_states[None])[0]
    parameters = {n: p for n, p in layer.named_parameters() if not n.startswith(("self_attn", "input_layernorm"))}
    tensors = [hidden_states, *parameters.values()]
    gradients = torch.autograd.grad((output * projection).sum(), tensors, allow_unused=True)

    reference = {n: p.detach().double().requires_grad_() for n, p in parameters.items()}
    buffers = {n: b.double() for n, b in layer.named_buffers()}
    reference_input = hidden_states.detach().double().requires_grad_()
    expected = naive.chain(reference_input, reference | buffers, config)
    expected_gradients = torch.autograd.grad(
        (expected * projection.double()).sum(), [reference_input, *reference.values()], allow_unused=True
    )

    def check(actual, wanted, name):
        scale = max(wanted.abs().max().item(), 1.0)
        error = (actual.double() - wanted).abs().max().item()
        assert error <= tolerance * scale, f"{name}: {error:.2e} with scale {scale:.2e} ({backend})"

    check(output.detach(), expected.detach(), "output")
    for name, actual, wanted in zip(["input", *parameters], gradients, expected_gradients, strict=True):
        if wanted is not None:
            # A parameter the chain does not use may have no gradient; one it uses must have one.
            check(actual, wanted, f"gradient of {name}")
        else:
            assert actual is None or not actual.any(), f"gradient of {name}"


def routing_margin(layer, hidden_states) -> float:
    """Smallest gap between scores that could change which experts are chosen if rounding swapped them."""
    margins = []

    def measure(router, args, outputs):
        scores = outputs[0].detach().double().sigmoid() + getattr(router, "e_score_correction_bias", 0.0)
        gaps = scores.sort(dim=-1).values.diff(dim=-1)
        if gaps.numel():
            margins.append(gaps.min().item())

    hooks = [m.register_forward_hook(measure) for m in layer.modules() if isinstance(m, CoeRouter)]
    with torch.no_grad():
        layer.chain(hidden_states[None])
    for hook in hooks:
        hook.remove()
    return min(margins, default=1.0)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("rule", RESIDUAL_RULES)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    inner_iter=st.integers(1, 4),
    use_igate=st.booleans(),
    n_shared_experts=st.sampled_from([None, 1, 2]),
    top_k=st.integers(1, 4),
    num_tokens=st.integers(1, 6),
    identical_tokens=st.booleans(),
    backbone=st.sampled_from(["deepseek_v2", "qwen2_moe"]),
    residual_multiplier=st.sampled_from([1.0, 0.4]),
    stabilisers=st.sampled_from([{}, *STABILISERS.values()]),
    seed=st.integers(0, 2**31),
)
def test_chain_equals_naive_loop(
    rule,
    router,
    inner_iter,
    use_igate,
    n_shared_experts,
    top_k,
    num_tokens,
    identical_tokens,
    backbone,
    residual_multiplier,
    stabilisers,
    seed,
):
    if rule in ("refine", "split"):
        inner_iter, use_igate = max(2, inner_iter), True
    if rule == "split":  # 4 experts are within reach of the group-limited routers
        top_k = min(top_k, 4 // inner_iter)
    config = tiny_config(
        hidden_size=8,
        num_attention_heads=2,
        moe_intermediate_size=8,
        num_experts_per_tok=top_k,
        inner_iter=inner_iter,
        use_igate=use_igate,
        n_shared_experts=n_shared_experts,
        backbone=backbone,
        residual_multiplier=residual_multiplier,
        **stabilisers,
        **RESIDUAL_RULES[rule],
        **ROUTERS[router],
    )
    assert config.residual_rule == rule
    layer = make_layer(config, seed, torch.float64)
    hidden_states = torch.randn(num_tokens, config.hidden_size, dtype=torch.float64)
    if identical_tokens:  # then every token goes to the same experts
        hidden_states = hidden_states[:1].repeat(num_tokens, 1)
    # Rounding may swap experts whose scores are closer than this.
    assume(routing_margin(layer, hidden_states) > 1e-5)
    for backend in ("eager", "batched_mm", "grouped_mm"):
        compare_with_naive(layer, config, hidden_states.clone(), backend, tolerance=1e-10)
    # torch's own has no float64 kernel on the CPU.
    compare_with_naive(layer.float(), config, hidden_states.float(), "torch_grouped_mm", tolerance=2e-4)


@pytest.mark.parametrize("inner_iter", [1, 2, 3])
@pytest.mark.parametrize("option", STABILISERS)
@pytest.mark.parametrize("rule", RESIDUAL_RULES)
def test_stabilised_chain_equals_naive_loop(rule, option, inner_iter):
    if rule in ("refine", "split") and inner_iter == 1:
        pytest.skip("converted chains have two iterations or more")
    config = tiny_config(inner_iter=inner_iter, residual_multiplier=0.7, **RESIDUAL_RULES[rule], **STABILISERS[option])
    layer = make_layer(config, 0, torch.float64)
    hidden_states = torch.randn(5, config.hidden_size, dtype=torch.float64)
    assert routing_margin(layer, hidden_states) > 1e-8  # more than rounding in float64
    compare_with_naive(layer, config, hidden_states, "eager", tolerance=1e-10)
    # With one iteration there is none that reads again.
    moves = inner_iter > 1 or option in ("branch_norm", "residual_scale", "all")
    plain = tiny_config(inner_iter=inner_iter, residual_multiplier=0.7, **RESIDUAL_RULES[rule])
    expected = naive.chain(hidden_states, dict(layer.named_parameters()), plain)
    assert torch.allclose(layer.chain(hidden_states[None])[0], expected) != moves


@pytest.mark.parametrize("backend", EXPERTS_BACKENDS)
@pytest.mark.parametrize(
    "num_experts, top_k, num_tokens",
    [(1, 1, 5), (8, 1, 1), (8, 8, 1), (8, 8, 7), (3, 2, 4)],
    ids=["all tokens on one expert", "one token in all", "one token on all experts", "dense", "odd expert count"],
)
def test_corner_cases(backend, num_experts, top_k, num_tokens):
    config = tiny_config(n_routed_experts=num_experts, num_experts_per_tok=top_k)
    layer = make_layer(config, 0, torch.float32)
    compare_with_naive(layer, config, torch.randn(num_tokens, config.hidden_size), backend, tolerance=1e-4)


@pytest.mark.parametrize("backend", EXPERTS_BACKENDS)
def test_experts_without_tokens_get_zero_gradients(backend):
    config = tiny_config(topk_method="noaux_tc", n_group=1, topk_group=1)
    layer = make_layer(config, 0, torch.float32)
    config._experts_implementation = backend
    for router in layer.mlp.gate:
        router.e_score_correction_bias.copy_(torch.tensor([9.0, 9.0, 0, 0, 0, 0, 0, 0]))
    layer.chain(torch.randn(1, 5, config.hidden_size)).sum().backward()
    gradient = layer.mlp.experts.down_proj.grad
    assert gradient[:2].any(dim=-1).any(dim=-1).all()
    assert not gradient[2:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_routing_is_computed_in_float32(dtype):
    """The router sees the model's values but rounds nothing itself, also under autocast."""
    config = tiny_config()
    router = make_layer(config, 0, torch.float32).mlp.gate[0].to(dtype)
    hidden_states = torch.randn(3, 5, config.hidden_size).to(dtype)
    expected = hidden_states.float().flatten(0, 1) @ router.weight.float().T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, weights, _ = router(hidden_states)
    assert logits.dtype == weights.dtype == torch.float32
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("backend", EXPERTS_BACKENDS)
def test_routed_experts_are_summed_in_float32(backend):
    """bfloat16 experts whose weighted sum is accumulated in float32: at most one rounding of the sum."""
    config = tiny_config(num_experts_per_tok=8, n_routed_experts=8)
    experts = make_layer(config, 0, torch.float32).mlp.experts.to(torch.bfloat16)
    with torch.no_grad():  # every output is one of the inputs: exact, whatever kernel computes it
        for weight in experts.parameters():
            chosen = torch.randint(weight.shape[-1], weight.shape[:-1])
            weight.copy_(torch.nn.functional.one_hot(chosen, weight.shape[-1]))
    config._experts_implementation = backend
    tokens = torch.randn(16, config.hidden_size).to(torch.bfloat16)
    index = torch.arange(8).repeat(16, 1)
    weights = torch.rand(16, 8)
    each = torch.stack([experts(tokens, index[:, k : k + 1], torch.ones(16, 1)) for k in range(8)], dim=1)
    expected = (each.float() * weights[..., None]).sum(dim=1)
    torch.testing.assert_close(experts(tokens, index, weights), expected.to(torch.bfloat16), atol=0, rtol=2**-7)


YARN = {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 0.9, "beta_fast": 32, "beta_slow": 1}


@pytest.mark.parametrize("backend", EXPERTS_BACKENDS)
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"q_lora_rank": 12, "attention_bias": True},
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 3.0},
        {"rope_parameters": YARN | {"rope_theta": 10000.0, "original_max_position_embeddings": 64}},
        {"first_k_dense_replace": 1, "n_shared_experts": 2, "tie_word_embeddings": True},
    ],
    ids=["plain", "low-rank queries", "group limited", "yarn", "dense first layer"],
)
def test_one_iteration_of_the_prenorm_chain_is_deepseek_v2(overrides, backend):
    options = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, **TINY, **overrides}
    torch.manual_seed(0)
    native = DeepseekV2ForCausalLM(DeepseekV2Config(**options)).eval()
    config = tiny_config(inner_iter=1, prenorm_residual=True, use_igate=False, **overrides)
    model = CoeForCausalLM(config).eval()
    model.load_state_dict(native.state_dict())
    native.set_experts_implementation(backend)
    model.set_experts_implementation(backend)
    input_ids = random_ids(2, 17)
    with torch.no_grad():
        logits = model(input_ids).logits
        expected = native(input_ids).logits
    assert expected.std() > 0.1
    assert_equal_up_to_rounding(logits, expected)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_selection_bias_router_is_deepseek_v3s(norm_topk_prob):
    options = {"n_group": 4, "topk_group": 2, "norm_topk_prob": norm_topk_prob, "routed_scaling_factor": 2.5}
    native = DeepseekV3TopkRouter(
        DeepseekV3Config(hidden_size=32, n_routed_experts=8, num_experts_per_tok=3, **options)
    )
    router = CoeRouter(tiny_config(scoring_func="sigmoid", topk_method="noaux_tc", num_experts_per_tok=3, **options))
    torch.nn.init.normal_(native.weight)
    torch.nn.init.normal_(native.e_score_correction_bias)
    router.load_state_dict(native.state_dict())
    hidden_states = torch.randn(64, 32)
    for actual, expected in zip(router(hidden_states), native(hidden_states), strict=True):
        torch.testing.assert_close(actual, expected)


def test_dense_layers_are_plain_deepseek_v2_layers():
    model = tiny_model(num_hidden_layers=5, first_k_dense_replace=1, moe_layer_freq=2, prenorm_residual=True)
    assert [layer.is_sparse for layer in model.model.layers] == [False, False, True, False, True]
    dense = tiny_model(n_routed_experts=None, inner_iter=1)
    native = DeepseekV2ForCausalLM(DeepseekV2Config(**{**TINY, "first_k_dense_replace": 2})).eval()
    native.load_state_dict(dense.state_dict())
    input_ids = random_ids(2, 9)
    with torch.no_grad():
        assert_equal_up_to_rounding(dense(input_ids).logits, native(input_ids).logits)


def test_independent_routers_differ_and_one_router_is_shared():
    independent, shared = tiny_model(use_igate=True), tiny_model(use_igate=False)
    input_ids = random_ids(1, 12)
    with torch.no_grad():
        first, second = independent(input_ids, output_router_logits=True).router_logits[:2]
    assert not torch.allclose(first, second)
    names = [name for name, _ in shared.named_parameters() if ".gate." in name]
    assert names == [f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)]
    assert len(shared(input_ids, output_router_logits=True).router_logits) == 4
