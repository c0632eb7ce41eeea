"""`examples/evaluation.py` and the tasks beside it against plain torch, and lm-eval's own command line."""

import json
import os
import re
import subprocess
import sys
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from recipe import corpus
from tasks import question_answer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modeling_coe import lora_config

from .helpers import ROOT, WITHOUT_PACKAGE, tiny_model


pytest.importorskip("lm_eval", reason="lm-eval is not installed")
import evaluation
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._index import TaskIndex


EXAMPLES = ROOT / "examples"

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "test.parquet"
NUM_LEARNED = 4

# lm-eval without what takes longest: the index of lm-eval's own tasks, thousands of files, and a report on
# the machine.
QUICKLY = """
from lm_eval.tasks._index import TaskIndex
from torch.utils import collect_env
TaskIndex._iter_yaml_files = staticmethod(lambda root: sorted(root.glob("*.yaml")))
collect_env.get_pretty_env_info = str
"""
COMMAND_LINE = f"""{QUICKLY}
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """As `QUICKLY` does."""
    monkeypatch.setattr(TaskIndex, "_iter_yaml_files", lambda root: sorted(root.glob("*.yaml")))
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", str)


@pytest.fixture(scope="module")
def rows() -> list:
    """The problems of GSM8K with the shortest answers."""
    if not GSM8K.is_file():
        pytest.skip("GSM8K (../shared/data/gsm8k) is not there")
    dataset = corpus.open_dataset("data", str(GSM8K), None, "train")
    examples = [corpus.Example(row["question"], row["answer"]) for row in dataset]
    return sorted(examples, key=lambda example: len(example.prompt + example.answer))[: 2 * NUM_LEARNED]


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def tokenizer(rows):
    return corpus.train_tokenizer(rows, 500)


@pytest.fixture(scope="module")
def learned(rows, tokenizer, tmp_path_factory) -> Path:
    """A model that has learnt the answers of the first problems by heart."""
    texts = [tokens_of(tokenizer, row) for row in rows[:NUM_LEARNED]]
    longest = max(len(ids) for ids, _ in texts)
    input_ids = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in texts])
    labels = torch.tensor([[-100] * start + ids[start:] + [-100] * (longest - len(ids)) for ids, start in texts])
    model = tiny_model(**vocabulary(tokenizer), hidden_size=64, initializer_range=0.05).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(300):
        output = model(input_ids, labels=labels)
        right = (output.logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == -100)
        if right.all():
            return save(model.eval(), tokenizer, tmp_path_factory.mktemp("learned"))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError("the model has not learnt four problems")


def vocabulary(tokenizer) -> dict[str, int]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}


def save(model, tokenizer, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list) -> Path:
    lines = [json.dumps({"question": row.prompt, "answer": row.answer}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def tokens_of(tokenizer, row) -> tuple[list[int], int]:
    """A training text and the position of its first scored token: the newline before the answer."""
    prompt, answer = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f"{row.prompt}\n", row.answer)
    )
    assert tokenizer.decode(prompt[-1]) == "\n"
    return [*prompt, *answer, tokenizer.eos_token_id], len(prompt) - 1


def run(*argv: str | Path) -> list[dict]:
    """The records that an evaluation writes."""
    *options, out = argv
    evaluation.main([*map(str, options), "--out", str(out)])
    return json.loads(Path(out).read_text())["models"]


def scores(folder: Path, rows: list) -> list[tuple[float, int, int]]:
    """Loss in nats, tokens and bytes of every answer with the newline before it, from the logits of one text alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    result = []
    for row in rows:
        ids, start = tokens_of(tokenizer, row)
        ids = torch.tensor(ids[:-1])  # the end is not scored
        with torch.no_grad():
            logits = model(ids[None]).logits[0].double()
        targets = ids[start:]
        loss = -logits.log_softmax(-1)[start - 1 : -1].gather(1, targets[:, None]).sum().item()
        result.append((loss, len(targets), len(f"\n{row.answer}".encode())))
    return result


def ratio_and_error(numerators: list[float], denominators: list[float]) -> tuple[float, float]:
    """A ratio of means and its standard error by the delta method, from the covariance of the two."""
    covariance = np.cov(numerators, denominators)
    value = np.mean(numerators) / np.mean(denominators)
    variance = covariance[0, 0] - 2 * value * covariance[0, 1] + value**2 * covariance[1, 1]
    return value, (variance / len(numerators)) ** 0.5 / np.mean(denominators)


class TestMeasures:
    def test_perplexity_is_that_of_the_logits(self, tokenizer, rows, data, tmp_path):
        folder = save(tiny_model(**vocabulary(tokenizer)), tokenizer, tmp_path / "model")
        (record,) = run("--models", folder, "--data", data, "--limit", 5, "--max-new-tokens", 4, tmp_path / "out.json")
        losses, tokens, num_bytes = zip(*scores(folder, rows[:5]), strict=True)
        loss, error = ratio_and_error(losses, tokens)
        assert record["problems"] == 5
        assert record["perplexity"]["value"] == pytest.approx(np.exp(loss), rel=1e-4)
        assert record["perplexity"]["error"] == pytest.approx(np.exp(loss) * error, rel=1e-3)
        nats_per_byte, error = ratio_and_error(losses, num_bytes)
        assert record["bits_per_byte"]["value"] == pytest.approx(nats_per_byte / log(2), rel=1e-5)
        assert record["bits_per_byte"]["error"] == pytest.approx(error / log(2), rel=1e-3)
        metrics = record["tasks"]["qa_perplexity"]
        assert metrics["byte_perplexity,none"] == pytest.approx(np.exp(nats_per_byte), rel=1e-5)
        num_words = sum(len(row.answer.split()) for row in rows[:5])
        assert metrics["word_perplexity,none"] == pytest.approx(np.exp(sum(losses) / num_words), rel=1e-3)
        config = AutoModelForCausalLM.from_pretrained(folder).config
        assert record["total_parameters"] == config.total_parameters
        assert record["active_parameters"] == config.active_parameters
        assert record["expert_flops_per_token"] == config.expert_flops_per_token

    def test_exact_match_is_that_of_generate(self, learned, rows, data, tmp_path):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(learned), AutoTokenizer.from_pretrained(learned)
        right = []
        for row in rows:
            ids = tokenizer(f"{row.prompt}\n", return_tensors="pt", add_special_tokens=False)["input_ids"]
            output = model.generate(ids, max_new_tokens=100, do_sample=False)[0, ids.shape[1] :]
            solution = tokenizer.decode(output, skip_special_tokens=True)
            right.append(solution.partition("#### ")[2].split("\n")[0] == row.answer.partition("#### ")[2])
        assert all(right[:NUM_LEARNED]) and not all(right)
        (record,) = run("--models", learned, "--data", data, "--max-new-tokens", 100, tmp_path / "out.json")
        assert record["exact_match"]["value"] == pytest.approx(np.mean(right))
        assert record["exact_match"]["error"] == pytest.approx(np.std(right, ddof=1) / len(right) ** 0.5)

    def test_what_was_learnt_by_heart_is_right(self, learned, data, tmp_path, capsys):
        argv = ("--models", learned, "--data", data, "--limit", NUM_LEARNED, "--max-new-tokens", 100)
        (record,) = run(*argv, tmp_path / "out.json")
        assert record["exact_match"] == {"value": 1.0, "error": 0.0}
        assert 1 < record["perplexity"]["value"] < 2
        printed = capsys.readouterr().out
        assert re.search(r"active  expert FLOPs/token +perplexity +bits per byte +exact match, %\n", printed)
        assert f"{record['perplexity']['value']:.3f} ± " in printed and printed.endswith("  100.0 ± 0.0\n")

    def test_solutions_stop_at_the_end_token(self, learned, rows, tmp_path):
        """Even where the model's own settings do not know it."""
        folder = save(AutoModelForCausalLM.from_pretrained(learned), AutoTokenizer.from_pretrained(learned), tmp_path)
        (folder / "generation_config.json").write_text("{}")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
        args = evaluation.parse_settings(["--models", str(folder), "--data", "any", "--batch-size", "4"])
        model = evaluation.load_model(str(folder), args)
        options = {"until": [], "max_gen_toks": 120, "do_sample": False}
        requests = [Instance("generate_until", {}, (f"{row.prompt}\n", options), 0) for row in rows[:NUM_LEARNED]]
        assert model.generate_until(requests) == [row.answer for row in rows[:NUM_LEARNED]]

    def test_one_problem_has_no_error(self, learned, data, tmp_path):
        argv = ("--models", learned, "--data", data, "--limit", 1, "--max-new-tokens", 100)
        (record,) = run(*argv, tmp_path / "out.json")
        assert record["exact_match"] == {"value": 1.0, "error": None}
        assert record["perplexity"]["error"] is None and record["bits_per_byte"]["error"] is None

    def test_models_side_by_side(self, learned, tokenizer, rows, tmp_path, capsys):
        """One of them another architecture, on answers without a mark."""
        torch.manual_seed(1)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        llama = save(LlamaForCausalLM(LlamaConfig(**vocabulary(tokenizer), **shape)), tokenizer, tmp_path / "llama")
        plain = [corpus.Example(row.prompt, row.answer.partition("\n####")[0]) for row in rows]
        data = write_rows(tmp_path / "plain.jsonl", plain)
        argv = ("--models", llama, learned, "--data", data, "--limit", NUM_LEARNED, tmp_path / "out.json")
        records = run(*argv)
        for record, folder in zip(records, (llama, learned), strict=True):
            losses, tokens, _ = zip(*scores(folder, plain[:NUM_LEARNED]), strict=True)
            assert record["model"] == str(folder)
            assert record["perplexity"]["value"] == pytest.approx(np.exp(sum(losses) / sum(tokens)), rel=1e-4)
            assert "exact_match" not in record
        printed = capsys.readouterr().out
        assert "has answers without a number after ####: there is no exact match" in printed
        assert re.search(rf"{llama} +{records[0]['total_parameters']:,} +- +- .* -\n", printed)

    def test_an_adapter(self, learned, rows, data, tmp_path):
        """It computes what the merged model does; its cost, which the configuration does not know, is left out."""
        model = AutoModelForCausalLM.from_pretrained(learned)
        adapted = get_peft_model(model, lora_config(model, r=2, init_lora_weights=False))
        adapted.save_pretrained(tmp_path / "adapter")
        argv = ("--data", data, "--limit", 2, "--max-new-tokens", 2)
        options = ("--models", learned, "--model-args", f"peft={tmp_path / 'adapter'}", *argv)
        (record,) = run(*options, tmp_path / "adapter.json")
        merged = save(adapted.merge_and_unload(), AutoTokenizer.from_pretrained(learned), tmp_path / "merged")
        (expected,) = run("--models", merged, *argv, tmp_path / "merged.json")
        assert record["perplexity"]["value"] == pytest.approx(expected["perplexity"]["value"], rel=1e-4)
        assert record["total_parameters"] > expected["total_parameters"]
        assert record["active_parameters"] is record["expert_flops_per_token"] is None
        assert expected["active_parameters"] > 0 and expected["expert_flops_per_token"] > 0

    def test_beginning_of_sequence_token(self, learned, tokenizer, rows, data, tmp_path):
        """A tokenizer that adds one keeps doing so, unless told not to."""
        beginning = AutoTokenizer.from_pretrained(learned)
        token = (tokenizer.bos_token, tokenizer.bos_token_id)
        beginning.backend_tokenizer.post_processor = TemplateProcessing(f"{token[0]} $A", special_tokens=[token])
        folder = save(AutoModelForCausalLM.from_pretrained(learned), beginning, tmp_path / "model")
        argv = ("--models", folder, "--data", data, "--limit", 2, "--max-new-tokens", 4)
        (with_it,) = run(*argv, tmp_path / "with.json")
        (without,) = run(*argv, "--model-args", "add_bos_token=False", tmp_path / "without.json")
        losses, tokens, _ = zip(*scores(learned, rows[:2]), strict=True)
        expected = np.exp(sum(losses) / sum(tokens))
        assert without["perplexity"]["value"] == pytest.approx(expected, rel=1e-4)
        assert with_it["perplexity"]["value"] != pytest.approx(expected, rel=1e-3)


class TestTasks:
    @pytest.mark.parametrize(
        ("solution", "value"), [("so\n#### 1000", 1.0), ("#### 1,000.", 1.0), ("1000", 0.0), ("#### 100", 0.0)]
    )
    def test_exact_match(self, solution, value):
        assert question_answer.exact_match({"prompt": "", "answer": "#### 1,000"}, [solution]) == {
            "exact_match": value
        }

    def test_bytes_and_words(self):
        metrics = question_answer.likelihood({"prompt": "How many? \n", "answer": "12 ÷ 3 = 4"}, [(-2.0, False)])
        assert metrics == {
            "bits_per_byte": (-2.0, 13),  # the space and the newline, and two bytes for the sign
            "byte_perplexity": (-2.0, 13),
            "word_perplexity": (-2.0, 5),
        }

    def test_lm_eval_scores_the_tokens_of_training(self, learned, tokenizer):
        """On all of GSM8K, tokenised together as apart."""
        if not GSM8K.is_file():
            pytest.skip("GSM8K (../shared/data/gsm8k) is not there")
        model = HFLM(AutoModelForCausalLM.from_pretrained(learned), tokenizer=tokenizer)
        documents = question_answer.load(str(GSM8K))["test"]
        assert len(documents) == 1319
        for prompt, answer in zip(documents["prompt"], documents["answer"], strict=True):
            ids, start = tokens_of(tokenizer, corpus.Example(prompt.removesuffix("\n"), answer))
            assert model._encode_pair(prompt, answer) == (ids[:start], ids[start:-1])

    def test_few_shot_prompts(self, rows, data):
        args = evaluation.parse_settings(["--models", "any", "--data", str(data), "--num-fewshot", "2"])
        _, tasks = evaluation.load_tasks(args)
        texts = {f"{row.prompt}\n{row.answer}" for row in rows}
        for task in tasks:
            task.set_fewshot_seed(0)
            for document in task.test_docs():
                *examples, prompt = task.fewshot_context(document, 2).split("\n\n\n")
                assert prompt == document["prompt"]
                assert len(set(examples)) == 2 and set(examples) < texts - {prompt + document["answer"]}

    def test_few_shot_evaluation(self, learned, data, tmp_path):
        """The model has learnt to answer the prompt alone, so examples before it change what it says."""
        argv = ("--models", learned, "--data", data, "--limit", 2, "--max-new-tokens", 70)
        (record,) = run(*argv, "--num-fewshot", 1, tmp_path / "out.json")
        (plain,) = run(*argv, tmp_path / "plain.json")
        assert record["perplexity"]["value"] > plain["perplexity"]["value"]

    def test_tasks_of_lm_eval(self, learned, tmp_path, capsys):
        """Without data of our own."""
        texts = tmp_path / "texts.jsonl"
        texts.write_text('{"text": "Ann has 7 pens."}\n{"text": "Bob has 3."}\n')
        task = tmp_path / "texts.yaml"
        task.write_text(
            "task: texts\noutput_type: loglikelihood_rolling\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {texts}}}}}\n"
            'test_split: test\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        )
        (record,) = run("--models", learned, "--tasks", task, tmp_path / "out.json")
        assert record["tasks"]["texts"]["bits_per_byte,none"] > 0 and "perplexity" not in record
        assert re.search(r"\|texts", capsys.readouterr().out)

    def test_the_script_hides_no_package(self, tmp_path):
        """Tasks of lm-eval import `evaluate`, which nothing in `examples/` may stand in for."""
        (tmp_path / "names.py").write_text(
            "import evaluate\n\n\ndef text(document):\n    return evaluate.load.__name__\n"
        )
        (tmp_path / "names.yaml").write_text(
            "task: names\noutput_type: loglikelihood\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
            'test_split: test\ndoc_to_text: !function names.text\ndoc_to_target: "{{text}}"\n'
        )
        (tmp_path / "rows.jsonl").write_text('{"text": "Ann has 7 pens."}\n')
        script = EXAMPLES / "evaluation.py"
        program = f"{QUICKLY}\nimport runpy, sys; sys.path.insert(0, {str(EXAMPLES)!r})\n"
        program += f"runpy.run_path({str(script)!r}, run_name='__main__')"
        tiny_model(vocab_size=300).save_pretrained(tmp_path / "model")
        corpus.train_tokenizer(corpus.ArithmeticExamples(0, "train"), 300).save_pretrained(tmp_path / "model")
        process = subprocess.run(
            [sys.executable, "-c", program, "--models", tmp_path / "model", "--tasks", tmp_path / "names.yaml"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0 and "|names" in process.stdout, process.stdout + process.stderr


class TestCommandLine:
    """`lm-eval` itself."""

    def results(self, folder: Path, script: str, *options: str | Path, project: str) -> dict[str, float]:
        process = subprocess.run(
            [
                *(sys.executable, "-c", script, "run", "--model", "hf", "--device", "cpu", "--batch_size", "4"),
                *("--tasks", EXAMPLES / "tasks", "--output_path", folder, *options),
            ],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": project, "HF_MODULES_CACHE": str(folder / "modules")},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        assert "|qa_perplexity" in process.stdout
        (file,) = folder.glob("**/results_*.json")
        return json.loads(file.read_text())["results"]

    @pytest.mark.parametrize("with_project", [True, False], ids=["the tasks import the package", "trust_remote_code"])
    def test_it_finds_what_the_logits_say(self, learned, rows, data, tmp_path, with_project):
        model_args = f"pretrained={learned}" if with_project else f"pretrained={learned},trust_remote_code=True"
        options = ("--model_args", model_args, "--metadata", f"data={data}", "--limit", str(NUM_LEARNED))
        script = COMMAND_LINE if with_project else WITHOUT_PACKAGE + COMMAND_LINE
        results = self.results(tmp_path, script, *options, project=str(ROOT) if with_project else "")
        losses, _, num_bytes = zip(*scores(learned, rows[:NUM_LEARNED]), strict=True)
        expected = sum(losses) / sum(num_bytes) / log(2)
        assert results["qa_perplexity"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)
        assert results["qa_exact_match"]["exact_match,none"] == 1.0


class TestErrors:
    def fails(self, *argv: str | Path) -> str:
        with pytest.raises(SystemExit) as exit_info:
            evaluation.main([str(word) for word in argv])
        return str(exit_info.value)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("", "Neither --data nor --tasks is given; give one of them, or both"),
            ("--tasks no_such_task", "--tasks no_such_task does not exist. `lm-eval ls tasks` lists names"),
        ],
    )
    def test_options(self, options, message):
        assert message in self.fails("--models", "no-such-model", *options.split())

    def test_rows(self, learned, tmp_path):
        data = tmp_path / "rows.jsonl"
        data.write_text('{"question": "How many?", "answer": "#### 1"}\n{"question": " ", "answer": "#### 2"}\n')
        assert "has no 'question' in row 1: ' '; remove or fill this row" in self.fails(
            "--models", learned, "--data", data
        )

    def test_unmarked_answers_on_the_command_line(self, tmp_path):
        data = write_rows(tmp_path / "rows.jsonl", [corpus.Example("How many?", "Seven.")])
        documents = question_answer.load(str(data))["test"]
        with pytest.raises(ValueError, match=r"row 0 has no number after ####: 'Seven.'; mark it, or"):
            question_answer.check_answers(documents)

    def test_answers_that_hold_what_separates_examples(self, learned, tmp_path):
        data = write_rows(tmp_path / "rows.jsonl", [corpus.Example("How many?", "Seven.\n\n\n#### 7")])
        message = self.fails("--models", learned, "--data", data)
        assert message.endswith("The answer in row 0 has two blank lines, where a solution ends; remove one.")

    def test_a_model_that_fails_takes_no_other_with_it(self, learned, data, tmp_path, capsys):
        out = tmp_path / "results" / "out.json"
        argv = ("--data", data, "--limit", 1, "--max-new-tokens", 4, "--out", out)
        assert "--models gone cannot be loaded" in self.fails("--models", learned, "gone", *argv)
        assert [record["model"] for record in json.loads(out.read_text())["models"]] == [str(learned)]
        assert f"\n{learned}  " in capsys.readouterr().out
