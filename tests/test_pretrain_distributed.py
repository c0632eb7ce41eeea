"""`examples/pretrain_distributed.py`: any number of processes, killed or not, computes what one process does."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

import pretrain_distributed
import pytest
import torch
from datasets import Dataset
from recipe import distributed, stream
from recipe.arithmetic import Problems
from recipe.corpus import Example
from recipe.sharded_checkpoints import CopyingStager, complete_checkpoints
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.distributed import DistributedConfig

from modeling_coe.command_line import InputError

from . import pretrain_worker
from .helpers import ROOT, random_ids, tiny_config, tiny_model
from .ranks import run_ranks, run_script


IS_NATIVE = "dp_replicate_size" in {each.name for each in fields(DistributedConfig)}
requires_native = pytest.mark.skipif(
    not IS_NATIVE, reason="before 5.23, transformers cannot share parameters and experts in all of these layouts"
)

TRAINING = {"steps": 6, "warmup-steps": 2, "lr": 3e-3, "batch-size": 4, "block-size": 24, "eval-blocks": 3}
STEPS = [word for name, value in TRAINING.items() for word in (f"--{name}", str(value))]
STEPS += ["--log-steps", "1", "--eval-steps", "3", "--save-steps", "2"]

SCRIPT = ROOT / "examples" / "pretrain_distributed.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}"}


@pytest.fixture(scope="module")
def shape(tmp_path_factory) -> Path:
    """Of a model with a dense layer, balanced by a loss and by biases."""
    folder = tmp_path_factory.mktemp("shape")
    balanced = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "aux_loss_alpha": 0.01}
    tiny_config(vocab_size=260, first_k_dense_replace=1, num_hidden_layers=3, **balanced).save_pretrained(folder)
    return folder


def arguments(shape: Path, output_dir: Path, *more: str) -> list[str]:
    return ["--config", str(shape), "--output-dir", str(output_dir), *STEPS, *more]


def read_log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_same_log(folder: Path, expected: list[dict[str, float]]) -> None:
    """But for the speed."""
    log = read_log(folder)
    assert [entry.keys() for entry in log] == [entry.keys() for entry in expected]
    for entry, other in zip(log, expected, strict=True):
        for name in entry.keys() - {"tokens_per_second_per_device", "mfu"}:
            assert entry[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), (other["step"], name)


def assert_saved_as_trained(folder: Path) -> PreTrainedModel:
    """The saved model has the tensors of the last checkpoint."""
    dcp_to_torch_save(folder / "checkpoint-6" / "state", folder / "state.pt")
    trained = torch.load(folder / "state.pt")["model"]
    (folder / "state.pt").unlink()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert trained.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    return model


def copy_until(source: Path, step: int, target: Path) -> Path:
    """A run as if it had been killed after the checkpoint of a step."""
    shutil.copytree(source, target)
    for checkpoint in complete_checkpoints(target):
        if int(checkpoint.name.partition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(target / "model")
    return target


@pytest.fixture(scope="module")
def one(shape, tmp_path_factory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one")
    pretrain_distributed.main(arguments(shape, folder))
    return folder


@pytest.fixture(scope="module")
def two(shape, tmp_path_factory) -> Path:
    """The run of two processes that torchrun starts, which share everything."""
    folder = tmp_path_factory.mktemp("two")
    layout = ("--ep-size", "2", "--micro-batch-size", "1")
    run = subprocess.run(
        [*TORCHRUN, "--nproc_per_node", "2", str(SCRIPT), *arguments(shape, folder, *layout)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("The trained model is in") == 1
    return folder


# ---- Runs -----------------------------------------------------------------------------------------------------------


@requires_native
def test_two_processes_equal_one(one, two):
    assert_same_log(two, read_log(one))
    entries = {entry["step"]: entry for entry in read_log(one) if "loss" in entry}
    assert list(entries) == [1, 2, 3, 4, 5, 6] and entries[6]["loss"] < entries[1]["loss"]


@requires_native
def test_files_of_a_run(two):
    assert {path.name for path in two.iterdir()} == {
        *("run.json", "tokenizer", "log.jsonl", "model"),
        *("checkpoint-4", "checkpoint-6"),  # the two newest
    }
    for checkpoint in ("checkpoint-4", "checkpoint-6"):
        assert {path.name for path in (two / checkpoint).iterdir()} == {"progress.json", "state"}


@requires_native
def test_saved_model_is_the_trained_one(one, two):
    """By the last checkpoint, and by the loss of the last evaluation."""
    model = assert_saved_as_trained(two)
    saved = model.state_dict()
    biases = [saved[name] for name in saved if name.endswith("e_score_correction_bias")]
    assert len(biases) == 4 and all(bias.count_nonzero() for bias in biases)

    tokenizer = AutoTokenizer.from_pretrained(two / "model")
    tokens = []
    for problem in islice(Problems(0, "numbers"), 3):
        for text in (f"{problem.question}\n", problem.answer):
            tokens += tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens.append(tokenizer.eos_token_id)
    blocks = torch.tensor(tokens[: 3 * 24]).view(3, 24)
    with torch.no_grad():
        loss = model(blocks, labels=blocks).loss.item()
    assert loss == pytest.approx(read_log(one)[-1]["eval_numbers_loss"], abs=1e-5)


@requires_native
def test_tied_embeddings_stay_one(tmp_path):
    """Of a vocabulary that the processes do not divide, whose shards are padded."""
    tiny_config(vocab_size=261, tie_word_embeddings=True).save_pretrained(tmp_path / "shape")
    pretrain_distributed.main(arguments(tmp_path / "shape", tmp_path / "one"))
    run = run_ranks(run_script, SCRIPT, *arguments(tmp_path / "shape", tmp_path / "two"))
    assert run.exit_codes == [0, 0], run.stderr
    assert_same_log(tmp_path / "two", read_log(tmp_path / "one"))


@requires_native
def test_killed_run_goes_on(shape, one, tmp_path):
    run = run_ranks(pretrain_worker.train, "4", *arguments(shape, tmp_path / "run", "--ep-size", "2"))
    assert run.exit_codes[1] == -signal.SIGKILL and run.exit_codes[0] != 0
    assert not (tmp_path / "run" / "model").exists()
    (tmp_path / "run" / "checkpoint-5" / "state").mkdir(parents=True)  # somebody else's
    run = run_ranks(run_script, SCRIPT, *arguments(shape, tmp_path / "run", "--ep-size", "2", "--resume"))
    assert run.exit_codes == [0, 0], run.stderr
    assert "Resuming at step" in run.stdout
    assert_same_log(tmp_path / "run", read_log(one))
    assert (tmp_path / "run" / "checkpoint-5" / "state").is_dir()


@requires_native
def test_goes_on_in_one_process(shape, one, two, tmp_path):
    folder = copy_until(two, 4, tmp_path / "run")
    pretrain_distributed.main(arguments(shape, folder, "--resume"))
    assert_same_log(folder, read_log(one))


@requires_native
def test_goes_on_in_four_processes(shape, one, two, tmp_path):
    """Pairs share every layer, and in it every expert, of which DTensor's shards are no rectangles."""
    folder = copy_until(two, 4, tmp_path / "run")
    layout = ("--tp-size", "2")
    run = run_ranks(run_script, SCRIPT, *arguments(shape, folder, *layout, "--resume"), processes=4)
    assert run.exit_codes == [0] * 4, run.stderr
    assert "fsdp 2, ep 1, tp 2, replicate 1" in run.stdout
    assert_same_log(folder, read_log(one))
    assert_saved_as_trained(folder)


@requires_native
def test_asked_to_stop(shape, one, tmp_path, monkeypatch, capsys):
    train_step = pretrain_distributed.Loop.train_step

    def interrupted(loop, step, watch):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(loop, step, watch)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain_distributed.Loop, "train_step", interrupted)
        pretrain_distributed.main(arguments(shape, tmp_path))
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / "model").exists() and "--resume" in capsys.readouterr().out
    pretrain_distributed.main(arguments(shape, tmp_path, "--resume"))
    assert_same_log(tmp_path, read_log(one))


@requires_native
def test_goes_on_with_a_model_in_half_precision(two, tmp_path):
    """Checkpoints by the clock, beside those by steps."""
    words = [*STEPS, "--steps", "2", "--save-steps", "100", "--save-minutes", "1e-9", "--dtype", "bfloat16"]
    pretrain_distributed.main(["--model", str(two / "model"), "--output-dir", str(tmp_path), *words])
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    first = next(entry for entry in read_log(tmp_path) if "loss" in entry)
    assert first["loss"] == pytest.approx(read_log(two)[-2]["loss"], rel=0.1)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.float32


# ---- Bad input ------------------------------------------------------------------------------------------------------


def test_older_releases_are_refused(monkeypatch, tmp_path, capsys):
    @dataclass
    class OlderConfig:
        fsdp_size: int = 1

    monkeypatch.setattr(distributed, "DistributedConfig", OlderConfig)
    with pytest.raises(SystemExit) as end:
        pretrain_distributed.main(["--config", "shape.json", "--output-dir", str(tmp_path)])
    assert end.value.code == 1
    assert "Install 5.23" in capsys.readouterr().err


@requires_native
@pytest.mark.parametrize(
    "options, processes, words",
    [
        ({"fsdp_size": 3}, 2, ("--fsdp-size 3", "number of processes, 2")),
        ({"tp_size": 2}, 3, ("--tp-size 2", "number of processes, 3")),
        ({"ep_size": 3}, 2, ("--ep-size 3", "divide")),
        ({"ep_size": 0}, 2, ("--ep-size is 0", "1 or more")),
        ({}, 3, ("--batch-size is 4", "3 of them", "multiple of 3")),
        ({"micro_batch_size": 3}, 2, ("--micro-batch-size is 3", "divisor of 2")),
    ],
)
def test_layouts_that_do_not_fit(options, processes, words):
    with pytest.raises(InputError) as error:
        distributed.choose_layout(distributed.LayoutSettings(**options), 4, processes)
    assert all(word in str(error.value) for word in words), error.value


@requires_native
def test_experts_that_a_layout_cannot_share():
    with pytest.raises(InputError, match=r"--ep-size is 2, which cannot share the 7 experts .* Choose a divisor"):
        distributed.check_layout(DistributedConfig(fsdp_size=2, ep_size=2), tiny_config(n_routed_experts=7))


@requires_native
@pytest.mark.parametrize(
    "more, words",
    [
        ("--model other", ("--config", "--model")),
        ("--block-size 1", ("--block-size is 1",)),
        ("--block-size 4096", ("--block-size is 4096", "max_position_embeddings")),
        ("--save-minutes 0", ("--save-minutes is 0", "more than 0")),
        ("--config missing.json", ("--config missing.json", "cannot be loaded")),
        ("--data missing.jsonl --eval-data missing.jsonl", ("--data missing.jsonl", "does not exist")),
        ("--data rows.jsonl", ("--data rows.jsonl", "--eval-data")),
        ("--text-column text", ("--text-column", "built-in problems")),
        ("--resume", ("--resume", "holds no run")),
    ],
)
def test_bad_input_ends_in_one_line(more, words, shape, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        pretrain_distributed.main(arguments(shape, tmp_path / "out", *more.split()))
    assert end.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert all(word in line for word in words), line
    assert not torch.distributed.is_initialized()


@requires_native
def test_bad_input_of_one_of_many_processes(shape, one, tmp_path):
    """All end alike, in the middle of training too, and the first one says why."""
    good = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(20)]
    for name, rows in (("good", good), ("bad", [*good[:3], {"question": "And now?", "answer": ""}, *good[3:]])):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    data = ("--data", str(tmp_path / "bad.jsonl"), "--eval-data", str(tmp_path / "good.jsonl"))
    tokenizer = ("--tokenizer", str(one / "tokenizer"))
    run = run_ranks(run_script, SCRIPT, *arguments(shape, tmp_path / "out", *data, *tokenizer))
    assert run.exit_codes == [1, 1]
    assert run.stderr.count("error: ") == 1 and "bad.jsonl has no 'answer' in a row" in run.stderr, run.stderr


# ---- Parts ----------------------------------------------------------------------------------------------------------


def file_settings(tmp_path: Path, num_rows: int, num_files: int = 1) -> stream.StreamedDataSettings:
    """A folder of parquet files with numbered questions and answers."""
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(num_rows)]
    (tmp_path / "data").mkdir()
    for i in range(num_files):
        Dataset.from_list(rows[i::num_files]).to_parquet(tmp_path / "data" / f"train-{i}.parquet")
    data = str(tmp_path / "data")
    return pretrain_distributed.ComputedSettings(output_dir=tmp_path, data=data, eval_data=data, eval_split="train")


@pytest.mark.parametrize("source", ["problems", "one file", "as many files as rows"])
class TestStream:
    BATCHES, ROWS, BLOCK = 5, 4, 12

    @pytest.fixture
    def open_rows(self, source, tmp_path, tokenizer):
        settings = pretrain_distributed.ComputedSettings(output_dir=tmp_path)
        if source != "problems":
            settings = file_settings(tmp_path, 60, num_files=1 if source == "one file" else self.ROWS)
        return lambda rows: stream.open_rows(settings, 0, rows, self.ROWS, tokenizer, self.BLOCK)

    def test_rows_are_those_of_their_texts(self, open_rows, source, tokenizer):
        """Row r has the texts r, r + 4, ..., one after the other."""
        blocks = open_rows(range(self.ROWS))
        batches = torch.stack([blocks.next_batch() for _ in range(self.BATCHES)])
        assert batches.shape == (self.BATCHES, self.ROWS, self.BLOCK)
        for row in range(self.ROWS):
            if source == "problems":
                problems = Problems(0, "train")
                examples = [Example(problems[i].question, problems[i].answer) for i in range(row, 60, self.ROWS)]
            else:
                examples = [Example(f"{i}?", str(i)) for i in range(row, 60, self.ROWS)]
            text = "".join(f"{example.prompt}\n{example.answer}</s>" for example in examples)
            expected = tokenizer(text, add_special_tokens=False)["input_ids"][: self.BATCHES * self.BLOCK]
            assert batches[:, row].flatten().tolist() == expected

    def test_processes_read_parts_of_one_batch(self, open_rows):
        whole, parts = open_rows(range(4)), [open_rows(range(0, 1)), open_rows(range(1, 4))]
        for _ in range(self.BATCHES):
            assert torch.equal(whole.next_batch(), torch.cat([part.next_batch() for part in parts]))

    def test_goes_on_where_other_processes_stopped(self, open_rows):
        parts = [open_rows(range(0, 2)), open_rows(range(2, 4))]
        for part in parts:
            for _ in range(self.BATCHES):
                part.next_batch()
        states = json.loads(json.dumps(parts[0].state_dict() | parts[1].state_dict()))
        whole = open_rows(range(4))
        whole.load_state_dict(states)
        for _ in range(30):  # over the end of the files
            assert torch.equal(whole.next_batch(), torch.cat([part.next_batch() for part in parts]))
        assert whole.epoch == max(part.epoch for part in parts)


def test_fewer_texts_than_rows(tmp_path, tokenizer):
    blocks = stream.open_rows(file_settings(tmp_path, 3), 0, range(4), 4, tokenizer, 8)
    with pytest.raises(InputError, match="--batch-size 4"):
        blocks.next_batch()


def test_texts_of_one_column(tmp_path, tokenizer):
    settings = file_settings(tmp_path, 3)
    settings = pretrain_distributed.ComputedSettings(**{**vars(settings), "text_column": "question"})
    texts = stream.training_texts(settings, 0)
    tokens = [token for text in texts for token in stream.encode(tokenizer, [text])[0]]
    assert tokenizer.decode(tokens) == "0?</s>1?</s>2?</s>"


@pytest.mark.parametrize("overrides", [{}, {"backbone": "qwen3_moe"}, {"n_shared_experts": None, "inner_iter": 3}])
def test_flops_of_a_step(overrides):
    """Those that torch counts, which attends to whole sequences, and runs one pass of three."""
    model = tiny_model(first_k_dense_replace=1, **overrides)
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")  # not every kernel is counted
    config, length = model.config, 16
    with FlopCounterMode(display=False) as counter:
        model(random_ids(1, length), use_cache=False)
    is_latent = config.kv_lora_rank is not None
    width = config.qk_head_dim + config.v_head_dim if is_latent else 2 * config.head_dim
    later_tokens = config.num_hidden_layers * config.num_attention_heads * width * length
    expected = 3 * (counter.get_total_flops() / length - later_tokens)
    assert distributed.training_flops_per_token(config, length) == pytest.approx(expected, rel=0.02)  # norms


@requires_native
def test_bytes_that_experts_exchange():
    layout = DistributedConfig(fsdp_size=4, ep_size=4)
    config = tiny_config(inner_iter=3, num_hidden_layers=2, num_experts_per_tok=2)
    sent = 0
    for _ in range(2 * 3):  # layers and iterations
        for _ in ("there", "back", "gradient there", "gradient back"):
            sent += 100 * 2 * config.hidden_size * 4 * 3 // 4  # tokens of a process, experts, elements, to others
    assert distributed.exchanged_bytes(config, layout, 400, 4) == sent


def test_checkpoints_are_of_one_moment():
    """What is written while training goes on does not change."""
    state = {"model": {"weight": torch.ones(3)}, "optimizer": {"lr": 0.1}}
    staged = CopyingStager().stage(state)
    state["model"]["weight"].zero_()
    assert staged["model"]["weight"].tolist() == [1, 1, 1] and staged["optimizer"] == {"lr": 0.1}


def test_learning_rate():
    settings = pretrain_distributed.ComputedSettings(output_dir=Path(), lr=1.0, warmup_steps=2, steps=6)
    rates = [pretrain_distributed.learning_rate(settings, step) for step in range(6)]
    assert rates == pytest.approx([0, 0.5, 1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4])
