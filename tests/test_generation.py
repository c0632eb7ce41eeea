"""Generation: every strategy against a plain uncached loop, caches, padding, compilation."""

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from modeling_coe.releases import CACHE

from .helpers import (
    EXPERTS_BACKENDS,
    assert_equal_up_to_rounding,
    random_ids,
    requires_compiled_grouped_mm,
    tiny_model,
)


VARIANTS = {
    "default": {},
    "both, three iterations, low-rank queries": {"outer_residual": True, "inner_iter": 3, "q_lora_rank": 12},
    "pre-norm, selection bias": {"prenorm_residual": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "dense first layer, one router": {"first_k_dense_replace": 1, "use_igate": False},
}
NEW_TOKENS = 8


@pytest.fixture(params=VARIANTS)
def model(request):
    return tiny_model(**VARIANTS[request.param])


def greedy(**kwargs):
    return {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, **kwargs}


@torch.no_grad()
def uncached_greedy(model, input_ids, steps=NEW_TOKENS):
    for _ in range(steps):
        next_ids = model(input_ids, use_cache=False).logits[:, -1].argmax(dim=-1, keepdim=True)
        input_ids = torch.cat([input_ids, next_ids], dim=-1)
    return input_ids


@pytest.mark.parametrize("backend", EXPERTS_BACKENDS)
def test_greedy(model, backend):
    model.set_experts_implementation(backend)
    input_ids = random_ids(2, 6)
    assert torch.equal(model.generate(input_ids, **greedy()), uncached_greedy(model, input_ids))


def test_cached_and_uncached_logits_agree(model):
    input_ids = random_ids(2, 9)
    with torch.no_grad():
        expected = model(input_ids, use_cache=False).logits
        prefill = model(input_ids[:, :5], use_cache=True)
        logits, cache = [prefill.logits], prefill[CACHE]
        for position in range(5, 9):
            logits.append(model(input_ids[:, position : position + 1], **{CACHE: cache}).logits)
    assert_equal_up_to_rounding(torch.cat(logits, dim=1), expected)


def test_cache_holds_the_compressed_latents(model):
    cache = model(random_ids(2, 7), use_cache=True)[CACHE]
    config = model.config
    assert isinstance(cache, DynamicCache) and len(cache.layers) == config.num_hidden_layers
    for layer in cache.layers:  # one entry a layer, however many iterations
        assert layer.keys.shape == (2, 1, 7, config.kv_lora_rank)
        assert layer.values.shape == (2, 1, 7, config.qk_rope_head_dim)


def test_generation_goes_on_from_a_cache(model):
    input_ids = random_ids(1, 6)
    expected = model.generate(input_ids, **greedy())
    first = model.generate(input_ids, **greedy(max_new_tokens=3, return_dict_in_generate=True))
    second = model.generate(first.sequences, **greedy(max_new_tokens=NEW_TOKENS - 3), **{CACHE: first[CACHE]})
    assert torch.equal(second, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padded_batch(model, attention):
    model.set_attn_implementation(attention)
    short, long = random_ids(1, 4), random_ids(1, 9)
    batch = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), short], dim=1), long])
    mask = (batch != 0).long()
    generated = model.generate(batch, attention_mask=mask, **greedy())
    assert torch.equal(generated[:1, 5:], uncached_greedy(model, short))
    assert torch.equal(generated[1:], uncached_greedy(model, long))


def test_static_cache(model):
    input_ids = random_ids(2, 6)
    generated = model.generate(input_ids, **greedy(cache_implementation="static", disable_compile=True))
    assert torch.equal(generated, uncached_greedy(model, input_ids))
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        logits = model(input_ids, **{CACHE: cache}).logits
        expected = model(input_ids).logits
    assert_equal_up_to_rounding(logits, expected)


def test_beam_search(model):
    """The two beams of `generate` are the two best of all two-token continuations."""
    input_ids = random_ids(1, 5)
    output = model.generate(
        input_ids,
        **greedy(
            max_new_tokens=2,
            num_beams=model.config.vocab_size,
            num_return_sequences=2,
            return_dict_in_generate=True,
            output_scores=True,
        ),
    )
    with torch.no_grad():
        first = model(input_ids).logits[0, -1].log_softmax(-1)
        every = torch.cat([input_ids.repeat(len(first), 1), torch.arange(len(first))[:, None]], dim=1)
        second = model(every).logits[:, -1].log_softmax(-1)
    best = (first[:, None] + second).flatten().topk(2)
    expected = torch.stack([best.indices // len(first), best.indices % len(first)], dim=1)
    assert torch.equal(output.sequences[:, 5:], expected)
    torch.testing.assert_close(output.sequences_scores, best.values / 2, atol=1e-4, rtol=1e-4)


def test_sampling_follows_the_seed_and_the_distribution(model):
    input_ids = random_ids(1, 5)
    options = {"max_new_tokens": 6, "do_sample": True, "eos_token_id": None, "top_k": 0}
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model.generate(input_ids.repeat(4, 1), **options))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    # Sampling among one candidate is greedy decoding.
    only = model.generate(input_ids, **{**options, "top_k": 1})
    assert torch.equal(only, uncached_greedy(model, input_ids, 6))


@pytest.mark.parametrize("assistant", ["itself", "another model", "prompt lookup"])
def test_assisted_decoding(model, assistant):
    input_ids = random_ids(1, 6)
    helper = {
        "itself": {"assistant_model": copy.deepcopy(model)},
        "another model": {"assistant_model": tiny_model(seed=7, num_hidden_layers=1)},
        "prompt lookup": {"prompt_lookup_num_tokens": 2},
    }[assistant]
    assert torch.equal(model.generate(input_ids, **greedy(), **helper), uncached_greedy(model, input_ids))


def test_inputs_embeds(model):
    input_ids = random_ids(2, 6)
    embeddings = model.get_input_embeddings()(input_ids)
    generated = model.generate(inputs_embeds=embeddings, **greedy())
    assert torch.equal(generated, uncached_greedy(model, input_ids)[:, 6:])


def test_logits_to_keep(model):
    input_ids = random_ids(2, 6)
    with torch.no_grad():
        assert_equal_up_to_rounding(model(input_ids, logits_to_keep=2).logits, model(input_ids).logits[:, -2:])


class TestCompile:
    """`fullgraph=True`: the forward is one graph, in evaluation and in training, from the first call on."""

    @pytest.fixture(autouse=True)
    def fresh_compiler(self):
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize("backend", ["grouped_mm", "batched_mm"])
    def test_forward(self, backend):
        model = tiny_model(inner_iter=2, first_k_dense_replace=1, num_hidden_layers=3)
        model.set_experts_implementation(backend)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for shape in ((2, 6), (1, 11)):
            input_ids = random_ids(*shape)
            with torch.no_grad():
                actual, expected = compiled(input_ids).logits, model(input_ids).logits
            assert_equal_up_to_rounding(actual, expected)

    @pytest.mark.parametrize("backend", [pytest.param("grouped_mm", marks=requires_compiled_grouped_mm), "batched_mm"])
    def test_training_step(self, backend):
        model = tiny_model(aux_loss_alpha=0.1).train()
        model.set_experts_implementation(backend)
        input_ids = random_ids(2, 8)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        loss = compiled(input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        actual = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        expected = model(input_ids, labels=input_ids, use_cache=False)
        expected.loss.backward()
        assert expected.aux_loss > 1
        assert_equal_up_to_rounding(loss, expected.loss)
        for name, parameter in model.named_parameters():
            assert_equal_up_to_rounding(actual[name], parameter.grad)

    def test_generate_with_a_static_cache(self):
        model = tiny_model()
        input_ids = random_ids(1, 6)
        expected = uncached_greedy(model, input_ids)
        compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        cache = StaticCache(config=model.config, max_cache_len=6 + NEW_TOKENS)
        generated, step = input_ids, input_ids
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                logits = compiled(step, **{CACHE: cache}).logits
                step = logits[:, -1:].argmax(dim=-1)
                generated = torch.cat([generated, step], dim=-1)
        assert torch.equal(generated, expected)

    def test_with_the_default_compiler(self):
        model = tiny_model(num_hidden_layers=1)
        input_ids = random_ids(2, 6)
        with torch.no_grad():
            actual = torch.compile(model, fullgraph=True)(input_ids, use_cache=False).logits
            assert_equal_up_to_rounding(actual, model(input_ids).logits)


def test_generation_config_is_saved_and_used(model, tmp_path):
    model.generation_config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    input_ids = random_ids(1, 5)
    assert torch.equal(loaded.generate(input_ids), uncached_greedy(model, input_ids, 3))
