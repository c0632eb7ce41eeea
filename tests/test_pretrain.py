"""`examples/pretrain.py` and its built-in data: what is generated, packed, reported and refused, and resuming."""

import json
import operator
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from itertools import islice
from pathlib import Path

import pretrain
import pytest
import torch
from recipe import answers, arithmetic, corpus, report, run_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from .helpers import ROOT


EXAMPLES = ROOT / "examples"

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
TEMPLATES = arithmetic.TRAINING_TEMPLATES + arithmetic.HELD_OUT_TEMPLATES
TINY_RUN = [
    *("--hidden-size", "16", "--num-layers", "1", "--num-heads", "2", "--num-experts", "4", "--expert-width", "8"),
    *("--vocab-size", "300", "--block-size", "32", "--batch-size", "2", "--steps", "32", "--warmup-steps", "4"),
    *("--log-steps", "1", "--eval-steps", "16", "--eval-blocks", "3", "--save-steps", "4"),
    *("--num-problems", "1", "--num-samples", "1", "--max-new-tokens", "8"),
]


def problems(split: str, count: int, seed: int = 0) -> list:
    return list(islice(arithmetic.Problems(seed, split), count))


def pairs(count: int) -> list:
    return [corpus.Example(problem.question, problem.answer) for problem in problems("train", count)]


def write_rows(path: Path, count: int) -> Path:
    rows = [{"question": example.prompt, "answer": example.answer} for example in pairs(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.train_tokenizer(pairs(200), 400)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Few enough rows that a tiny run passes over them several times."""
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", 12)


class TestArithmetic:
    def test_a_problem_is_a_function_of_seed_split_and_index(self):
        assert arithmetic.Problems(0, "train")[7] == problems("train", 8)[7]
        texts = {problems(split, 1, seed)[0].question for split in arithmetic.SPLITS for seed in range(3)}
        assert len(texts) == 9

    def test_problems_are_the_same_on_every_machine(self):
        problem = arithmetic.Problems(0, "train")[1]
        assert problem.question.startswith("Hugo has 6 marbles. Felix has 6 times as many. Felix finds 8 more.")
        assert problem.answer.splitlines() == [
            "Felix has 6 * 6 = 36 marbles.",
            "Then Felix has 36 + 8 = 44 marbles.",
            "Together they have 6 + 44 = 50 marbles.",
            "#### 50",
        ]

    def test_splits_are_disjoint(self):
        seen = {split: problems(split, 3000) for split in arithmetic.SPLITS}
        names = {split: {problem.template.name for problem in seen[split]} for split in seen}
        assert names["train"] == names["numbers"] == {template.name for template in arithmetic.TRAINING_TEMPLATES}
        assert names["templates"] == {template.name for template in arithmetic.HELD_OUT_TEMPLATES}
        assert not names["train"] & names["templates"]
        numbers = {
            split: {(problem.template.name, *sorted(problem.numbers.items())) for problem in seen[split]}
            for split in seen
        }
        assert not numbers["train"] & numbers["numbers"]

    def test_templates_are_varied(self):
        assert len(arithmetic.TRAINING_TEMPLATES) >= 12
        assert len({template.name for template in TEMPLATES}) == len(TEMPLATES)
        for template in TEMPLATES:
            assert 2 <= len(template.steps) <= 4
            assert template.question.count(". ") >= 1 and template.question.endswith("?")

    @pytest.mark.parametrize("split", arithmetic.SPLITS)
    def test_solutions_are_right(self, split):
        for problem in problems(split, 500):
            *lines, last = problem.answer.splitlines()
            known = set(re.findall(r"\d+", problem.question)) | {"2"}
            for line in lines:
                left, operation, right, result = re.search(r"(\d+) ([-+*/]) (\d+) = (\d+)", line).groups()
                assert OPERATIONS[operation](int(left), int(right)) == int(result) > 0
                assert {left, right} <= known, "a step may only use what is known before it"
                known.add(result)
            assert last == f"#### {result}"
            assert "{" not in problem.question + problem.answer

    def test_unknown_split(self):
        with pytest.raises(ValueError, match=r"`split` is 'test'; choose one of"):
            arithmetic.Problems(0, "test")


class TestData:
    def test_packing_joins_and_cuts(self, tokenizer):
        blocks = corpus.pack(pairs(20), tokenizer, block_size=32, max_blocks=10_000)
        expected = []
        for prompt, answer in pairs(20):
            expected += tokenizer(prompt + "\n")["input_ids"] + tokenizer(answer)["input_ids"]
            expected.append(tokenizer.eos_token_id)
        assert blocks.shape == (len(expected) // 32, 32)
        assert blocks.flatten().tolist() == expected[: blocks.numel()]

    def test_packing_stops_when_it_has_enough(self, tokenizer):
        endless = corpus.ArithmeticExamples(0, "train")
        blocks = corpus.pack(endless, tokenizer, block_size=16, max_blocks=5)
        assert blocks.shape == (5, 16)
        assert torch.equal(blocks, corpus.pack(endless, tokenizer, block_size=16, max_blocks=50)[:5])

    def test_packing_too_little(self, tokenizer):
        assert corpus.pack(pairs(1), tokenizer, block_size=4096, max_blocks=5).shape == (0, 4096)

    def test_trained_tokenizer(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert loaded.padding_side == "left"
        assert None not in (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id)
        assert loaded.pad_token_id != loaded.eos_token_id
        assert len(loaded("1234", add_special_tokens=False)["input_ids"]) == 4
        text = "Zoë's 12 ÷ 3 = 4 🙂\n"
        assert loaded.decode(loaded(text)["input_ids"]) == text

    def test_folder_with_splits(self, tmp_path):
        write_rows(tmp_path / "train.jsonl", 5)
        write_rows(tmp_path / "test.jsonl", 2)
        argv = ["--output-dir", str(tmp_path / "run"), "--data", str(tmp_path), "--eval-data", str(tmp_path)]
        texts = corpus.load_corpus(pretrain.parse_settings(argv), 0)
        assert sorted(texts.train) == sorted(pairs(5))
        assert texts.held_out == {"held_out": pairs(2)}

    def test_held_out_part_of_a_file(self, data):
        argv = ["--output-dir", "run", "--data", str(data), "--eval-fraction", "0.25"]
        texts = corpus.load_corpus(pretrain.parse_settings(argv), 0)
        assert len(texts.held_out["held_out"]) == 3
        assert sorted(texts.train + texts.held_out["held_out"]) == sorted(pairs(12))
        assert corpus.load_corpus(pretrain.parse_settings(argv), 0) == texts

    def test_unigram_loss(self):
        train, held_out = torch.tensor([[0, 1, 1, 3]]), torch.tensor([[3, 1, 2], [0, 0, 1]])
        # counts with one added: 2, 3, 1, 2 of 8; targets: 1, 2, 0, 1
        expected = -(torch.tensor([3, 1, 2, 3]) / 8).log().mean().item()
        assert report.unigram_loss(train, held_out, vocab_size=4) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7 pens.\n#### 7", "7"),
        ("#### 1,234\nmore", "1234"),
        ("####-5.", "-5"),
        ("#### 2.50 dollars", "2.50"),
        ("#### 7 #### 8", "7"),
        ("#### none", None),
        ("the answer is 7", None),
    ],
)
def test_final_answer(text, answer):
    assert answers.final_answer(text) == answer


def test_exact_match():
    examples = [corpus.Example("", "#### 1"), corpus.Example("", "#### 1,000")]
    assert answers.exact_match(examples, ["so\n#### 1", "#### 1000"]) == 1.0
    assert answers.exact_match(examples, ["1", "#### 1000"]) == 0.5
    assert answers.exact_match([corpus.Example("", "no mark")], ["no mark"]) is None


class TestErrors:
    def fails(self, *argv: str | Path) -> str:
        with pytest.raises(SystemExit) as exit_info:
            pretrain.main([str(word) for word in argv])
        return str(exit_info.value)

    @pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]])
    def test_a_run_does_not_replace_what_it_reads(self, tmp_path, more):
        (tmp_path / "model").mkdir()
        for name in ("model", "tokenizer"):
            message = self.fails("--output-dir", tmp_path, f"--{name}", tmp_path / "model", *more)
            assert f"--{name} {tmp_path}/model lies in --output-dir {tmp_path}" in message
        assert (tmp_path / "model").is_dir()


def start_script(script: str, *options: str | Path) -> subprocess.Popen:
    """A training process of its own, with one thread and one choice of kernels: it must not depend on the state of the
    tests, and two of them compute the same bits."""
    command = [sys.executable, EXAMPLES / f"{script}.py", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COE_CPU_KERNEL": "mm", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start(output_dir: Path, data: Path, *options: str) -> subprocess.Popen:
    return start_script("pretrain", "--output-dir", output_dir, "--data", data, *TINY_RUN, *options)


def test_progress_shows_in_a_pipe(data, tmp_path):
    """A line for every log, while training goes on."""
    process = start(tmp_path, data, "--steps", "2000", "--save-steps", "2000")
    for line in process.stdout:
        if line.startswith("step      2 of 2000  "):
            break
    assert process.poll() is None and re.search(r"  loss \d\.\d+  .*learning_rate ", line)
    process.kill()
    process.communicate()


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def has_checkpoint(output_dir: Path, step: int) -> bool:
    """Of this step or a later one: old ones are deleted, which a busy machine may not let us see."""
    return any(int(folder.name.removeprefix("checkpoint-")) >= step for folder in output_dir.glob("checkpoint-*"))


def losses(output_dir: Path) -> list[tuple[int, str, float]]:
    """The logged sequence of training and held-out losses."""
    log = json.loads((output_dir / "results.json").read_text())["log_history"]
    keys = ("loss", "eval_held_out_loss")
    return [(entry["step"], key, entry[key]) for entry in log for key in keys if key in entry]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, data) -> tuple[Path, str]:
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    return output_dir, finish(start(output_dir, data))


class TestRun:
    def test_end_to_end(self, whole_run):
        output_dir, output = whole_run
        results = json.loads((output_dir / "results.json").read_text())
        table = results["held_out_loss"]["held_out"]
        assert table["trained"] < table["before"]
        assert f"{table['unigram']:.4f}" in output and "--- expected" in output
        assert [step for step, key, _ in losses(output_dir) if key == "loss"] == list(range(1, 33))
        assert [step for step, key, _ in losses(output_dir) if key != "loss"] == [0, 16, 32]
        assert results["tokens_per_second"] > 0
        assert results["exact_match"]["held_out"] is not None
        assert (output_dir / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
        assert [path.name for path in run_folder.checkpoints_in(output_dir)] == ["checkpoint-28", "checkpoint-32"]
        model = AutoModelForCausalLM.from_pretrained(output_dir / "model")
        tokenizer = AutoTokenizer.from_pretrained(output_dir / "model")
        assert model.config.vocab_size == len(tokenizer)
        assert model.config.eos_token_id == tokenizer.eos_token_id
        assert model.config.pad_token_id == tokenizer.pad_token_id

    def test_held_out_losses_are_the_models(self, whole_run, data):
        output_dir, _ = whole_run
        args = pretrain.parse_settings(["--output-dir", str(output_dir), "--data", str(data), *TINY_RUN])
        tokenizer = AutoTokenizer.from_pretrained(output_dir / "model")
        _, held_out = corpus.pack_corpus(args, corpus.load_corpus(args, args.seed), tokenizer)
        blocks = held_out["held_out"]
        assert len(blocks) % args.batch_size, "the last batch should be a smaller one"
        table = json.loads((output_dir / "results.json").read_text())["held_out_loss"]["held_out"]
        torch.manual_seed(args.seed)
        untrained = pretrain.CoeForCausalLM(pretrain.build_config(args, tokenizer))
        trained = AutoModelForCausalLM.from_pretrained(output_dir / "model")
        for name, model in (("before", untrained), ("trained", trained)):
            with torch.no_grad():
                loss = model.eval()(blocks, labels=blocks).loss.item()
            assert table[name] == pytest.approx(loss, rel=1e-5)

    def test_killed_run_resumes_exactly(self, whole_run, tmp_path, data):
        process = start(tmp_path, data)
        while process.poll() is None and not has_checkpoint(tmp_path, step=12):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "results.json").exists(), "the run ended before it could be killed"

        output = finish(start(tmp_path, data, "--resume"))
        assert re.search(r"Resuming at checkpoint-\d+\.", output)
        assert losses(tmp_path) == losses(whole_run[0])

    def test_goes_on_with_a_given_model(self, whole_run, tmp_path, data):
        output_dir, _ = whole_run
        options = [*TINY_RUN]
        for name in [each.name for each in fields(pretrain.ModelSettings) if each.name != "model"]:
            if (flag := run_folder.option(name)) in options:
                del options[options.index(flag) : options.index(flag) + 2]
        pretrain.main(["--output-dir", str(tmp_path), "--data", str(data), "--model", f"{output_dir}/model", *options])
        first = json.loads((output_dir / "results.json").read_text())["held_out_loss"]["held_out"]
        second = json.loads((tmp_path / "results.json").read_text())["held_out_loss"]["held_out"]
        assert second["before"] == pytest.approx(first["trained"], rel=1e-5)
        assert second["trained"] < second["before"]
        config = AutoModelForCausalLM.from_pretrained(tmp_path / "model").config
        assert config.n_routed_experts == AutoModelForCausalLM.from_pretrained(output_dir / "model").config.num_experts

    def test_finished_run_is_reported_again(self, whole_run, data, tmp_path):
        output_dir = shutil.copytree(whole_run[0], tmp_path / "run")
        before = losses(output_dir)
        run = json.loads((output_dir / "run.json").read_text())
        del run["settings"]["branch_norm"]  # of a run from before there was such an option
        run_folder.write_json(output_dir / "run.json", run)
        pretrain.main(["--output-dir", str(output_dir), "--data", str(data), "--resume", *TINY_RUN])
        assert losses(output_dir) == before

    def test_changed_data_are_refused(self, whole_run, data):
        output_dir, _ = whole_run
        settings = json.loads((output_dir / "run.json").read_text())
        run_folder.write_json(output_dir / "run.json", settings | {"data_fingerprint": "0"})
        with pytest.raises(SystemExit, match=r"The data have fingerprint \w+, but the run in .* has 0"):
            pretrain.main(["--output-dir", str(output_dir), "--data", str(data), "--resume", *TINY_RUN])
        run_folder.write_json(output_dir / "run.json", settings)
