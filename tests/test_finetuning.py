"""`examples/finetune_lora.py` and `examples/sft.py`: what they train, save and report, and resuming."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import finetune_lora
import pretrain
import pytest
import sft
import torch
from huggingface_hub import ModelCard
from peft import LoraModel, PeftModel
from recipe import adapter
from recipe.corpus import load_corpus, load_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modeling_coe import CoeConfig, CoeForCausalLM

from .test_pretrain import TINY_RUN, finish, has_checkpoint, losses, start_script, write_rows


SCRIPTS = {"finetune_lora": finetune_lora, "sft": sft}
RUN = {
    "finetune_lora": [*("--block-size", "32", "--eval-blocks", "4", "--r", "4", "--expert-r", "2")],
    "sft": [*("--max-length", "256", "--eval-examples", "4")],
}
SHORT = [
    *("--steps", "24", "--batch-size", "2", "--lr", "1e-2", "--warmup-steps", "2", "--log-steps", "1"),
    *("--eval-steps", "12", "--save-steps", "4", "--num-problems", "2", "--num-samples", "1"),
    *("--max-new-tokens", "8"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", 24)


@pytest.fixture(scope="module")
def base(tmp_path_factory, data) -> Path:
    """A model that was trained a little."""
    output_dir = tmp_path_factory.mktemp("base")
    pretrain.main(["--output-dir", str(output_dir), "--data", str(data), *TINY_RUN])
    return output_dir / "model"


def options(script: str, base: Path, output_dir: Path, data: Path) -> list[str]:
    return ["--model", str(base), "--output-dir", str(output_dir), "--data", str(data), *RUN[script], *SHORT]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base, data) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for script in SCRIPTS:
        finish(start_script(script, *options(script, base, folder / script, data)))
    return {name: folder / name for name in SCRIPTS}


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("script", SCRIPTS)
class TestBoth:
    def test_held_out_loss_falls(self, script, runs):
        table = results_of(runs[script])["held_out_loss"]["held_out"]
        assert table["trained"] < table["before"] - 0.05
        assert (runs[script] / "loss_curve.png").read_bytes().startswith(b"\x89PNG")

    def test_the_saved_model_is_the_trained_one(self, script, runs, base):
        model = AutoModelForCausalLM.from_pretrained(runs[script] / "model")
        assert AutoTokenizer.from_pretrained(runs[script] / "model").eos_token_id == model.config.eos_token_id
        trained = AutoModelForCausalLM.from_pretrained(base)
        assert not torch.allclose(logits(trained), logits(model), atol=1e-2)
        checkpoint = runs[script] / "checkpoint-24"
        if script == "finetune_lora":
            trained = PeftModel.from_pretrained(trained, checkpoint)
        else:
            trained = AutoModelForCausalLM.from_pretrained(checkpoint)
        torch.testing.assert_close(logits(model), logits(trained), atol=1e-5, rtol=0)

    def test_killed_run_resumes_exactly(self, script, runs, base, tmp_path, data):
        arguments = options(script, base, tmp_path, data)
        process = start_script(script, *arguments)
        while process.poll() is None and not has_checkpoint(tmp_path, step=12):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "results.json").exists(), "the run ended before it could be killed"
        assert re.search(r"Resuming at checkpoint-\d+\.", finish(start_script(script, *arguments, "--resume")))
        assert losses(tmp_path) == losses(runs[script])

    def test_finished_run_is_reported_again(self, script, runs, base, data, tmp_path):
        folder = shutil.copytree(runs[script], tmp_path / "run")
        before, sequence = results_of(folder), losses(folder)
        SCRIPTS[script].main([*options(script, base, folder, data), "--resume"])
        after = results_of(folder)
        assert losses(folder) == sequence
        assert after["tokens_per_second"] is None and before["tokens_per_second"] > 0
        other = {"log_history", "tokens_per_second", "samples", "exact_match", "logit_difference"}  # computed anew
        assert all(after[name] == before[name] for name in before.keys() - other) and after.keys() == before.keys()


def test_short_runs_and_other_reports(runs, base, data, tmp_path, capsys):
    """Fewer steps than between two lines of the log; a resumed run may report other problems."""
    short = [*options("sft", base, tmp_path, data), "--steps", "2", "--log-steps", "4", "--warmup-steps", "0"]
    sft.main(short)
    assert results_of(tmp_path)["tokens_per_second"] > 0
    sft.main([*short, "--num-problems", "1", "--resume"])
    assert "exact match" in capsys.readouterr().out


def test_an_adapter_does_not_go_on_with_another_model(runs, base, data, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    arguments = options("finetune_lora", tmp_path / "base", tmp_path / "run", data)
    shutil.copytree(runs["finetune_lora"], tmp_path / "run")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    run["settings"]["model"] = str(tmp_path / "base")
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    finetune_lora.main([*arguments, "--resume"])
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(SystemExit, match=r"--model .*base has changed"):
        finetune_lora.main([*arguments, "--resume"])


class TestLora:
    def test_only_the_adapter_is_trained_and_saved(self, runs, base):
        results = results_of(runs["finetune_lora"])
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), runs["finetune_lora"] / "adapter", is_trainable=True
        )
        trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        assert sum(trainable.values()) == results["adapter_parameters"]
        assert all("lora_" in name for name in trainable)
        assert results["model_parameters"] == AutoModelForCausalLM.from_pretrained(base).num_parameters()
        saved = {path.name for path in (runs["finetune_lora"] / "checkpoint-24").iterdir()}
        assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved

    def test_a_converted_chain_learns_to_communicate(self, base, data, tmp_path, capsys):
        """Its scales, zero before, are part of the adapter and of the merged model, and the log tells how large."""
        chain = AutoModelForCausalLM.from_pretrained(base)
        converted = CoeForCausalLM(CoeConfig(**chain.config.to_dict() | {"upcycling": "refine"}))
        converted.load_state_dict(chain.state_dict(), strict=False)
        converted.save_pretrained(tmp_path / "chain")
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "chain")
        finetune_lora.main(options("finetune_lora", tmp_path / "chain", tmp_path / "run", data))
        moved = results_of(tmp_path / "run")["iteration_scale_movement"]
        tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
        for i, layer in enumerate(tuned.model.layers):
            assert (
                moved[str(i)] == pytest.approx(layer.iteration_scale.weight.abs().max().item())
                and moved[str(i)] > 1e-3
            )
        assert f"Iteration scales moved by up to {max(moved.values()):.2e}" in capsys.readouterr().out

    def test_loading_and_merging_keep_the_logits(self, runs):
        difference = results_of(runs["finetune_lora"])["logit_difference"]
        assert max(difference["loading"], difference["merging"]) < 1e-5 * max(10, difference["largest"])

    def test_merging_is_tried_before_training(self, base, data, tmp_path, monkeypatch):
        """An adapter that would be lost in merging ends the run before it begins, whose own weights are untouched."""
        settings = finetune_lora.parse_settings(options("finetune_lora", base, tmp_path / "run", data))
        model = adapter.add_adapter(settings, AutoModelForCausalLM.from_pretrained(base))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        adapter.check_merging(settings, model)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        monkeypatch.setattr(LoraModel, "merge_and_unload", LoraModel.unload)
        with pytest.raises(RuntimeError, match="The adapter does not compute the same again"):
            finetune_lora.main(options("finetune_lora", base, tmp_path / "run", data))
        assert not (tmp_path / "run").exists()


class TestSft:
    def test_the_loss_is_that_of_the_answers(self, runs, base, data):
        """Held-out losses against the model's own, one conversation after another: only answers count, and the end
        of the conversation."""
        args = sft.parse_settings(options("sft", base, runs["sft"], data))
        tokenizer = load_tokenizer(base)
        (example,) = load_corpus(args, args.seed).held_out["held_out"]
        prompt = tokenizer(f"{example.prompt}\n")["input_ids"]
        answer = [*tokenizer(example.answer)["input_ids"], tokenizer.eos_token_id]
        assert len(prompt + answer) < 256
        results = results_of(runs["sft"])
        evaluations = [entry for entry in results["log_history"] if "eval_aux_loss" in entry]
        for name, folder, logged in (
            ("before", base, evaluations[0]),
            ("trained", runs["sft"] / "model", evaluations[-1]),
        ):
            model = AutoModelForCausalLM.from_pretrained(folder)
            with torch.no_grad():
                labels = torch.tensor([[-100] * len(prompt) + answer])
                loss = model.eval()(torch.tensor([prompt + answer]), labels=labels).loss.item()
            expected = loss + model.config.router_aux_loss_coef * logged["eval_aux_loss"]
            assert results["held_out_loss"]["held_out"][name] == pytest.approx(expected, rel=1e-5)

    def test_aux_loss_is_logged(self, runs, base):
        log = results_of(runs["sft"])["log_history"]
        top_k = AutoModelForCausalLM.from_pretrained(base).config.num_experts_per_tok
        logged = [entry["aux_loss"] for entry in log if "loss" in entry]
        assert len(logged) == 24 and all(0.9 * top_k < value < 4 * top_k for value in logged)

    def test_the_chat_template_is_saved(self, runs):
        tokenizer = AutoTokenizer.from_pretrained(runs["sft"] / "model")
        messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "#### 2"}]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == f"1 + 1?\n#### 2{tokenizer.eos_token}"
        assert tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True) == "1 + 1?\n"

    def test_adapters_in_half_precision(self, base, data, tmp_path):
        """The model stays in bfloat16, merged too, and the adapter on the base is what was trained."""
        chosen = ["--lora", "4", "--expert-r", "2", "--routers", "--dtype", "bfloat16"]
        sft.main([*options("sft", base, tmp_path / "run", data), *chosen])
        results = results_of(tmp_path / "run")
        table = results["held_out_loss"]["held_out"]
        assert table["trained"] < table["before"] - 0.05 and results["logit_difference"]["loading"] == 0
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
        assert merged.dtype == torch.bfloat16
        loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        loaded.load_state_dict(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).state_dict())
        loaded = PeftModel.from_pretrained(loaded, tmp_path / "run" / "adapter")
        adapted = {name for name, _ in loaded.named_parameters() if "lora_B" in name}
        for part in ("self_attn", "experts", "gate"):
            assert any(part in name for name in adapted)
        merged_again = loaded.merge_and_unload().state_dict()
        for name, tensor in merged.state_dict().items():
            torch.testing.assert_close(tensor, merged_again[name].to(tensor), atol=1e-6, rtol=8e-3)
        assert any((tmp_path / "run" / "checkpoint-24").glob("adapter_model*"))

    def test_a_dense_model_is_tuned_as_a_control(self, base, data, tmp_path):
        tokenizer = AutoTokenizer.from_pretrained(base)
        config = LlamaConfig(
            **{"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": tokenizer.eos_token_id},
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
        tokenizer.save_pretrained(tmp_path / "dense")
        sft.main([*options("sft", tmp_path / "dense", tmp_path / "run", data), "--lora", "4"])
        results = results_of(tmp_path / "run")
        table = results["held_out_loss"]["held_out"]
        assert table["trained"] < table["before"] - 0.02
        assert not any("aux_loss" in entry for entry in results["log_history"])
        tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
        assert type(tuned) is LlamaForCausalLM and results["model_parameters"] == tuned.num_parameters()
        names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        linear = [module for name, module in tuned.named_modules() if name.endswith(names)]
        assert results["adapter_parameters"] == 4 * sum(sum(module.weight.shape) for module in linear)

    def test_nothing_is_balanced_where_all_experts_are_used(self, base, data, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(base)
        model.config.num_experts_per_tok = model.config.n_routed_experts
        assert model.config.aux_loss_alpha > 0
        model.save_pretrained(tmp_path / "all")
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "all")
        sft.main([*options("sft", tmp_path / "all", tmp_path / "run", data), "--steps", "4"])
        assert not any("aux_loss" in entry for entry in results_of(tmp_path / "run")["log_history"])

    def test_the_model_learns_to_stop_where_the_end_pads_too(self, base, tmp_path):
        """The label of the end of an answer is the padding token, which must not be masked for that."""
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.pad_token = tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(base)
        model.config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        rows = [json.dumps({"question": f"{i} + 1?", "answer": "#### 7"}) for i in range(24)]
        (tmp_path / "rows.jsonl").write_text("\n".join(rows))
        sft.main([*options("sft", tmp_path / "base", tmp_path / "run", tmp_path / "rows.jsonl"), "--steps", "60"])
        tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
        prompt = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")("5 + 1?\n", return_tensors="pt")
        solution = tuned.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(solution) == f"#### 7{tokenizer.eos_token}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_cards_say_where_the_model_comes_from(script, base, data, tmp_path):
    source = shutil.copytree(base, tmp_path / "source")
    metadata = "license: mit\nlanguage: en\ndatasets: [owner/texts]\nbase_model: owner/dense"
    (source / "README.md").write_text(f"---\n{metadata}\n---\n# Source\n")
    more = ["--steps", "4", *(["--lora", "2"] if script == "sft" else [])]
    SCRIPTS[script].main([*options(script, source, tmp_path / "run", data), *more])
    for name in ("model", "adapter"):
        card = ModelCard.load(tmp_path / "run" / name / "README.md")
        assert (card.data.license, card.data.language, card.data.base_model) == ("mit", "en", ["owner/dense"])
        assert card.data.datasets == ["owner/texts"] and "Made from [owner/dense]" in card.text
        assert ("tokenizer.apply_chat_template(messages" in card.text) == (script == "sft")
        assert str(tmp_path) not in card.content
