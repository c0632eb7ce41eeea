"""The recipes of the pages, small: each command and Python block runs, and prints what the page shows below it."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
from datasets import Dataset

from .helpers import ROOT, save_llama
from .test_evaluation import COMMAND_LINE


# How a command that begins so is made small: by options that are appended to it, since the last of equal ones counts.
# The demo model keeps its shape, so that the page's counts of parameters can be checked.
TRAINING = "--steps 2 --batch-size 2 --num-problems 2 --max-new-tokens 4"
SMALL = {
    "python examples/pretrain.py": f"{TRAINING} --eval-blocks 2",
    "python examples/pretrain.py --output-dir runs/gsm8k": "--hidden-size 32 --num-layers 1 --vocab-size 300",
    "python examples/finetune_lora.py": f"{TRAINING} --eval-blocks 2",
    "python examples/sft.py": f"{TRAINING} --train-examples 20 --eval-examples 4",
    "python examples/real_model.py": (
        "--model ../llama --steps 2 --train-examples 20 --eval-examples 4 --num-problems 2 --max-new-tokens 4"
    ),
    "python examples/evaluation.py": "--limit 2 --max-new-tokens 4",
    "python examples/routing.py": "",
    "torchrun --nproc-per-node 2 examples/pretrain.py": f"{TRAINING} --eval-blocks 2",
    "torchrun --nproc-per-node 2 examples/finetune_lora.py": f"{TRAINING} --eval-blocks 2 --block-size 64",
    "torchrun --nproc-per-node 4": "--steps 4 --log-steps 4 --eval-steps 1 --eval-blocks 4 --warmup-steps 1",
    "python -c": "",
    "coe-plan": "",
    "coe-convert runs/": "",
    "coe-routing": "--tokens 200",
    "lm-eval run": "--limit 2 --gen_kwargs max_gen_toks=4",
}
# Commands, and names of which Python makes use, that are not run, and why.
MANY = "examples/pretrain_distributed.py --output-dir runs/many --config examples/shapes/small.json"
LAUNCH = "accelerate launch --config_file examples/accelerate"
ASK = "python examples/serve/ask.py --model runs/demo/model"
QUESTION = "Ann has 7 pens. Ann buys 3 packs with 5 pens in each pack. How many pens does Ann have now?"
LOAD = "python examples/serve/load.py --model runs/demo/model --output-dir runs/load --engines vllm transformers"
FLOAT32 = "--vllm-args=--dtype float32 --transformers-args=--dtype float32"
SERVER = ".venv-vllm/bin/python -m vllm.entrypoints.openai.api_server"
CURL = '{"model": "runs/demo/model", "prompt": "Ben has 5 apples.", "max_tokens": 40, "temperature": 0}'
NOT_RUN = {
    f"torchrun --nproc-per-node 2 {MANY} --ep-size 2 --steps 200 --eval-steps 50 --save-steps 50 --resume": (
        "it goes on with a run that was killed; tests/test_pretrain_distributed.py"
    ),
    f"{LAUNCH}/ddp.yaml examples/pretrain.py --output-dir runs/ddp": "it needs GPUs; tests/test_several_processes.py",
    f"{LAUNCH}/fsdp2_sharded.yaml examples/pretrain.py --output-dir runs/fsdp": "likewise",
    f"{ASK} --engine-args=--dtype float32 --prompt {QUESTION}": "it needs vLLM; tests/vllm/test_serve.py",
    f"{ASK} --prompt Ben has 5 apples. --url http://127.0.0.1:8000": "it needs the server of the line above it",
    "transformers chat runs/sft/model http://localhost:8000/v1": "it needs the server of the block above it",
    "vllm serve runs/demo/model --dtype float32 --enable-lora --lora-modules mine=ADAPTER": (
        "it runs until it is stopped; tests/vllm/test_adapters.py"
    ),
    "vllm serve runs/demo/model --dtype float32": "it runs until it is stopped; tests/vllm/test_server_faults.py",
    f"{LOAD} {FLOAT32}": "it needs vLLM; tests/vllm/test_serve.py",
    "make vllm": "it needs the network",
    f"{SERVER} --model runs/demo/model --dtype float32 --gpu-memory-utilization 0.3": (
        "it runs until it is stopped; tests/vllm/test_server_faults.py"
    ),
    f"curl http://localhost:8000/v1/completions -H Content-Type: application/json -d {CURL}": "it needs that server",
    f".venv-vllm/bin/{ASK} --prompt Ben has 5 apples. --url http://localhost:8000": "it needs that server",
    "make test": "it runs this test",
    "pip install -e . -c constraints.txt": "it needs the network",
    "pip install -e .[quantization]": "it needs the network",
    "pip install transformers[serving] -c constraints.txt": "it needs the network",
    "python -c import modeling_coe; from transformers.cli.transformers import main; main() serve runs/sft/model": (
        "it does not end; tests/test_serving.py"
    ),
    "hf upload NAME/coe-demo runs/demo/model": "it needs the network",
    "coe-convert SOURCE OUT --mode split --iterations 2": "not names of folders; `runs/deepseek_v2` is converted",
    "int8_weight_only": "it needs torchao, which the tests' environment leaves out; tests/test_quantization.py",
    "DistributedConfig": "it needs two processes; tests/test_distributed.py",
}
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]


class Block(NamedTuple):
    """A block of a page, and the output that the page shows for it, if any."""

    page: str
    language: str
    code: str
    output: str

    @property
    def commands(self) -> list[list[str]]:
        """Word by word. Quoted line breaks end no command."""
        lines = re.findall(r'(?:"[^"]*"|[^"\n])+', self.code.replace("\\\n", " "))
        commands = [shlex.split(line, comments=True) for line in lines]
        return [demo_command() if words == ["make", "demo"] else words for words in commands if words]

    @property
    def parts(self) -> list[str]:
        """What runs or does not: the commands, or all of the Python."""
        return [self.code] if self.language == "python" else [" ".join(words) for words in self.commands]

    @property
    def makes(self) -> set[str]:
        return set(re.findall(r"--output-dir (\S+)", " ".join(self.parts)))

    @property
    def reads(self) -> set[str]:
        return set(re.findall(r"(runs/\w+)(?:/[\w-]+)?/model", uploaded(" ".join(self.parts))))


def demo_command() -> list[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return shlex.split(re.search(r"^demo:.*\n\t\$\(BIN\)/(.*)$", makefile, re.MULTILINE)[1])


def uploaded(text: str) -> str:
    """The model on the Hub is the folder that was uploaded."""
    return text.replace("NAME/coe-demo", "runs/demo/model")


def blocks(page: str) -> list[Block]:
    """Commands and Python. A block without a language is the output of the last of them."""
    found = []
    text = (ROOT / page).read_text(encoding="utf-8")
    for language, content in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if language in ("bash", "python"):
            found.append(Block(page, language, content, ""))
        elif not language and found:
            found[-1] = found[-1]._replace(output=found[-1].output + content)
    return found


def is_run(part: str) -> bool:
    return part not in NOT_RUN and not any(name in part for name in NOT_RUN if name.isidentifier())


BLOCKS = [block for page in ("README.md", "examples/README.md") for block in blocks(page)]
RECIPES = [block for block in BLOCKS if any(map(is_run, block.parts))]


# ---- Running --------------------------------------------------------------------------------------------------------


def small(words: list[str]) -> list[str]:
    """The command with the options that make it small."""
    given = " ".join(words)
    return [*words, *(word for start, more in SMALL.items() if given.startswith(start) for word in more.split())]


def argv(words: list[str]) -> list[str]:
    """The command by this Python, whatever is on the path."""
    program, *options = words
    if program == "python":
        return [sys.executable, *options]
    if program == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", *options]
    assert program == "lm-eval", program
    return [sys.executable, "-c", COMMAND_LINE, *options]


def run_command(words: list[str], folder: Path) -> str:
    """What it prints. Programs of this project run here, since importing everything anew takes longer than all the
    rest."""
    program, *options = small([uploaded(word) for word in words])
    if program in SCRIPTS:
        module, _, function = SCRIPTS[program].partition(":")
        return run_here(lambda: getattr(import_module(module), function)(options), folder)
    if program == "python" and options[0].startswith("examples/"):
        return run_here(lambda: import_module(Path(options[0]).stem).main(options[1:]), folder)
    environment = {"OMP_NUM_THREADS": "1", "COE_CPU_KERNEL": "mm", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        argv([program, *options]),
        cwd=folder,
        env=os.environ | environment | {"HF_MODULES_CACHE": str(folder / "modules")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, f"{' '.join(words)}\n{process.stdout}{process.stderr}"
    return process.stdout


def run_here(program: Callable[[], object], folder: Path) -> str:
    """What it prints."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as output:
        result = program()
    assert not result, output.getvalue()
    return output.getvalue()


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> Callable[[Block], str]:
    """Runs a block once, after those that make what it reads, and gives what it prints: in a folder where all paths of
    the pages lead somewhere, with a few rows in the columns of GSM8K."""
    folder = tmp_path_factory.mktemp("recipes") / "project"
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    data = folder.parent / "shared" / "data" / "gsm8k"
    data.mkdir(parents=True)
    for split, count in (("train", 200), ("test", 50)):
        rows = [
            {
                "question": f"Ann has {i} pens and buys {i % 7} more. How many pens does Ann have now?",
                "answer": f"Ann has {i} + {i % 7} = {i + i % 7} pens.\n#### {i + i % 7}",
            }
            for i in range(count)
        ]
        Dataset.from_list(rows).to_parquet(data / f"{split}.parquet")
    save_llama(folder.parent / "llama")  # in place of a download

    @cache
    def run(block: Block) -> str:
        for maker in RECIPES:
            if maker != block and maker.makes & block.reads:
                run(maker)
        if block.language == "python":
            return run_here(lambda: exec(compile(block.code, block.page, "exec"), {}), folder)
        return "".join(run_command(words, folder) for words in block.commands if is_run(" ".join(words)))

    return run


# ---- Comparing ------------------------------------------------------------------------------------------------------


def shape(line: str) -> str:
    """A line without its numbers and widths. Counts such as 756,992, which the shape of a model decides, stay; that of
    `runs/gsm8k` is another one here."""

    def number(match: re.Match) -> str:
        is_count = re.fullmatch(r"\d+(,\d{3})+", match[0]) and "runs/gsm8k" not in line
        return match[0] if is_count else "#"

    line = re.sub(r"\b\d+(,\d{3})*(\.\d+)?(e[-+]\d+)?\b", number, line)
    line = re.sub(r"-{3,}", "---", re.sub(r" *\| *", "|", line))
    return " ".join(line.split())


def shapes(text: str) -> list[str]:
    return [shape(line) for line in text.splitlines() if line.strip()]


def shown(block: Block) -> list[str]:
    """Shapes of the lines that the page shows, without a solution, which only a trained model writes; a problem is one
    line, which the page breaks."""
    before, mark, _ = block.output.partition("--- model\n")
    before = re.sub(r"^\[.*[^\n]", lambda problem: problem[0].replace("\n", " "), before, flags=re.M | re.S)
    return shapes(before + mark)


# ---- Tests ----------------------------------------------------------------------------------------------------------


def test_everything_is_run_or_has_a_reason():
    parts = [(block, part) for block in BLOCKS for part in block.parts]
    for block, part in parts:
        known = block.language == "python" or any(part.startswith(start) for start in SMALL)
        assert known or not is_run(part), f"SMALL does not say how to run this, nor NOT_RUN why not: {part}"
    for text in (*SMALL, *NOT_RUN):
        assert any(text in part for _, part in parts), f"no page has {text!r}"


def test_python_registers_the_auto_classes():
    """In this process they are registered already."""
    for block in BLOCKS:
        if block.language == "python":
            assert re.search(r"^(import|from) modeling_coe", block.code, re.MULTILINE), block.code


@pytest.mark.parametrize("block", RECIPES, ids=[" ".join(block.parts[0].split())[:60] for block in RECIPES])
def test_prints_what_the_page_shows(block, printed):
    """All lines, in their order; more may stand between them."""
    text = printed(block)
    lines = iter(shapes(text))
    for line in shown(block):
        assert line in lines, f"{block.page} shows {line!r} below\n{block.code}\nwhich prints\n{text}"
