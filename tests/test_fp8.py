"""Sources in block-scaled FP8: what their weights stand for, and that chains compute what transformers does."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config

from conversion import ConversionError, Options, convert, describe, plan_conversion
from conversion.fp8 import BlockScaling

from .conversion_sources import dequantized, edit_json, edit_tensor, make_source, quantize, stored
from .helpers import random_ids


# Sizes of the tiny sources are multiples of 4, so that transformers can load them itself, and not all of 10 and 16.
WHOLE, CUT_OFF = (4, 4), (10, 16)
NAMES = ["deepseek_v3", "glm4_moe", "minimax_m2", "qwen3_moe"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders of sources by their names and blocks, each made when it is first asked for."""
    root = tmp_path_factory.mktemp("fp8")

    def source(name: str, block: tuple[int, int] = WHOLE) -> Path:
        folder = root / f"{name}-{block}"
        if not folder.exists():
            quantize(make_source(folder, name, dtype=torch.bfloat16), block)
        return folder

    return source


def load_dequantized(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """As transformers loads it, to compute in float32."""
    fp8 = FineGrainedFP8Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=fp8).float()


@pytest.mark.parametrize("options", [Options(iterations=2), Options(iterations=4), Options(mode="refine")], ids=str)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_equal_those_of_transformers(sources, tmp_path, name, options):
    report = convert(sources(name), tmp_path / "out", options, verify_tokens=24)
    assert report["exact"] and report["verification"]["passed"]
    ids = random_ids(2, 12)
    expected = load_dequantized(sources(name), torch.bfloat16)(ids).logits
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [WHOLE, CUT_OFF, (128, 128), (1, 1)])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_tensors_are_what_they_stand_for(sources, tmp_path, dtype, block):
    """Rounded once, to the dtype of the configuration by default."""
    source = sources("deepseek_v3", block)
    report = convert(source, tmp_path / "out", Options(mode="identity", dtype=dtype), verify_tokens=8)
    assert report["verification"]["passed"]
    expected, actual = dequantized(source, block), stored(tmp_path / "out")
    in_fp8 = [key for key, tensor in expected.items() if tensor.dtype == torch.float64]
    assert len(in_fp8) == report["source"]["dequantized"]["tensors"] == 40
    for key in in_fp8:
        assert actual[key].dtype == (dtype or torch.bfloat16)
        assert torch.equal(actual[key], expected[key].float().to(actual[key].dtype)), key
    assert report["source"]["dequantized"] == {
        "quant_method": "fp8",
        "tensors": 40,
        "weight_block_size": list(block),
        "dtype": str(dtype or torch.bfloat16),
    }
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == (dtype or torch.bfloat16)
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "out"), "quantization_config")


def test_dry_run_says_what_becomes_of_them(sources):
    plan = plan_conversion(sources("deepseek_v3"), Options())
    assert "40 weights of the source are in FP8, scaled by blocks of 4 x 4. They become torch.bfloat16." in describe(
        plan
    )
    before = sum(file.stat().st_size for file in sources("deepseek_v3").glob("*.safetensors"))
    assert plan.checkpoint.nbytes < before < plan.checkpoint.nbytes + 60_000  # headers
    assert plan.nbytes > plan.checkpoint.nbytes == sum(map(plan.checkpoint.nbytes_of, plan.checkpoint.tensors))


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_what_transformers_dequantises(sources, tmp_path, name):
    convert(sources(name), tmp_path / "chain", verify_tokens=8)
    convert(tmp_path / "chain", tmp_path / "back", Options(to="source"), verify_tokens=8)
    one, other = (
        load_dequantized(sources(name), torch.bfloat16),
        AutoModelForCausalLM.from_pretrained(tmp_path / "back"),
    )
    assert other.dtype == torch.bfloat16
    for key, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[key].float(), tensor), key


def test_scales_in_other_dtypes_and_in_the_same_file(sources, tmp_path):
    source = Path(shutil.copytree(sources("qwen3_moe"), tmp_path / "source"))
    tensors = {key: value for file in source.glob("*.safetensors") for key, value in load_file(file).items()}
    tensors |= {key: value.bfloat16() for key, value in tensors.items() if key.endswith("_scale_inv")}
    for file in source.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "out", Options(mode="identity", dtype=torch.float32), verify_tokens=8)
    expected = dequantized(source)
    for key, tensor in stored(tmp_path / "out").items():
        if "gate" not in key.split(".")[-3:]:
            assert torch.equal(tensor, expected[key].float()), key


def test_tied_head_in_fp8(tmp_path):
    source = make_source(tmp_path / "source", "qwen3_moe-window")
    key, head = "model.embed_tokens.weight", "lm_head.weight"
    file = next(file for file in source.glob("*.safetensors") if key in load_file(file))
    save_file(load_file(file) | {head: load_file(file)[key].clone()}, file, {"format": "pt"})
    quantize(source, pattern="lm_head|embed_tokens")
    assert head in plan_conversion(source, Options()).dropped
    edit_tensor(source, f"{head}_scale_inv", lambda scales: 2 * scales)
    with pytest.raises(ConversionError, match="tie_word_embeddings"):
        plan_conversion(source, Options())


def test_layers_that_predict_further_tokens_are_dropped(sources, tmp_path):
    """In FP8, as DeepSeek-V3 is published: scales go with their weights."""
    source = Path(shutil.copytree(sources("deepseek_v3"), tmp_path / "source"))
    file = sorted(source.glob("*.safetensors"))[0]
    extra = {"model.layers.2.eh_proj.weight": torch.ones(32, 64).to(torch.float8_e4m3fn)}
    save_file(
        load_file(file) | extra | {"model.layers.2.eh_proj.weight_scale_inv": torch.ones(8, 16)},
        file,
        {"format": "pt"},
    )
    edit_json(source / "config.json", num_nextn_predict_layers=1)
    report = convert(source, tmp_path / "out", verify_tokens=8)
    assert report["tensors"]["dropped"].keys() == extra.keys()


def test_dense_source(tmp_path):
    source = make_source(tmp_path / "source", "llama")
    quantize(source)
    for upcycle in ("copy", "slice"):
        assert convert(source, tmp_path / upcycle, Options(upcycle=upcycle, experts=4), verify_tokens=8)["exact"]


def test_verification_does_not_depend_on_how_the_conversion_dequantises(sources, tmp_path, monkeypatch):
    """Wherever a block is cut off, too."""
    whole = BlockScaling.dequantize

    def shift(self, weight, scales):
        return whole(self, weight, scales.roll(1, 0))

    monkeypatch.setattr(BlockScaling, "dequantize", shift)
    for block in (WHOLE, CUT_OFF):
        with pytest.raises(ConversionError, match="Verification failed"):
            convert(sources("deepseek_v3", block), tmp_path / "out", verify_tokens=24)


def test_accelerate_is_asked_for(sources, monkeypatch):
    monkeypatch.setattr("conversion.fp8.is_accelerate_available", lambda: False)
    with pytest.raises(ConversionError, match="pip install accelerate"):
        plan_conversion(sources("deepseek_v3"), Options())


def test_kimi_k2(sources, tmp_path):
    """As it is published: FP8 and a type that transformers does not know."""
    source = Path(shutil.copytree(sources("deepseek_v3", CUT_OFF), tmp_path / "source"))
    remote_code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    edit_json(source / "config.json", model_type="kimi_k2", auto_map=remote_code)
    report = convert(source, tmp_path / "out", verify_tokens=24)
    assert report["source"]["model_type"] == "kimi_k2" and report["verification"]["passed"]
    convert(sources("deepseek_v3", CUT_OFF), tmp_path / "same", verify_tokens=24)
    tensors = stored(tmp_path / "same")
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in stored(tmp_path / "out").items())
