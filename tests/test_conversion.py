"""Conversion: the source's function is kept, weights come back bit by bit, and nothing is left where it fails."""

import dataclasses
import errno
import functools
import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM

from conversion import ConversionError, Options, checkpoint, convert, converter, describe, plan_conversion
from conversion.checkpoint import Checkpoint
from conversion.cli import main
from conversion.families import FAMILIES
from conversion.verify import make_batch
from modeling_coe.releases import CACHE

from .conversion_sources import (
    DENSE_SOURCES,
    MOE_SOURCES,
    edit_json,
    edit_tensor,
    make_config,
    make_model,
    make_source,
    stored,
)
from .helpers import ROOT, assert_equal_up_to_rounding, tiny_model


MODES = [("identity", 1), ("refine", 2), ("refine", 4), ("split", 2), ("split", 4)]
CHAINS = [Options(mode=mode, iterations=iterations) for mode, iterations in MODES]


def chain_id(options: Options) -> str:
    return f"{options.mode}-{options.iterations}"


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Folders of sources by their names, each made when it is first asked for."""
    root, folders = tmp_path_factory.mktemp("sources"), {}

    def source(name: str, **options) -> Path:
        key = "-".join([name, *(f"{k}={v}" for k, v in options.items())])
        if key not in folders:
            folders[key] = make_source(root / str(len(folders)), name, **options)
        return folders[key]

    return source


@pytest.fixture(scope="session")
def chains(sources, tmp_path_factory):
    """Folders of converted sources, likewise."""
    root, folders = tmp_path_factory.mktemp("chains"), {}

    def chain(name: str, options: Options) -> Path:
        key = (name, chain_id(options))
        if key not in folders:
            folders[key] = root / str(len(folders))
            convert(sources(name), folders[key], options, verify_tokens=24)
        return folders[key]

    return chain


@pytest.fixture
def copied(sources, tmp_path):
    """A copy of a source that a test may damage."""

    def copy(name: str = "qwen3_moe", **options) -> Path:
        return Path(shutil.copytree(sources(name, **options), tmp_path / "damaged"))

    return copy


def load(folder: Path, **kwargs):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


def assert_refused(source, out: Path, *messages: str, options: Options | None = None, **kwargs) -> None:
    """The conversion raises with all of `messages`, and beside `out` nothing is left."""
    before = set(out.parent.rglob("*"))
    with pytest.raises(ConversionError) as caught:
        convert(source, out, options, verify_tokens=8, **kwargs)
    for message in messages:
        assert message in str(caught.value)
    assert set(out.parent.rglob("*")) == before


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 99, (2, 12), generator=generator)
    padded = ids.clone()
    padded[1, :5] = 0
    return [{"input_ids": ids, "attention_mask": (ids != 0).long()} for ids in (ids, padded)]


# ------------------------------------------------------------------------------------------- the function is kept


@functools.cache
@torch.no_grad()
def logits_of(source: Path) -> list[torch.Tensor]:
    """Logits of a source in float32 for each of the batches."""
    model = load(source, dtype=torch.float32)
    return [model(**inputs).logits for inputs in batches()]


@functools.cache
def generated_by(source: Path) -> torch.Tensor:
    """32 greedy tokens for two rows, of which one is padded."""
    return generate(load(source, dtype=torch.float32))


def generate(model) -> torch.Tensor:
    return model.generate(**batches()[-1], do_sample=False, max_new_tokens=32, min_new_tokens=32)


@torch.no_grad()
def assert_same_function(source: Path, result: Path) -> torch.nn.Module:
    """Logits without and with cache, padded and not, in float32. Returns the result's model."""
    model = load(result, dtype=torch.float32)
    for inputs, expected in zip(batches(), logits_of(source), strict=True):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        torch.testing.assert_close(model(**inputs).logits[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
        cache = None
        for start, end in ((0, 9), (9, 10), (10, 12)):
            step = model(ids[:, start:end], attention_mask=mask[:, :end], **{CACHE: cache}, use_cache=True)
            cache, real = step[CACHE], mask[:, start:end].bool()
            torch.testing.assert_close(step.logits[real], expected[:, start:end][real], rtol=1e-5, atol=1e-5)
    return model


@pytest.mark.parametrize("options", CHAINS, ids=chain_id)
@pytest.mark.parametrize("name", MOE_SOURCES)
def test_function_is_kept(sources, chains, name, options):
    folder = chains(name, options)
    report = json.loads((folder / "conversion_report.json").read_text())
    assert report["exact"] and report["verification"]["passed"]
    config = AutoConfig.from_pretrained(folder)
    assert (config.inner_iter, config.backbone) == (options.iterations, FAMILIES[name.partition("-")[0]].backbone)
    assert config.num_experts_per_tok == (4 // options.iterations if options.mode == "split" else 4)
    model = assert_same_function(sources(name), folder)
    if "-" not in name or chain_id(options) == "split-2":
        assert torch.equal(generate(model), generated_by(sources(name)))


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2_moe", "mixtral", "ernie4_5_moe", "hunyuan_v1_moe"])
def test_stored_dtype_is_kept(sources, tmp_path, name):
    source = sources(name, dtype=torch.bfloat16)
    # From 5.24 on, transformers keeps the routers of some families in float32.
    dtypes = {".gate." in key: tensor.dtype for key, tensor in stored(source).items() if "_bias" not in key}
    assert dtypes[False] == torch.bfloat16
    convert(source, tmp_path / "out", verify_tokens=24)
    for key, tensor in stored(tmp_path / "out").items():
        wanted = torch.float32 if "correction_bias" in key else dtypes[".gate." in key]
        assert tensor.dtype == wanted, key
    assert load(tmp_path / "out").dtype == torch.bfloat16
    assert_same_function(source, tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "back", Options(to="source"), verify_tokens=4)
    assert_same_tensors(source, tmp_path / "back")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_rounds_the_source(sources, tmp_path, dtype):
    source = sources("deepseek_v3")
    report = convert(source, tmp_path / "out", Options(dtype=dtype), verify_tokens=24)
    assert report["verification"]["passed"] and str(dtype) in report["verification"]["precision"]
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == dtype
    original, result = stored(source), stored(tmp_path / "out")
    for key in ("lm_head.weight", "model.layers.1.mlp.experts.3.up_proj.weight"):
        assert torch.equal(result[key], original[key].to(dtype))
    bias = "model.layers.1.mlp.gate.{}e_score_correction_bias"
    assert torch.equal(result[bias.format("1.")], original[bias.format("")])


def test_fused_source(sources, tmp_path):
    for name in ("qwen2_moe", "mixtral", "granitemoe", "ernie4_5_moe", "hy_v3"):
        source, out = sources(name, fused=True), tmp_path / name
        assert any(key.endswith("experts.gate_up_proj") for key in stored(source))
        convert(source, out, verify_tokens=24)
        assert any(key.endswith("experts.gate_up_proj") for key in stored(out))
        assert_same_function(source, out)
        convert(out, tmp_path / f"{name}-back", Options(to="source"), verify_tokens=24)
        assert_same_function(source, tmp_path / f"{name}-back")


def test_only_some_layers_are_chained(sources, tmp_path):
    source = sources("deepseek_v2", num_hidden_layers=3)
    for mode in ("refine", "split"):
        convert(source, tmp_path / mode, Options(mode=mode, layers=(2,)), verify_tokens=24)
        config = AutoConfig.from_pretrained(tmp_path / mode)
        assert config.chain_layers == [2]
        assert [config.num_iterations(layer) for layer in range(3)] == [0, 1, 2]
        scales = [key for key in stored(tmp_path / mode) if key.endswith("iteration_scale")]
        assert scales == ["model.layers.2.iteration_scale"]
        assert_same_function(source, tmp_path / mode)
    assert_refused(source, tmp_path / "out", "0 cannot", "1, 2", options=Options(layers=(0, 1)))


@pytest.mark.parametrize("mode", ["refine", "split"])
def test_norms_of_iterations_start_as_copies(sources, tmp_path, mode):
    source, chain = sources("qwen2_moe"), tmp_path / "chain"
    options = Options(mode=mode, iteration_norm=True)
    assert convert(source, chain, options, verify_tokens=24)["exact"]
    model = assert_same_function(source, chain)
    for index in model.config.sparse_layers:
        layer = model.model.layers[index]
        assert torch.equal(layer.iteration_norms[0].weight, layer.post_attention_layernorm.weight)
    convert(chain, tmp_path / "back", Options(to="source"), verify_tokens=24)
    assert_same_function(source, tmp_path / "back")
    torch.nn.init.normal_(layer.iteration_norms[0].weight)
    model.save_pretrained(tmp_path / "trained")
    wrong = f"{index}.iteration_norms.0.weight` is not `model.layers.{index}.post_attention_layernorm.weight`"
    assert_refused(tmp_path / "trained", tmp_path / "out", wrong, options=Options(to="source"))


@pytest.mark.parametrize("fields", [{"branch_norm": True}, {"residual_scale": 2.0}], ids=str)
def test_what_a_family_cannot_hold_stays_in_the_chain(tmp_path, fields):
    tiny_model(inner_iter=1, prenorm_residual=True, **fields).save_pretrained(tmp_path / "chain")
    for target in ("source", "official"):
        assert_refused(tmp_path / "chain", tmp_path / target, *fields, options=Options(to=target))


@pytest.mark.parametrize("upcycle", ["copy", "slice"])
@pytest.mark.parametrize(
    "name, options", [("llama", CHAINS[0]), ("llama", CHAINS[1]), *((name, CHAINS[3]) for name in DENSE_SOURCES)]
)
def test_dense_source_keeps_its_function(sources, tmp_path, name, upcycle, options):
    options = Options(**{**vars(options), "upcycle": upcycle, "experts": 4})
    report = convert(sources(name), tmp_path / "out", options, verify_tokens=24)
    assert report["exact"] and report["verification"]["passed"]
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.n_routed_experts == 4
    assert config.moe_intermediate_size == (48 if upcycle == "copy" else 12)
    model = assert_same_function(sources(name), tmp_path / "out")
    assert torch.equal(generate(model), generated_by(sources(name)))


def test_only_some_layers_get_experts(sources, tmp_path):
    options = Options(mode="refine", upcycle="copy", layers=(1,))
    convert(sources("llama"), tmp_path / "out", options, verify_tokens=24)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert [config.num_iterations(layer) for layer in range(2)] == [0, 2]
    assert_same_function(sources("llama"), tmp_path / "out")


@pytest.mark.parametrize(
    "name, options, reason",
    [
        ("olmoe", Options(iterations=3, round_top_k=True), "3 experts instead of 4"),
        ("olmoe", Options(router_noise=0.5), "noise"),
        ("llama", Options(upcycle="slice", experts=8, top_k=4), "4 of the 8 slices"),
    ],
)
def test_inexact_conversions_say_so(sources, tmp_path, capsys, name, options, reason):
    report = convert(sources(name), tmp_path / "out", options, verify_tokens=24)
    assert not report["exact"] and reason in report["explanation"]
    assert report["verification"]["max_abs_difference"] > report["verification"]["tolerance"]
    assert "does **not** compute the same" in (tmp_path / "out" / "README.md").read_text()
    load(tmp_path / "out")


def test_noise_depends_on_the_seed_alone(sources, tmp_path):
    def routers(out, seed, **kwargs):
        options = Options(router_noise=0.1, seed=seed)
        convert(sources("olmoe"), tmp_path / out, options, verify_tokens=4, **kwargs)
        tensors = stored(tmp_path / out)
        return torch.stack([tensors[f"model.layers.{i}.mlp.gate.{t}.weight"] for i in range(2) for t in range(2)])

    one, same, other = routers("a", 1), routers("b", 1, max_shard_size="20KB"), routers("c", 2)
    assert torch.equal(one, same) and not torch.equal(one, other)
    noise = (one[1::2] - one[0::2]).flatten(1)
    assert noise.std().item() == pytest.approx(0.1, rel=0.1)
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("options", [Options(upcycle="copy"), Options(upcycle="slice", top_k=4, mode="refine")])
def test_new_routers_do_not_answer_to_what_all_tokens_share(sources, tmp_path, options):
    """Rows are orthogonal to the mean of what the MLP of their layer reads, on the tokens of the verification."""
    source = sources("llama")
    convert(source, tmp_path / "out", options, verify_tokens=60)
    routers = stored(tmp_path / "out")
    model, inputs = load(source, dtype=torch.float32), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    batch = make_batch(source, model.config, 60, None)
    with torch.no_grad():
        model(batch.input_ids, attention_mask=batch.attention_mask)
    for i, tokens in enumerate(inputs):
        router = routers[f"model.layers.{i}.mlp.gate.0.weight"]
        mean = tokens[batch.attention_mask.bool()].mean(0)
        assert router.std().item() == pytest.approx(model.config.initializer_range, rel=0.2)
        assert (router @ mean).abs().max() < 1e-4 * router.norm(dim=1).min() * mean.norm()
        assert torch.equal(routers[f"model.layers.{i}.mlp.gate.1.weight"], router)
    assert not torch.equal(router, routers["model.layers.0.mlp.gate.0.weight"])
    convert(source, tmp_path / "other", dataclasses.replace(options, seed=1), verify_tokens=60)
    assert not torch.equal(stored(tmp_path / "other")[f"model.layers.{i}.mlp.gate.0.weight"], router)


# ------------------------------------------------------------------------------------------- training


def test_shared_experts_without_width(tmp_path):
    """A Qwen2-MoE that says 0: its gate has a tensor, and nothing to gate."""
    fields = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8}
    config = Qwen2MoeConfig(
        vocab_size=99, hidden_size=32, moe_intermediate_size=24, shared_expert_intermediate_size=0, **fields
    )
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "chain")
    assert report["exact"] and load(tmp_path / "chain").config.shared_expert_width == 0
    assert not any("shared" in key for key in stored(tmp_path / "chain"))


def test_a_chain_in_the_fused_layout_goes_back(chains, sources, tmp_path):
    """As `save_original_format=False` writes it, scales under their name in memory."""
    chain = load(chains("mixtral", Options(mode="refine", iterations=2)))
    chain.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any(key.endswith("iteration_scale.weight") for key in stored(tmp_path / "fused"))
    assert convert(tmp_path / "fused", tmp_path / "back", Options(to="source"))["exact"]
    inputs = batches()[0]["input_ids"]
    with torch.no_grad():
        assert_equal_up_to_rounding(load(tmp_path / "back")(inputs).logits, load(sources("mixtral"))(inputs).logits)


@pytest.mark.parametrize("mode", ["refine", "split"])
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "qwen2_moe", "qwen3_moe", "olmoe", "mixtral"])
def test_converted_model_trains(sources, chains, tmp_path, name, mode):
    model = load(chains(name, Options(mode=mode, iterations=2))).train()
    inputs = batches()[0]["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(20):
        loss = model(inputs, labels=inputs).loss
        loss.backward()
        if step == 0:
            for key, parameter in model.named_parameters():
                if "iteration_scale" in key or ".mlp.gate." in key:
                    assert parameter.grad is not None and parameter.grad.any(), key
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    scales = [parameter for key, parameter in model.named_parameters() if key.endswith("iteration_scale.weight")]
    assert scales and all(scale.any() for scale in scales)
    with torch.no_grad():
        difference = model.eval()(inputs).logits - load(sources(name))(inputs).logits
    assert difference.abs().max() > 0.01
    model.save_pretrained(tmp_path / "trained")
    assert_refused(
        tmp_path / "trained", tmp_path / "back", "iteration_scale` is not zero", options=Options(to="source")
    )


# ------------------------------------------------------------------------------------------- published sources


def test_numbers_that_are_listed_for_every_layer(copied, tmp_path):
    source = copied("hunyuan_v1_moe")
    edit_json(source / "config.json", moe_topk=[4, 4], moe_intermediate_size=[48, 48])
    report = convert(source, tmp_path / "out", verify_tokens=8)
    assert AutoConfig.from_pretrained(tmp_path / "out").num_experts_per_tok == 2
    assert any("`moe_intermediate_size=[48, 48]`" in remark for remark in report["remarks"])
    edit_json(source / "config.json", moe_topk=[4, 2])
    assert_refused(source, tmp_path / "second", "`moe_topk` of the source is [4, 2]")


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("ernie4_5_moe", {"use_bias": True}, "`use_bias` of the source is True"),
        ("ernie4_5_moe", {"moe_norm_min": 0.5}, "`moe_norm_min` of the source is 0.5"),
        ("ernie4_5_moe", {"moe_k": 9}, "moe_k"),
        ("ernie4_5_moe", {"moe_k": 0}, "`moe_k` in config.json is 0"),
        ("ernie4_5_moe", {"moe_layer_interval": 0}, "`moe_layer_interval` in config.json is 0"),
        ("ernie4_5_moe", {"moe_num_experts": 10**9}, "`moe_num_experts` in config.json is 1000000000"),
        ("ernie4_5_moe", {"moe_layer_end_index": 0}, "`moe_layer_end_index=0`"),
        ("hy_v3", {"mlp_layer_types": ["sparse", "sparse"]}, "`mlp_layer_types=['sparse', 'sparse']`"),
        ("hunyuan_v1_moe", {"moe_topk": 0}, "moe_topk"),
        ("hunyuan_v1_moe", {"num_experts": [8, 8]}, "`num_experts` in config.json is [8, 8]"),
        ("granitemoe", {"residual_multiplier": 0.0}, "residual_multiplier"),
        ("granitemoe", {"logits_scaling": -1.0}, "logits_scaling"),
        ("granitemoe", {"embedding_multiplier": "12"}, "embedding_multiplier"),
        ("granitemoe", {"embedding_multiplier": None}, "embedding_multiplier"),
        ("granitemoe", {"attention_multiplier": 0}, "attention_multiplier"),
        ("hy_v3", {"router_scaling_factor": 0.0}, "router_scaling_factor"),
    ],
)
def test_values_of_newer_families_that_are_refused(copied, tmp_path, name, changes, message):
    source = copied(name)
    edit_json(source / "config.json", **changes)
    assert_refused(source, tmp_path / "out", message)


# ------------------------------------------------------------------------------------------- and back


@pytest.mark.parametrize("options", [CHAINS[0], CHAINS[1], CHAINS[4]], ids=chain_id)
@pytest.mark.parametrize("name", MOE_SOURCES)
def test_round_trip(sources, chains, tmp_path, name, options):
    if "-" in name and options.mode == "refine":
        pytest.skip("one configuration of a family will do")
    source = sources(name)
    report = convert(chains(name, options), tmp_path / "back", Options(to="source"), verify_tokens=4)
    card = ModelCard.load(tmp_path / "back" / "README.md")
    assert card.data.pipeline_tag == "text-generation" and "computes the same function" in card.text
    assert report["exact"] and report["verification"]["passed"]
    assert_same_tensors(source, tmp_path / "back")

    one, other = (AutoConfig.from_pretrained(folder) for folder in (source, tmp_path / "back"))
    assert type(one) is type(other)
    # Fields that nothing reads, in which the source may have been silent.
    unread = {"aux_loss_alpha", "seq_aux", "scoring_func", "moe_layer_freq", "max_window_layers"}
    unread |= {"num_nextn_predict_layers", "rotary_dim", "partial_rotary_factor", "_name_or_path"} | set(
        FAMILIES[one.model_type].required
    )
    unread |= {"head_dim"} if getattr(one, "head_dim", None) is None else set()
    unread |= {"norm_topk_prob"} if one.model_type == "deepseek_v2" else {"topk_method"}
    one, other = ({k: v for k, v in config.to_dict().items() if k not in unread} for config in (one, other))
    assert one == other


def assert_same_tensors(one: Path, other: Path) -> None:
    original, returned = stored(one), stored(other)
    assert original.keys() == returned.keys()
    for key in original:
        assert returned[key].dtype == original[key].dtype and torch.equal(returned[key], original[key]), key


def test_experts_of_their_own_do_not_go_back_into_one_tensor(tmp_path):
    fields = {"inner_iter": 1, "prenorm_residual": True, "norm_topk_prob": True, "n_shared_experts": None}
    model = tiny_model(backbone="granitemoe", intermediate_size=24, **fields)
    model.save_pretrained(tmp_path / "apart")
    options = Options(to="source")
    assert_refused(tmp_path / "apart", tmp_path / "back", "`--layout fused`", options=options)
    convert(tmp_path / "apart", tmp_path / "fused", Options(layout="fused"), verify_tokens=8)
    convert(tmp_path / "fused", tmp_path / "back", options, verify_tokens=8)
    assert AutoConfig.from_pretrained(tmp_path / "back").model_type == "granitemoe"


def test_whole_numbers_where_a_family_wants_fractions(chains, tmp_path):
    chain = Path(shutil.copytree(chains("olmoe", CHAINS[3]), tmp_path / "chain"))
    edit_json(chain / "config.json", aux_loss_alpha=0)
    convert(chain, tmp_path / "back", Options(to="source"), verify_tokens=8)
    assert AutoConfig.from_pretrained(tmp_path / "back").router_aux_loss_coef == 0


def test_routers_that_differ_do_not_go_back_from_split(chains, tmp_path):
    key = "model.layers.1.mlp.gate.1.weight"
    for mode in ("split", "refine"):
        shutil.copytree(chains("olmoe", Options(mode=mode, iterations=2)), tmp_path / mode)
        edit_tensor(tmp_path / mode, key, lambda weight: weight + 0.5)
    assert_refused(tmp_path / "split", tmp_path / "back", key, options=Options(to="source"))
    # The last router of `refine` is the only one that matters.
    convert(tmp_path / "refine", tmp_path / "back", Options(to="source"), verify_tokens=24)
    weight = stored(tmp_path / "back")["model.layers.1.mlp.gate.weight"]
    assert torch.equal(weight, stored(tmp_path / "refine")[key])


@pytest.mark.parametrize(
    ("name", "overrides", "model_type"),
    [
        ("llama", {"attention_bias": False}, "mixtral"),
        ("mistral", {}, "mixtral"),
        ("qwen3", {"use_sliding_window": False}, "qwen3_moe"),
    ],
)
def test_copies_of_dense_models_go_out_as_the_mixture_with_their_attention(
    sources, tmp_path, name, overrides, model_type
):
    source = sources(name, **overrides)
    convert(source, tmp_path / "chain", Options(upcycle="copy"), verify_tokens=4)
    convert(tmp_path / "chain", tmp_path / "back", Options(to="source"), verify_tokens=4)
    assert AutoConfig.from_pretrained(tmp_path / "back").model_type == model_type
    assert_same_function(source, tmp_path / "back")


@pytest.mark.parametrize(
    ("name", "upcycle", "wrong"),
    [
        ("llama", "slice", "`scoring_func=sigmoid` (`mixtral` means softmax)"),
        ("llama", "copy", "`attention_bias=True` (`mixtral` means False)"),
        ("qwen3", "copy", "`layer_types=['full_attention', 'sliding_attention']` (`qwen3_moe` means None)"),
    ],
)
def test_what_no_mixture_of_transformers_computes_does_not_go_back(sources, tmp_path, name, upcycle, wrong):
    convert(sources(name), tmp_path / "chain", Options(upcycle=upcycle), verify_tokens=4)
    assert_refused(tmp_path / "chain", tmp_path / "back", wrong, options=Options(to="source"))


def test_chains_that_no_family_computes_do_not_go_back(tmp_path):
    for fields, message in (
        ({"inner_iter": 1}, "'inner'"),
        ({"prenorm_residual": True}, "`inner_iter=2`"),
        ({"prenorm_residual": True, "inner_iter": 1, "norm_topk_prob": True}, "`norm_topk_prob=True`"),
    ):
        folder = tmp_path / "chain"
        tiny_model(**fields).save_pretrained(folder)
        assert_refused(folder, tmp_path / "back", message, options=Options(to="source"))
        shutil.rmtree(folder)


def test_official_layout(reference_folder, tmp_path):
    for case in sorted(reference_folder.glob("*/")):
        ours, official = tmp_path / case.name / "ours", tmp_path / case.name / "official"
        convert(case, ours, verify_tokens=24)
        convert(ours, official, Options(to="official"), verify_tokens=24)
        for folder, model_type in ((ours, "coe"), (official, "coe_deepseekv2")):
            tensors, expected = stored(folder), stored(case)
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[key], expected[key]) for key in tensors)
            assert json.loads((folder / "config.json").read_text())["model_type"] == model_type
        wanted = json.loads((case / "config.json").read_text())
        written = json.loads((official / "config.json").read_text())
        unread = {"transformers_version", "save_routing_logits"}
        assert {k: v for k, v in wanted.items() if k not in unread} == {
            k: v for k, v in written.items() if k in wanted
        }
        assert_refused(official, tmp_path / "again", "already", options=Options(to="official"))


@pytest.mark.parametrize(
    "fields",
    [{"prenorm_residual": True}, {"first_k_dense_replace": 1}, {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}],
)
def test_what_the_official_code_cannot_express_is_refused(tmp_path, fields):
    tiny_model(**fields).save_pretrained(tmp_path / "chain")
    assert_refused(tmp_path / "chain", tmp_path / "out", *fields, options=Options(to="official"))


def test_other_backbones_are_no_official_models(chains, tmp_path):
    chain = chains("olmoe", CHAINS[3])
    assert_refused(chain, tmp_path / "out", "backbone", "upcycling", options=Options(to="official"))
    assert_refused(chain, tmp_path / "out", "already")
    assert_refused(chain, tmp_path / "out", "--mode", options=Options(to="source", mode="refine"))


# ------------------------------------------------------------------------------------------- what is written


def test_result_is_complete(copied, tmp_path):
    source, out = copied("qwen3_moe"), tmp_path / "out"
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: theirs\nlanguage: [en]\n---\n# Source\n")
    report = convert(source, out, verify_tokens=24, max_shard_size="30KB")
    assert json.loads((out / "conversion_report.json").read_text()) == json.loads(json.dumps(report))
    assert report["verification"]["tokens"] == 24 and report["verification"]["text"] == "the package's text"

    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert {file.name for file in files} == set(index["weight_map"].values()) and len(files) > 5
    assert all(re.fullmatch(rf"model-\d{{5}}-of-{len(files):05d}.safetensors", file.name) for file in files)
    largest_tensor = max(tensor.nbytes for tensor in stored(out).values())
    assert all(file.stat().st_size < max(30_000, largest_tensor) + 20_000 for file in files)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(out).values())

    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    assert (
        AutoTokenizer.from_pretrained(out)("a b").input_ids == AutoTokenizer.from_pretrained(source)("a b").input_ids
    )
    assert load(out).generation_config.temperature == 0.6

    card = ModelCard.load(out / "README.md")
    assert card.data.license == "other" and "chain-of-experts" in card.data.tags
    assert card.data.language == ["en"] and card.data.license_name == "theirs"
    for text in ("`split`", "C=2", "K=2 of 8", source.name, "max abs difference", "argmax agreement"):
        assert text in card.content, text
    assert str(source.parent) not in card.content

    tensors = report["tensors"]
    assert tensors["source"] == len(stored(source)) == tensors["used"] + len(tensors["dropped"])
    assert tensors["written"] == len(stored(out))
    assert tensors["created"] == [f"model.layers.{i}.iteration_scale" for i in range(2)]
    assert set(tmp_path.iterdir()) == {source, out}


def test_result_loads_without_this_package(sources, tmp_path):
    convert(sources("qwen2_moe"), tmp_path / "out", verify_tokens=4)
    script = (
        "import sys, torch\n"
        "sys.path = [path for path in sys.path if path not in ('', sys.argv[2])]\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert 'modeling_coe' not in sys.modules and type(model).__module__.startswith('transformers_modules')\n"
        "torch.save(model(torch.arange(4, 20)[None]).logits, sys.argv[1] + '/logits.pt')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-P", "-c", script, str(tmp_path / "out"), str(ROOT)]
    run = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    expected = load(sources("qwen2_moe"))(torch.arange(4, 20)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "out" / "logits.pt"), expected, rtol=1e-5, atol=1e-5)


def test_intended_losses_are_listed(copied, tmp_path):
    source = copied("deepseek_v3")
    extra = {
        "model.layers.2.mlp.experts.0.up_proj.weight": torch.ones(2, 2),
        "model.layers.2.enorm.weight": torch.ones(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    index = json.loads((source / "model.safetensors.index.json").read_text())
    save_file(extra, source / "extra.safetensors")
    edit_json(
        source / "model.safetensors.index.json",
        weight_map=index["weight_map"] | dict.fromkeys(extra, "extra.safetensors"),
    )
    report = convert(source, tmp_path / "out", verify_tokens=8)
    assert report["tensors"]["dropped"].keys() == extra.keys()
    assert report["tensors"]["used"] == len(index["weight_map"])


@pytest.mark.parametrize("equal", [True, False])
def test_tied_head_that_is_stored(copied, tmp_path, equal):
    source = copied("deepseek_v2-groups-yarn")
    file = next(file for file in source.glob("*.safetensors") if "model.norm.weight" in load_file(file))
    head = stored(source)["model.embed_tokens.weight"].clone()
    if not equal:
        head[-1, -1] += 1
    save_file(load_file(file) | {"lm_head.weight": head}, file, {"format": "pt"})
    if equal:
        report = convert(source, tmp_path / "out", verify_tokens=8)
        assert report["tensors"]["dropped"].keys() == {"lm_head.weight"}
    else:
        assert_refused(source, tmp_path / "out", "tie_word_embeddings", "lm_head.weight")


def test_source_on_the_hub(sources, tmp_path, monkeypatch):
    def download(name, revision, allow_patterns):
        assert name == "someone/model" and "*.safetensors" not in allow_patterns
        return str(sources("olmoe"))

    monkeypatch.setattr("conversion.source.snapshot_download", download)
    report = convert("someone/model", tmp_path / "out", verify_tokens=4)
    assert report["source"]["name"] == "someone/model"
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == ["someone/model"]


def test_push(sources, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **kwargs: calls.append(("create", name)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **kwargs: calls.append(("upload", kwargs)))
    convert(sources("olmoe"), tmp_path / "out", verify_tokens=4, push="someone/model")
    assert calls == [
        ("create", "someone/model"),
        ("upload", {"repo_id": "someone/model", "folder_path": tmp_path / "out"}),
    ]

    def fail(self, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(HfApi, "upload_folder", fail)
    with pytest.raises(ConversionError, match=r"complete in .*no network"):
        convert(sources("olmoe"), tmp_path / "second", verify_tokens=4, push="someone/model")
    assert (tmp_path / "second" / "config.json").exists()


# ------------------------------------------------------------------------------------------- verification


@pytest.mark.parametrize("name", [name for name in MOE_SOURCES if "-" not in name])
def test_a_wrong_table_is_caught(sources, tmp_path, monkeypatch, name):
    family = FAMILIES[name.partition("-")[0]]
    up, gate = "mlp.experts.*.up_proj.weight", "mlp.experts.*.gate_proj.weight"
    if family.fuses_experts:  # the two are one tensor
        up, gate = "input_layernorm.weight", "post_attention_layernorm.weight"
    names = {chain: source for source, chain in family.keys.items()}
    swapped = {**family.keys, names.get(up, up): gate, names.get(gate, gate): up}
    monkeypatch.setitem(FAMILIES, family.model_type, dataclasses.replace(family, keys=swapped))
    assert_refused(sources(name), tmp_path / "out", "Verification failed", "argmax agreement")


def test_tolerance_decides(sources, tmp_path):
    source = sources("mixtral")
    assert_refused(source, tmp_path / "out", "tolerance -1.00e+00", tolerance=-1.0)
    assert convert(source, tmp_path / "out", verify_tokens=8, tolerance=1.0)["verification"]["tolerance"] == 1.0


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 600])
def test_any_number_of_tokens(sources, tmp_path, tokens):
    report = convert(sources("olmoe"), tmp_path / "out", verify_tokens=tokens)
    assert report["verification"]["tokens"] == tokens


def test_text_to_verify_on(sources, copied, tmp_path):
    report = convert(sources("olmoe"), tmp_path / "a", verify_tokens=8, verify_text="xyz")
    assert report["verification"]["text"] == "the given text"
    assert_refused(sources("olmoe"), tmp_path / "out", "no tokens", verify_text="")
    source = copied("olmoe")
    for file in source.glob("tokenizer*"):
        file.unlink()
    report = convert(source, tmp_path / "b", verify_tokens=8)
    assert "random ids" in report["verification"]["text"]
    assert_refused(source, tmp_path / "out", "no tokenizer", verify_text="xyz")


@torch.no_grad()
def assert_computes_what_transformers_loads(source: Path, result: Path) -> None:
    one, other = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (source, result))
    inputs = batches()[0]
    torch.testing.assert_close(other(**inputs).logits, one(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["tensors", "files", "config", "result"])
def test_verification_is_independent_of_how_the_conversion_reads(copied, sources, tmp_path, monkeypatch, what):
    """Whatever the conversion reads wrongly, transformers reads rightly, and the two differ."""
    source = copied("olmoe")
    if what == "tensors":
        read = Checkpoint.read
        monkeypatch.setattr(Checkpoint, "read", lambda self, key: read(self, key.replace("layers.1.", "layers.0.")))
    elif what == "files":
        stale = make_source(tmp_path / "stale", "olmoe", seed=7)
        resolve = checkpoint._get_resolved_checkpoint_files
        monkeypatch.setattr(
            checkpoint, "_get_resolved_checkpoint_files", lambda _, **kwargs: resolve(str(stale), **kwargs)
        )
    elif what == "config":
        read_json = checkpoint.read_json
        monkeypatch.setattr(checkpoint, "read_json", lambda path: read_json(path) | {"clip_qkv": 0.01})
    else:
        write = converter.write_shard

        def write_others(folder, shard, tensors):
            write(folder, shard, ((name, tensor.flip(0)) for name, tensor in tensors))

        monkeypatch.setattr(converter, "write_shard", write_others)
    assert_refused(source, tmp_path / "out", "Verification failed", "argmax agreement")


# ------------------------------------------------------------------------------------------- which files are read


@pytest.fixture
def stale(copied, tmp_path):
    """A source, and the files of another save of it."""
    return copied("olmoe"), make_source(tmp_path / "stale", "olmoe", seed=7)


def merge_shards(source: Path, file: str = "model.safetensors") -> None:
    tensors = stored(source)
    for shard in source.glob("model*"):
        shard.unlink()
    save_file(tensors, source / file, {"format": "pt"})


def test_single_file_comes_before_an_index(stale, tmp_path):
    source, other = stale
    merge_shards(source)
    for file in other.glob("model*"):
        shutil.copy(file, source)
    convert(source, tmp_path / "out", verify_tokens=8)
    assert_computes_what_transformers_loads(source, tmp_path / "out")


def test_files_that_are_not_read(stale, tmp_path):
    """Shards of an older save, another variant, another format."""
    source, other = stale
    merge_shards(other)
    for name in ("model-00009-of-00009.safetensors", "model.fp16.safetensors", "adapter_model.safetensors"):
        shutil.copy(other / "model.safetensors", source / name)
    (source / "pytorch_model.bin").write_bytes(b"")
    convert(source, tmp_path / "out", verify_tokens=8)
    assert_computes_what_transformers_loads(source, tmp_path / "out")


@pytest.mark.parametrize("file", ["newer.safetensors", "newer.safetensors.index.json"])
def test_config_names_the_file(stale, tmp_path, file):
    source, other = stale
    if file.endswith(".json"):
        (source / "model.safetensors.index.json").rename(source / file)
    else:
        merge_shards(source, file)
    merge_shards(other)
    shutil.copy(other / "model.safetensors", source)
    edit_json(source / "config.json", transformers_weights=file)
    for name, folder in (("out", source), ("back", tmp_path / "out")):
        options = Options(to="source" if name == "back" else "coe")
        convert(folder, tmp_path / name, options, verify_tokens=8)
        assert "transformers_weights" not in json.loads((tmp_path / name / "config.json").read_text())
        assert_computes_what_transformers_loads(source, tmp_path / name)


def test_config_of_a_chain_names_the_file(chains, tmp_path):
    chain = Path(shutil.copytree(chains("olmoe", CHAINS[3]), tmp_path / "chain"))
    merge_shards(chain, "newer.safetensors")
    edit_json(chain / "config.json", transformers_weights="newer.safetensors")
    convert(chain, tmp_path / "back", Options(to="source"), verify_tokens=8)
    assert_computes_what_transformers_loads(chain, tmp_path / "back")


def test_index_that_is_not_quite_right(stale, tmp_path):
    """transformers reads all tensors of all files that are listed, wherever they lie."""
    source, _ = stale
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    moved = sorted(set(index.values()))[0]
    (tmp_path / "elsewhere").mkdir()
    (source / moved).rename(tmp_path / "elsewhere" / moved)
    index = {key: f"../elsewhere/{file}" if file == moved else file for key, file in index.items()}
    index["model.norm.weight"] = index["model.embed_tokens.weight"]
    del index["lm_head.weight"]
    edit_json(source / "model.safetensors.index.json", weight_map=index)
    convert(source, tmp_path / "out", verify_tokens=8)
    assert_computes_what_transformers_loads(source, tmp_path / "out")


# ------------------------------------------------------------------------------------------- odd sources


@pytest.mark.parametrize("pad", [-1, -100, None, 99])
def test_padding_ids_that_run_in_transformers(copied, tmp_path, pad):
    """Negative ones count from the end of the vocabulary."""
    source = copied("mixtral")
    edit_json(source / "config.json", pad_token_id=pad)
    convert(source, tmp_path / "out", verify_tokens=8)
    assert_computes_what_transformers_loads(source, tmp_path / "out")
    model = load(tmp_path / "out")
    assert model.config.pad_token_id == pad
    assert model.model.embed_tokens.padding_idx == load(source).model.embed_tokens.padding_idx
    model.save_pretrained(tmp_path / "saved")
    assert_computes_what_transformers_loads(source, tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "back", Options(to="source"), verify_tokens=8)
    assert AutoConfig.from_pretrained(tmp_path / "back").pad_token_id == pad
    assert_same_tensors(source, tmp_path / "back")


@pytest.mark.parametrize("changes", [{"eos_token_id": 5000}, {"bos_token_id": -1}, {"eos_token_id": [2, 3]}])
def test_other_ids_are_kept(copied, tmp_path, changes):
    """transformers' models do not read them."""
    source = copied("mixtral")
    edit_json(source / "config.json", **changes)
    convert(source, tmp_path / "out", verify_tokens=8)
    assert_computes_what_transformers_loads(source, tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert {name: getattr(config, name) for name in changes} == changes


def test_folders_as_they_come(copied, tmp_path):
    """Links into a cache, folders of licences, a card in another encoding."""
    source = copied("olmoe")
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(Path("..", "blobs", str(number)))
    (source / "LICENSES").mkdir()
    (source / "chat_template.d").mkdir()
    (source / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    convert(source, tmp_path / "out", verify_tokens=8)
    assert_computes_what_transformers_loads(source, tmp_path / "out")
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


def test_layers_that_predict_further_tokens_must_be_counted(copied, tmp_path):
    source = copied("deepseek_v3")
    file = next(iter(source.glob("*.safetensors")))
    save_file(load_file(file) | {"model.layers.2.enorm.weight": torch.ones(2)}, file, {"format": "pt"})
    for count in (0, None):
        edit_json(source / "config.json", num_nextn_predict_layers=count)
        assert_refused(source, tmp_path / "out", f"`num_nextn_predict_layers={count}`", "model.layers.2.enorm.weight")
    edit_json(source / "config.json", num_nextn_predict_layers=1)
    assert convert(source, tmp_path / "out", verify_tokens=8)["tensors"]["dropped"].keys() == {
        "model.layers.2.enorm.weight"
    }


def test_further_tokens_are_predicted_by_parts_with_a_name(copied, tmp_path):
    source = copied("ernie4_5_moe")
    file = next(iter(source.glob("*.safetensors")))
    key = "model.mtp_emb_norm.0.weight"
    save_file(load_file(file) | {key: torch.ones(32)}, file, {"format": "pt"})
    assert convert(source, tmp_path / "out", verify_tokens=8)["tensors"]["dropped"].keys() == {key}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_tensor_is_not_finite(copied, tmp_path, value):
    source = copied(dtype=torch.bfloat16)
    key = "model.layers.1.mlp.experts.2.up_proj.weight"
    edit_tensor(source, key, lambda weight: weight.index_fill(0, torch.tensor([3]), value))
    assert_refused(source, tmp_path / "out", key, "NaN or infinity")


def test_dtype_cannot_hold_a_value(copied, tmp_path):
    source = copied()
    edit_tensor(source, "model.norm.weight", lambda weight: weight + 70000)
    assert_refused(source, tmp_path / "out", "model.norm.weight", "float16", options=Options(dtype=torch.float16))


def test_config_fields_are_understood_or_refused(copied, tmp_path):
    source = copied("mixtral")
    edit_json(source / "config.json", layer_types=["full_attention"] * 2)
    assert_refused(source, tmp_path / "out", "`layer_types=[", "--ignore-fields")
    options = Options(ignored_fields=("layer_types",))
    report = convert(source, tmp_path / "ignored", options, verify_tokens=8)
    assert any("layer_types" in remark and "to be ignored" in remark for remark in report["remarks"])
    edit_json(source / "config.json", layer_types=..., torch_dtype="float32", router_jitter_noise=0.1)
    # Neither Mixtral nor what all models share has such a word.
    edit_json(source / "config.json", unk_token_id=0, attention_sinks=4, **{"transformers.js_config": {"dtype": "q4"}})
    report = convert(source, tmp_path / "out", verify_tokens=8)
    for name in ("router_jitter_noise", "unk_token_id", "attention_sinks", "transformers.js_config"):
        assert any(f"`{name}=" in remark for remark in report["remarks"])


def test_fields_that_transformers_does_not_read_must_say_what_it_does(copied, tmp_path):
    source = copied("deepseek_v3")
    edit_json(source / "config.json", scoring_func="softmax")
    assert_refused(source, tmp_path / "out", "`scoring_func`", "'softmax'", "'sigmoid'")
    edit_json(source / "config.json", scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1, ep_size=1)
    convert(source, tmp_path / "out", verify_tokens=8)


def test_fewer_experts_per_token_than_iterations(sources, tmp_path):
    source = sources("mixtral", num_experts_per_tok=1)
    assert_refused(source, tmp_path / "out", "1 experts", "--mode refine")
    convert(source, tmp_path / "out", Options(mode="refine"), verify_tokens=8)
    assert_same_function(source, tmp_path / "out")


# ------------------------------------------------------------------------------------------- OUT


def test_out_must_be_new(sources, copied, tmp_path):
    source, out = copied("olmoe"), tmp_path / "out"
    for wrong in (source, source / "inside", source.parent):
        assert_refused(source, wrong, "lie in each other", overwrite=True)
    out.mkdir()
    assert_refused(source, out, "exists")
    (out / "thesis.txt").write_text("")
    assert_refused(source, out, "no folder of a model", overwrite=True)
    (out / "thesis.txt").unlink()
    make_model(make_config("mixtral")).save_pretrained(out)

    edit_tensor(source, "model.norm.weight", lambda weight: weight * float("nan"))
    assert_refused(source, out, "model.norm.weight", overwrite=True)
    assert AutoConfig.from_pretrained(out).model_type == "mixtral"
    convert(sources("olmoe"), out, verify_tokens=8, overwrite=True)
    assert AutoConfig.from_pretrained(out).model_type == "coe"
    assert {file.name for file in tmp_path.iterdir()} == {"out", "damaged"}


def test_source_is_not_touched(sources, tmp_path):
    source = sources("deepseek_v2")
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in source.iterdir()}
    convert(source, tmp_path / "out", verify_tokens=8)
    assert before == {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in source.iterdir()}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_is_full(sources, tmp_path, monkeypatch, code):
    write, count = converter.write_shard, iter(range(100))

    def fail(folder, *arguments):
        write(folder, *arguments)
        if next(count) == 2:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(converter, "write_shard", fail)
    assert_refused(sources("olmoe"), tmp_path / "out", "no room", os.strerror(code))


def test_disk_is_known_to_be_too_small(sources, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert_refused(sources("olmoe"), tmp_path / "out", "only 0.00 GB are free")


def test_file_size_limit(sources, tmp_path):
    """The system refuses to write, in the middle of a file."""
    source, limits = sources("olmoe"), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        assert_refused(source, tmp_path / "out", "no room", os.strerror(errno.EFBIG))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_killed_run_leaves_nothing_that_counts(sources, tmp_path):
    source, out = sources("olmoe"), tmp_path / "out"
    before = stored(source)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Enough to verify for the test to find it at work.
    command = [sys.executable, "-m", "conversion", str(source), str(out), "--verify", "20000"]
    process = subprocess.Popen(command, env=environment)
    try:
        while not (remains := list(tmp_path.iterdir())) or not any(remains[0].iterdir()):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        assert str(process.pid) in remains[0].name
        # While it lives, others leave its folder alone.
        convert(source, out, verify_tokens=4)
        assert remains[0].exists()
        shutil.rmtree(out)
    finally:
        process.kill()
        process.wait()
    assert [file.name for file in tmp_path.iterdir()] == [remains[0].name]
    assert all(torch.equal(tensor, before[key]) for key, tensor in stored(source).items())
    convert(source, out, verify_tokens=4)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_killed_overwrite_is_put_right(sources, tmp_path):
    """A run was killed between moving the old folder away and moving the new one in."""
    out = tmp_path / "out"
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    old = tmp_path / f".out.{os.uname().nodename}.{dead.stdout.strip()}.replaced"
    make_model(make_config("mixtral")).save_pretrained(old)
    with pytest.raises(ConversionError, match="tolerance"):
        convert(sources("olmoe"), out, verify_tokens=4, tolerance=-1.0)
    assert not old.exists()
    assert AutoConfig.from_pretrained(out).model_type == "mixtral"


# ------------------------------------------------------------------------------------------- command line


def test_command_line(sources, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--mode", "refine", "--iterations", "4", "--layers", "1-1", "--dtype", "bf16", "--verify", "16"]
    assert main([str(sources("olmoe")), str(out), *arguments]) == 0
    printed = capsys.readouterr()
    for text in ("exact", "verified on 16 tokens", "largest difference", "argmax agreement", str(out)):
        assert text in printed.out
    config = AutoConfig.from_pretrained(out)
    assert (config.upcycling, config.inner_iter, config.chain_layers, config.dtype) == (
        "refine",
        4,
        [1],
        torch.bfloat16,
    )
    assert main([str(sources("olmoe")), str(out)]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("coe-convert: ") and "exists" in printed.err and "Traceback" not in printed.err


def test_fault_of_our_own_is_one_line(sources, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise KeyError("lost")

    monkeypatch.setattr(converter, "plan_conversion", fail)
    assert main([str(sources("olmoe")), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("coe-convert: ") and error.count("\n") == 1
    for text in ("KeyError: 'lost'", "in fail, line ", "test_conversion.py", "report"):
        assert text in error


def test_module_runs(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["conversion", str(sources("qwen2_moe")), str(tmp_path / "out"), "--verify", "8"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("conversion", run_name="__main__")
    assert not caught.value.code and "verified on 8 tokens" in capsys.readouterr().out
    assert (tmp_path / "out" / "config.json").exists()


def test_dry_run(sources, tmp_path, capsys):
    source = sources("mixtral")
    assert main([str(source), str(tmp_path / "out"), "--mode", "refine", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "exact at the start" in printed
    pattern = "model.layers.*.block_sparse_moe.experts.*.w1.weight -> model.layers.*.mlp.experts.*.gate_proj.weight"
    assert re.search(rf"^ +16  {re.escape(pattern)}", printed, re.MULTILINE)
    assert "(new) -> model.layers.*.iteration_scale" in printed
    assert not list(tmp_path.iterdir())

    before, after = re.search(r"flops per token +([\d,]+) +([\d,]+)", printed).groups()
    model = load(source)
    experts = 2 * 3 * 32 * 48 * 4
    other = sum(p.numel() for k, p in model.named_parameters() if "experts" not in k and "embed" not in k)
    assert int(before.replace(",", "")) == 2 * (other + experts)
    assert int(after.replace(",", "")) == 2 * (other + 2 * experts + 2 * 32 + 2 * 8 * 32)
    total = re.search(r"total parameters +([\d,]+)", printed)[1]
    assert int(total.replace(",", "")) == model.num_parameters()

    assert main([str(sources("olmoe")), str(tmp_path / "out"), "--router-noise", "0.1", "--dry-run"]) == 0
    assert "NOT exact" in capsys.readouterr().out


def test_plan_reads_no_weights(copied):
    """A plan needs the headers alone, so a value that is not finite does not show in it."""
    source = copied()
    edit_tensor(source, "model.norm.weight", lambda weight: weight * float("nan"))
    assert "exact" in describe(plan_conversion(source, Options()))
