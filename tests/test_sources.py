"""Conversion of sources that are no plain folder: GGUF files, adapters, revisions of a repository, read-only disks."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

from conversion import ConversionError, Options, convert
from conversion.cli import main

from .conversion_sources import VOCABULARY, edit_json, make_source, save_tokenizer


INPUT_IDS = torch.randint(4, 99, (2, 12), generator=torch.Generator().manual_seed(1))
SLICED = Options(upcycle="slice")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.float().eval()(INPUT_IDS).logits


def assert_refused(source: Path | str, out: Path, *messages: str, **kwargs) -> None:
    """The conversion raises with all of `messages`, and beside `out` nothing is left."""
    before = set(out.parent.rglob("*"))
    with pytest.raises(ConversionError) as caught:
        convert(source, out, SLICED, verify_tokens=8, **kwargs)
    for message in messages:
        assert message in str(caught.value)
    assert set(out.parent.rglob("*")) == before


# ------------------------------------------------------------------------------------------------------ GGUF files


def write_gguf(file: Path, model: LlamaForCausalLM, quantised: bool, with_tokenizer: bool) -> None:
    """A GGUF file as llama.cpp's converter lays it out: its names, and rows of queries and keys in its order."""
    gguf = pytest.importorskip("gguf", reason="writing GGUF files needs gguf")
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if with_tokenizer:
        writer.add_tokenizer_model("gpt2")
        tokens = [token.replace(" ", "Ġ").replace("\n", "Ċ") for token in VOCABULARY[:-1]]
        writer.add_token_list([*tokens, "ab"])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(0)

    def interleaved(weight: np.ndarray, count: int) -> np.ndarray:
        return weight.reshape(count, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            weight = interleaved(weight, heads if "q_proj" in name else kv_heads)
        target = names.get_name(name, try_suffixes=(".weight",))
        if quantised and weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(target, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("with_tokenizer", [False, True], ids=["tokenizer beside", "tokenizer inside"])
@pytest.mark.parametrize("quantised", [False, True], ids=["float32", "Q8_0"])
def test_gguf_file(llama, tmp_path, quantised, with_tokenizer):
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate")
    folder = tmp_path / "gguf"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf", llama, quantised, with_tokenizer)
    if not with_tokenizer:
        save_tokenizer(folder)
    (folder / "LICENSE").write_text("free")
    source, options = (folder / "tiny.gguf", {}) if with_tokenizer else (folder, {"gguf_file": "tiny.gguf"})
    report = convert(source, tmp_path / "out", SLICED, verify_tokens=24, **options)
    assert report["exact"] and report["source"]["gguf_file"] == "tiny.gguf"
    assert "dequantised to float32" in report["remarks"][0]
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    dequantised = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="tiny.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    torch.testing.assert_close(logits(result), logits(dequantised), rtol=1e-5, atol=1e-5)
    if not quantised:
        torch.testing.assert_close(logits(result), logits(llama), rtol=1e-5, atol=1e-5)
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("b c")["input_ids"]
    assert ids == [VOCABULARY.index(character) for character in "b c"]
    # What lies beside a file that was named itself may be another model's.
    assert (tmp_path / "out" / "LICENSE").exists() == (not with_tokenizer)
    assert {file.name for file in tmp_path.iterdir()} == {"gguf", "out"}


def test_gguf_files_of_a_folder_have_to_be_named(llama, tmp_path):
    folder = make_source(tmp_path / "source", "llama")
    write_gguf(folder / "tiny.gguf", llama, quantised=False, with_tokenizer=False)
    convert(folder, tmp_path / "weights", SLICED, verify_tokens=8)
    convert(folder, tmp_path / "gguf", SLICED, verify_tokens=8, gguf_file="tiny.gguf")
    widths = [AutoModelForCausalLM.from_pretrained(tmp_path / name).config.hidden_size for name in ("weights", "gguf")]
    assert widths == [32, 64]
    assert_refused(folder, tmp_path / "out", "no other.gguf in", gguf_file="other.gguf")
    assert_refused(folder, tmp_path / "out", "`--merge-adapter`", gguf_file="tiny.gguf", merge_adapter=True)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    assert_refused(folder, tmp_path / "out", "--gguf-file tiny.gguf")


def test_gguf_file_that_cannot_be_read(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    assert_refused(tmp_path / "broken.gguf", tmp_path / "out", "broken.gguf")
    assert_refused(tmp_path / "missing.gguf", tmp_path / "out", "neither a folder, nor a GGUF file")


# -------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture
def adapted(tmp_path):
    """A base model, a folder with it and an adapter beside it, one with the adapter alone, and the logits of both
    together as PEFT computes them without merging."""
    peft = pytest.importorskip("peft", reason="adapters need PEFT")
    base = make_source(tmp_path / "base", "llama")
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(
        r=2,
        init_lora_weights=False,
        target_modules=["q_proj", "down_proj"],
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config)
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(1.5)
    alone, beside = tmp_path / "alone", Path(shutil.copytree(base, tmp_path / "beside"))
    model.save_pretrained(alone)
    model.save_pretrained(beside)
    edit_json(beside / "adapter_config.json", base_model_name_or_path="someone/elsewhere")
    return base, beside, alone, logits(model)


@pytest.mark.parametrize("which", ["beside", "alone"])
def test_adapter_is_merged_on_request(adapted, tmp_path, which):
    base, beside, alone, expected = adapted
    folder = {"beside": beside, "alone": alone}[which]
    before = {file: file.read_bytes() for file in folder.iterdir()}
    report = convert(folder, tmp_path / "out", SLICED, verify_tokens=24, merge_adapter=True)
    assert "merged into" in report["remarks"][0]
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    actual = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab")["input_ids"]
    assert not list(tmp_path.glob(".*"))


def test_adapter_of_a_chain_is_merged_and_goes_back(tmp_path):
    peft = pytest.importorskip("peft", reason="adapters need PEFT")
    source = make_source(tmp_path / "source", "qwen3_moe")
    convert(source, tmp_path / "chain", Options(mode="refine"), verify_tokens=8)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2,
        init_lora_weights=False,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "chain"), config)
    model.save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "out", Options(to="source"), verify_tokens=8, merge_adapter=True)
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert result.config.model_type == "qwen3_moe"
    torch.testing.assert_close(logits(result), logits(model), rtol=1e-4, atol=1e-4)


def test_adapter_that_does_not_fit_or_has_no_base_is_refused(adapted, tmp_path):
    _, beside, alone, _ = adapted
    assert_refused(beside, tmp_path / "out", "`--merge-adapter`")
    edit_json(alone / "adapter_config.json", base_model_name_or_path=str(make_source(tmp_path / "other", "qwen3_moe")))
    assert_refused(alone, tmp_path / "out", "the adapter of alone", merge_adapter=True)
    edit_json(alone / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"), target_modules=["q_proj"])
    assert_refused(alone, tmp_path / "out", "does not fit its base model base", "down_proj", merge_adapter=True)
    edit_json(alone / "adapter_config.json", base_model_name_or_path=None)
    assert_refused(alone, tmp_path / "out", "`base_model_name_or_path`", "None", merge_adapter=True)
    (alone / "adapter_config.json").unlink()
    assert_refused(alone, tmp_path / "out", "no adapter_config.json", merge_adapter=True)


# ------------------------------------------------------------------------------------------------ folders, messages


def test_sharded_folder_that_nobody_may_write_to(tmp_path):
    source = make_source(tmp_path / "source", "mixtral")
    assert len(list(source.glob("*.safetensors"))) > 1
    for file in source.iterdir():
        file.chmod(0o444)
    source.chmod(0o555)
    try:
        convert(source, tmp_path / "out", verify_tokens=8)
    finally:
        source.chmod(0o755)
    (tmp_path / "out" / "config.json").write_text("what is carried over may be written to")


def test_weights_of_pickles_are_refused_with_the_way_to_make_safetensors(tmp_path):
    source = make_source(tmp_path / "source", "llama")
    for file in source.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, source / "pytorch_model.bin")
    assert_refused(source, tmp_path / "out", "pytorch_model.bin", f"M.from_pretrained('{source}', dtype='auto').save")


def test_revisions_are_of_the_hub(tmp_path):
    assert_refused(make_source(tmp_path / "source", "llama"), tmp_path / "out", "`--revision v1`", revision="v1")


def test_families_are_listed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--list"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in ("deepseek_v3", "kimi_k2", "predicts further tokens", "--upcycle"):
        assert part in text
