"""The training examples in several processes, with gloo. They compute what one does, with DDP and with FSDP2,
write what one writes, and go on with each other's runs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import finetune_lora
import pretrain
import pytest
import sft
import torch
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from modeling_coe import CoeForCausalLM
from modeling_coe.command_line import InputError

from .helpers import ROOT
from .ranks import run_ranks, run_script
from .test_pretrain import has_checkpoint


SCRIPTS = {"pretrain": pretrain, "finetune_lora": finetune_lora, "sft": sft}
SHAPE = (
    *("--hidden-size", "16", "--num-layers", "2", "--num-heads", "2", "--num-experts", "4", "--expert-width", "8"),
    *("--vocab-size", "300"),
)
BLOCKS = ("--block-size", "32", "--eval-blocks", "8")
OPTIONS = {
    "pretrain": (*SHAPE, *BLOCKS, "--aux-loss", "0.5"),
    "finetune_lora": (*BLOCKS, "--lora-r", "4", "--expert-r", "2"),
    "sft": ("--max-length", "256", "--train-examples", "64", "--eval-examples", "8"),
}
SHORT = (
    *("--steps", "8", "--batch-size", "4", "--lr", "1e-2", "--warmup-steps", "2", "--log-steps", "1"),
    *("--eval-steps", "4", "--save-steps", "4", "--num-problems", "2", "--num-samples", "1", "--max-new-tokens", "4"),
)
ENGINES = {
    "DDP": {},
    "FSDP2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "CoeDecoderLayer",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    },
    "FSDP2 full": {},
}
ENGINES["FSDP2 full"] = ENGINES["FSDP2"] | {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}


def command(script: str, engine: str, *options: str | Path) -> list[str | Path]:
    through = [] if engine == "DDP" else [ROOT / "tests" / "fsdp_on_cpu.py"]
    return [*through, ROOT / "examples" / f"{script}.py", *options]


def start(script: str, engine: str, processes: int, *options: str | Path) -> subprocess.Popen:
    """By torchrun, for what happens when a process ends."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | ENGINES[engine] | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}"}
    return subprocess.Popen(
        [*launch, *command(script, engine, *options)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(script: str, engine: str, processes: int, *options: str | Path, code: int = 0) -> str:
    """What processes print that end with a code."""
    words = command(script, engine, *options)
    ranks = run_ranks(run_script, *words, processes=processes, environment=ENGINES[engine])
    output = ranks.stdout + ranks.stderr
    assert ranks.exit_codes == [code] * processes, output
    return output


def log_of(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())["log_history"]


def assert_same_losses(folder: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """All that was logged of losses, in training and held out. Balancing losses that are logged apart are means over
    the conversations of a process, which are not as many as another's."""
    for entry, other in zip(log_of(folder), log_of(expected), strict=True):
        names = [name for name in other if name.endswith("loss") and name != "train_loss"]  # of a resumed part alone
        assert entry["step"] == other["step"] and entry.keys() >= set(names)
        for name in names:
            error = 1e-2 if name.endswith("aux_loss") else tolerance
            assert entry[name] == pytest.approx(other[name], abs=error), (entry["step"], name)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model for adapters and conversations."""
    folder = tmp_path_factory.mktemp("base")
    pretrain.main(["--output-dir", str(folder), *OPTIONS["pretrain"], *SHORT, "--aux-loss", "0.001"])
    return folder / "model"


def options_of(script: str, base: Path, output_dir: Path) -> list[str]:
    model = [] if script == "pretrain" else ["--model", str(base)]
    return ["--output-dir", str(output_dir), *model, *OPTIONS[script], *SHORT]


@pytest.fixture(scope="module")
def single(tmp_path_factory, base) -> dict[str, Path]:
    """Every script in one process."""
    folder = tmp_path_factory.mktemp("single")
    for name, script in SCRIPTS.items():
        script.main(options_of(name, base, folder / name))
    return {name: folder / name for name in SCRIPTS}


@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_compute_what_one_does(script, engine, base, single, tmp_path):
    output = run(script, engine, 2, *options_of(script, base, tmp_path))
    assert_same_losses(tmp_path, single[script], 1e-4 if script == "sft" else 1e-5)
    assert len(re.findall("held-out loss", output)) == len(re.findall("training speed", output)) == 1
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in single[script].iterdir()}
    for folder in ("model", "tokenizer", *(["adapter"] if script == "finetune_lora" else [])):
        files = [{path.name for path in (run / folder).iterdir()} for run in (tmp_path, single[script])]
        assert files[0] == files[1]
    saved, expected = (load_file(run / "model" / "model.safetensors") for run in (tmp_path, single[script]))
    assert saved.keys() == expected.keys()
    for name in saved:  # a step of Adam is as long as the learning rate, also where the sign of a gradient is rounding
        torch.testing.assert_close(saved[name], expected[name], atol=2e-2, rtol=0, msg=name)
    checkpoint = tmp_path / "checkpoint-8"
    if engine == "DDP" and script != "finetune_lora":
        trained = load_file(checkpoint / "model.safetensors")
        assert all(torch.equal(saved[name], trained[name]) for name in saved)
    assert (checkpoint / "pytorch_model_fsdp_0").is_dir() == (engine == "FSDP2")
    CoeForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("engine, again", [("DDP", 1), ("FSDP2", 4), ("FSDP2 full", 2)])
def test_a_killed_run_goes_on(engine, again, base, single, tmp_path):
    """One process is killed; then others, of another number too, take the run to its end."""
    options = options_of("pretrain", base, tmp_path)
    process = start("pretrain", engine, 2, *options)
    while process.poll() is None and not has_checkpoint(tmp_path, step=4):
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0, output
    assert not (tmp_path / "results.json").exists(), "the run ended before it could be killed"
    kept = {path.name for path in tmp_path.glob("checkpoint-*") if (path / "trainer_state.json").exists()}
    output = run("pretrain", engine, again, *options, "--resume")
    assert len(re.findall(r"Resuming at checkpoint-\d+\.|starting at step 0", output)) == 1
    assert kept <= {path.name for path in tmp_path.glob("checkpoint-*")}
    assert_same_losses(tmp_path, single["pretrain"])


def test_finished_training_is_reported_by_other_processes(base, single, tmp_path):
    """All steps are done and nothing was saved; and a run of one process goes on in two."""
    options = options_of("finetune_lora", base, tmp_path)
    run("finetune_lora", "FSDP2", 2, *options)
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in ("adapter/adapter_model.safetensors", "results.json"):
        (tmp_path / name).unlink()
    output = run("finetune_lora", "FSDP2", 1, *options, "--resume")
    assert "nothing was trained" in output
    after = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_refused_once(base, single, tmp_path):
    """One line of one process, before anything is written; and a run of another engine stays as it is."""
    options = options_of("pretrain", base, tmp_path / "run")
    process = start("pretrain", "DDP", 3, *options)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and not (tmp_path / "run").exists()
    (line,) = re.findall("^error: .*", output, re.MULTILINE)
    assert line == "error: --batch-size is 4, which 3 processes cannot share equally. Choose a multiple of 3."

    folder = single["pretrain"]
    (folder / "results.json").rename(tmp_path / "results.json")
    (folder / "checkpoint-8").rename(tmp_path / "checkpoint-8")
    files = sorted(folder.rglob("*"))
    output = run("pretrain", "FSDP2", 2, *options_of("pretrain", base, folder), "--resume", code=1)
    assert sorted(folder.rglob("*")) == files
    (line,) = re.findall("^error: .*", output, re.MULTILINE)
    assert line.startswith("error: --resume: checkpoint-4 was written with no engine and is read with FSDP.")
    for name in ("results.json", "checkpoint-8"):
        (tmp_path / name).rename(folder / name)


def test_micro_batches(base, single, tmp_path):
    """A batch in parts has the same losses; a part that does not divide is refused."""
    pretrain.main([*options_of("pretrain", base, tmp_path), "--micro-batch-size", "2"])
    assert_same_losses(tmp_path, single["pretrain"])
    with pytest.raises(InputError, match=r"--micro-batch-size is 3, no divisor of the 4 .* Choose a divisor"):
        pretrain.parse_settings([*options_of("pretrain", base, tmp_path / "other"), "--micro-batch-size", "3"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_options_pass_through_torchrun(script, base, tmp_path):
    """Its parser takes what could be short for an option of its own."""
    options = options_of(script, base, tmp_path)
    told = get_args_parser().parse_args(["--nproc-per-node=2", f"examples/{script}.py", *options])
    assert told.training_script_args == options
