"""Chains on the attention of other families, and the chains of converted models, as models of transformers.

That a backbone computes what its family's own model computes is tested with the conversion; the equations of the
converted chains with all others in `test_chain.py`.
"""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, StaticCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from configuration_coe import BACKBONES, RESIDUAL_RULES
from modeling_coe import CoeForCausalLM
from modeling_coe.backbones import BACKBONE_MODULES
from modeling_coe.modeling_coe import CoeRouter
from modeling_coe.releases import CACHE

from .helpers import (
    EXPERTS_BACKENDS,
    assert_equal_up_to_rounding,
    enable_checkpointing,
    random_ids,
    tiny_config,
    tiny_model,
)


UPCYCLED = {
    "refine": {"upcycling": "refine"},
    "split": {"upcycling": "split", "norm_topk_prob": True},
    "split, one layer": {"upcycling": "split", "chain_layers": [1], "num_experts_per_tok": 1, "inner_iter": 4},
}
WINDOWS = {
    "qwen2_moe": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3": {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]},
    "qwen3_moe": {"sliding_window": 4},
    "mixtral": {"sliding_window": 4},
}


def randomize(model: CoeForCausalLM) -> CoeForCausalLM:
    """Leaves the zero scales of a new model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("iteration_scale.weight"):
                parameter.normal_()
    return model


def test_every_backbone_has_a_configuration_and_classes():
    assert tuple(BACKBONE_MODULES) == tuple(BACKBONES)
    for name, backbone in BACKBONES.items():
        assert backbone.config_class.model_type == name
        family = MODEL_FOR_CAUSAL_LM_MAPPING[backbone.config_class].__module__
        for classes in (BACKBONE_MODULES[name].rotary_embedding, BACKBONE_MODULES[name].norm):
            assert classes.__module__ == family


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_bias": True, "qkv_bias": False, "head_dim": 16, "num_key_value_heads": 2},
        {"upcycling": "refine", "n_shared_experts": 2, "tie_word_embeddings": True},
        {"upcycling": "split", "chain_layers": [0], "n_shared_experts": None},
        {"shared_expert_intermediate_size": 40, "num_hidden_layers": 4, "decoder_sparse_step": 2},
        {"num_hidden_layers": 4, "mlp_only_layers": [1, 2], "q_lora_rank": 12, "use_qk_norm": True},
    ],
)
def test_parameters_are_counted(backbone, options):
    if backbone == "olmoe":  # its norm of the keys fits no other head size
        options = {name: value for name, value in options.items() if name != "head_dim"}
    config = tiny_config(backbone=backbone, **options)
    with torch.device("meta"):
        model = CoeForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.total_parameters
    chosen = sum(config.num_iterations(i) * config.experts_per_iteration(i) for i in config.sparse_layers)
    experts = config.num_sparse_layers * config.n_routed_experts
    per_expert = 3 * config.hidden_size * config.moe_intermediate_size
    assert config.active_parameters == config.total_parameters - (experts - chosen) * per_expert


@pytest.mark.parametrize("backbone", BACKBONES)
def test_generation_with_caches_equals_without(backbone):
    options = WINDOWS.get(backbone, {})
    model = tiny_model(backbone=backbone, upcycling="split", num_key_value_heads=2, **options)
    randomize(model)
    prompt = random_ids(2, 9)
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0  # left padding
    arguments = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(prompt, use_cache=False, **arguments)
    assert torch.equal(model.generate(prompt, **arguments), expected)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **arguments), expected)


@pytest.mark.parametrize("rule", RESIDUAL_RULES)
def test_multipliers_are_those_of_the_weights(rule):
    fields = {"n_shared_experts": 2, "first_k_dense_replace": 1, "num_hidden_layers": 3, **RESIDUAL_RULES[rule]}
    model = randomize(tiny_model(**fields))
    multiplied = tiny_model(embedding_multiplier=3.0, residual_multiplier=0.4, logits_scaling=5.0, **fields)
    multiplied.load_state_dict(model.state_dict())
    factors = {"embed_tokens": 3.0, "o_proj": 0.4, "down_proj": 0.4, "lm_head": 0.2}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for part in factors.keys() & set(name.split(".")):
                parameter *= factors[part]
        ids = random_ids(2, 7)
        assert_equal_up_to_rounding(multiplied(ids).logits, model(ids).logits)


@pytest.mark.parametrize("backbone", WINDOWS)
def test_windows_reach_as_far_as_they_say(backbone):
    model = tiny_model(
        backbone=backbone, num_hidden_layers=1, **(WINDOWS[backbone] | {"layer_types": ["sliding_attention"]})
    )
    ids = random_ids(1, 8)
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 90 + 3
    with torch.no_grad():
        difference = (model(ids).logits - model(changed).logits).abs().amax(dim=-1)[0]
    assert (difference[:4] > 0.1).all() and (difference[4:] < 1e-5).all()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_attentions_of_every_backbone_are_recorded(backbone):
    model = tiny_model(backbone=backbone)
    model.set_attn_implementation("eager")
    output = model(random_ids(1, 5), output_attentions=True, output_hidden_states=True, output_router_logits=True)
    assert [tuple(attentions.shape) for attentions in output.attentions] == [(1, 4, 5, 5)] * 2
    assert len(output.hidden_states) == 3 and len(output.router_logits) == 4


@pytest.mark.parametrize("case", UPCYCLED)
@pytest.mark.parametrize("backend", EXPERTS_BACKENDS)
def test_upcycled_chains_on_every_backend(case, backend):
    model = randomize(tiny_model(**UPCYCLED[case]))
    ids = random_ids(2, 6)
    model.set_experts_implementation("eager")
    expected = model(ids, labels=ids)
    model.set_experts_implementation(backend)
    output = model(ids, labels=ids)
    assert_equal_up_to_rounding(output.logits, expected.logits)


def test_split_never_uses_an_expert_twice():
    model = randomize(tiny_model(upcycling="split", num_experts_per_tok=2, inner_iter=4))
    indices = model(random_ids(3, 11), output_router_logits=True).router_indices
    for layer in (indices[:4], indices[4:]):
        chosen = torch.cat(layer, dim=-1).sort(dim=-1).values
        assert torch.equal(chosen, torch.arange(8).expand(33, 8))


def test_unchained_layers_run_once_with_all_experts():
    model = tiny_model(upcycling="split", chain_layers=[1], num_experts_per_tok=2, inner_iter=2)
    indices = model(random_ids(1, 5), output_router_logits=True).router_indices
    assert [tuple(index.shape) for index in indices] == [(5, 4), (5, 2), (5, 2)]
    assert not hasattr(model.model.layers[0], "iteration_scale")


@pytest.mark.parametrize("case", UPCYCLED)
def test_new_scales_are_zero_and_saved(case, tmp_path):
    model = tiny_model(**UPCYCLED[case])
    scales = {name: scale for name, scale in model.state_dict().items() if name.endswith("iteration_scale.weight")}
    assert scales and not any(scale.any() for scale in scales.values())
    randomize(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    ids = random_ids(1, 7)
    with torch.no_grad():
        assert_equal_up_to_rounding(loaded(ids).logits, model(ids).logits)


def test_a_checkpoint_without_scales_is_refused(tmp_path):
    model = tiny_model(upcycling="refine")
    state_dict = {name: tensor for name, tensor in model.state_dict().items() if "1.iteration_scale" not in name}
    model.save_pretrained(tmp_path, state_dict=state_dict)
    with pytest.raises(ValueError, match=r"layers\.1 lacks iteration_scale"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("norms", ["iteration_norms", "branch_norms"])
def test_a_checkpoint_without_norms_of_iterations_is_refused(tmp_path, norms):
    model = tiny_model(iteration_norm=True, branch_norm=True)
    state_dict = {name: tensor for name, tensor in model.state_dict().items() if f"1.{norms}.0" not in name}
    model.save_pretrained(tmp_path, state_dict=state_dict)
    with pytest.raises(ValueError, match=rf"layers\.1 lacks {norms}\.0\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.0 has, beyond the model's, .*norms\.0\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path, **{norms.replace("norms", "norm"): False})


@pytest.mark.parametrize("case", UPCYCLED)
def test_gradients_with_checkpointing_equal_those_without(case):
    model = randomize(tiny_model(**UPCYCLED[case])).train()
    ids = random_ids(2, 6)
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and gradient.any() for gradient in expected.values())
    model.zero_grad()
    enable_checkpointing(model)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_around_the_iterations_of_a_split_layer(use_reentrant):
    model = randomize(tiny_model(upcycling="split", inner_iter=3, aux_loss_alpha=0.0)).train()
    ids = random_ids(2, 6)
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    for layer in model.model.layers:
        layer.mlp.forward = functools.partial(checkpoint, layer.mlp.forward, use_reentrant=use_reentrant)
    loss = model(ids, labels=ids).loss
    loss.backward(retain_graph=not use_reentrant)
    if not use_reentrant:  # each pass computes the iterations again
        model.zero_grad()
        loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("backbone", ["deepseek_v3", "qwen2_moe"])
def test_compiles_as_one_graph(backbone):
    model = randomize(tiny_model(backbone=backbone, upcycling="split", **WINDOWS.get(backbone, {})))
    ids = random_ids(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_equal_up_to_rounding(compiled(ids).logits, expected)


def test_a_static_cache_holds_only_the_window():
    model = tiny_model(backbone="mixtral", **WINDOWS["mixtral"])
    cache = StaticCache(config=model.config, max_cache_len=32)
    model(random_ids(1, 9), **{CACHE: cache})
    assert all(layer.keys.shape[2] == 4 for layer in cache.layers)


def test_a_single_expert_weighs_as_in_its_family():
    scores = {}
    for backbone in ("deepseek_v2", "mixtral"):
        router = CoeRouter(tiny_config(backbone=backbone, num_experts_per_tok=1, norm_topk_prob=True))
        torch.nn.init.normal_(router.weight)
        _, scores[backbone], _ = router(torch.randn(5, 32))
    assert torch.equal(scores["mixtral"], torch.ones(5, 1))
    assert (scores["deepseek_v2"] < 1).all()
