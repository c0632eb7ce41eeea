"""What users see is the same on every release of transformers: names of arguments, dtypes, a quiet import."""

import contextlib
import inspect
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV2ForCausalLM, DynamicCache
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.utils import logging

from modeling_coe import CoeForCausalLM, CoeForSequenceClassification, CoeModel
from modeling_coe.attention import CoeAttention
from modeling_coe.modeling_coe import CoeDecoderLayer
from modeling_coe.releases import CACHE, cache_argument

from .helpers import ROOT, random_ids, tiny_config, tiny_model, without_torchao


@pytest.fixture
def no_warnings(caplog):
    """Neither a warning of Python's nor a line in transformers' log."""
    logger = logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_import_prints_nothing():
    run = subprocess.run(
        [sys.executable, "-c", "import modeling_coe"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (run.returncode, run.stdout, without_torchao(run.stderr)) == (0, "", "")


@pytest.mark.parametrize("model_class", [CoeAttention, CoeDecoderLayer, CoeModel, CoeForCausalLM])
def test_signatures_name_the_cache_as_transformers_does(model_class):
    assert CACHE in inspect.signature(DeepseekV2ForCausalLM.forward).parameters
    parameters = inspect.signature(model_class.forward).parameters
    assert CACHE in parameters and len({"cache", "past_key_values"} & set(parameters)) == 1


def deprecates(name: str):
    """Expects a warning where this release of transformers has a newer name, and none elsewhere."""
    return contextlib.nullcontext() if name in (CACHE, "cache") else pytest.warns(FutureWarning, match=f"`{name}`")


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("model_class", [CoeModel, CoeForCausalLM])
def test_both_names_of_the_cache_work_everywhere(model_class, name, no_warnings):
    torch.manual_seed(0)
    model, input_ids = model_class(tiny_config()).eval(), random_ids(2, 9)
    with torch.no_grad():
        expected = model(input_ids)[0]
        cache = DynamicCache(config=model.config)
        with deprecates(name):
            steps = [model(step, **{name: cache})[0] for step in (input_ids[:, :5], input_ids[:, 5:])]
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_layers_and_attention_take_both_names(name, no_warnings):
    model = tiny_model()
    hidden_states = torch.randn(1, 3, model.config.hidden_size)
    positions = model.model.rotary_emb(hidden_states, torch.arange(3).unsqueeze(0))
    layer = model.model.layers[0]
    with torch.no_grad():
        for module in (layer, layer.self_attn):
            cache = DynamicCache(config=model.config)
            with deprecates(name):
                module(hidden_states, attention_mask=None, position_embeddings=positions, **{name: cache})
            assert cache.get_seq_length() == 3


@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
def test_a_head_passes_either_name_on(name, no_warnings):
    model = CoeForSequenceClassification(tiny_config(num_labels=2)).eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), deprecates(name):
        model(random_ids(1, 6), **{name: cache})
    assert cache.get_seq_length() == 6


@pytest.mark.skipif(CACHE == "cache", reason="transformers' own decorator takes the newer name and warns")
def test_two_caches_are_refused():
    model = tiny_model()
    caches = {"cache": DynamicCache(config=model.config), "past_key_values": DynamicCache(config=model.config)}
    with pytest.raises(ValueError, match="`cache` and `past_key_values` are two names of one argument"):
        model(random_ids(1, 3), **caches)


def test_the_paged_cache_has_one_name_in_all_releases():
    cache, paged = DynamicCache(), PagedAttentionCache.__new__(PagedAttentionCache)
    assert cache_argument(cache) == {CACHE: cache} and cache_argument(paged) == {"cache": paged}


def test_generation_is_quiet(no_warnings):
    model = tiny_model()
    output = model.generate(random_ids(2, 5), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert output[CACHE].get_seq_length() == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["from_pretrained", "from_config"])
def test_routers_of_a_half_precision_model_are_in_float32(tmp_path, dtype, way):
    """On every release, as in transformers' own DeepSeek models from 5.24 on."""
    model = tiny_model(topk_method="noaux_tc", scoring_func="sigmoid", first_k_dense_replace=1)
    model.save_pretrained(tmp_path)
    if way == "from_pretrained":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    else:
        loaded = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    tensors = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    in_float32 = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    routers = {name for name in tensors if ".mlp.gate." in name}
    assert len(routers) == 2 * 2 and {name for name in in_float32 if "rotary" not in name} == routers
    if way == "from_pretrained":
        for name in routers:
            assert torch.equal(tensors[name], model.state_dict()[name])


def test_a_loaded_model_rotates_as_one_that_was_made(tmp_path):
    """HunYuan's `alpha` stretches the angles, where the rotary embedding is called dynamic."""
    rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 50.0}
    model = tiny_model(backbone="hunyuan_v1_moe", rope_parameters=rope_parameters)
    model.save_pretrained(tmp_path)
    frequencies = AutoModelForCausalLM.from_pretrained(tmp_path).model.rotary_emb.inv_freq
    base = 10000.0 * 50.0 ** (8 / 6)
    expected = base ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(frequencies, expected)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)
