# Copyright 2026 The CoE Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Pre-trains a Chain-of-Experts model from scratch with transformers' `Trainer`.

    python examples/pretrain.py --output-dir runs/demo
    python examples/pretrain.py --output-dir runs/gsm8k --data train.parquet --eval-data test.parquet
    python examples/pretrain.py --output-dir runs/gsm8k --data train.parquet --eval-data test.parquet --resume
    python examples/pretrain.py --output-dir runs/more --model runs/demo/model --seed 1

Data are pairs of a prompt and an answer: the built-in word problems of `arithmetic.py`, a parquet or JSON-lines file,
or a data set of the Hub. The pairs are tokenised, joined by the end-of-sequence token and cut into blocks; the trained
model is saved, loaded again and asked to solve held-out problems.

A run that was killed at any moment goes on with `--resume` and, on the same machine with the same number of threads,
computes bit for bit what it would have computed without the interruption. The output folder holds

    run.json        the settings, and a fingerprint of the data, that a resumed run must share
    tokenizer/      the tokenizer of the run
    checkpoint-N/   the two newest checkpoints
    model/          the trained model with its tokenizer
    results.json    held-out losses, exact match, sample solutions, the log of every step
    loss_curve.png  the losses as a picture
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from arithmetic import Problems
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from matplotlib.figure import Figure
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME

from modeling_coe import CoeConfig, CoeForCausalLM


RESIDUAL_FLAGS = {
    "inner": {},
    "outer": {"inner_residual": False, "outer_residual": True},
    "both": {"outer_residual": True},
    "init": {"inner_residual": False, "init_residual": True},
    "prenorm": {"prenorm_residual": True},
}
FILE_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
END_TOKEN, PAD_TOKEN = "<|endoftext|>", "<|pad|>"
TOKENIZER_EXAMPLES = 10_000  # more text does not change a small vocabulary
POSITIVE_OPTIONS = (
    *("block_size", "hidden_size", "num_layers", "num_heads"),
    *("steps", "batch_size", "log_steps", "eval_steps", "eval_blocks", "save_steps"),
    *("num_problems", "max_new_tokens"),
)
# Options that a given model answers.
SHAPE_OPTIONS = (
    *("tokenizer", "vocab_size", "hidden_size", "num_layers", "num_heads", "num_experts", "shared_experts"),
    *("expert_width", "top_k", "iterations", "residual", "shared_router", "aux_loss", "init_range"),
)
# Options that say where a run writes and how it starts, not what it computes.
START_OPTIONS = {"output_dir", "resume", "overwrite"}


class InputError(ValueError):
    """What the user gave does not work; the message names the option, its value and the remedy."""


class Example(NamedTuple):
    """One training text: a prompt and how to continue it."""

    prompt: str
    answer: str


class Corpus(NamedTuple):
    """Training texts, possibly without end, and held-out texts by the name of their split."""

    train: Iterable[Example]
    held_out: dict[str, Iterable[Example]]


# ---- Options --------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line and checks what can be checked without data."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    run = parser.add_argument_group("run")
    run.add_argument("--output-dir", type=Path, required=True, help="folder for everything the run writes")
    run.add_argument("--resume", action="store_true", help="go on with the run of the output folder")
    run.add_argument("--overwrite", action="store_true", help="delete the run of the output folder and start anew")
    run.add_argument("--seed", type=int, default=0, help="of the data, the weights and the order of the blocks")

    data = parser.add_argument_group("data")
    data.add_argument("--data", help="parquet or JSON-lines file, folder or Hub name; built-in problems if not given")
    data.add_argument("--data-config", help="configuration of a Hub data set")
    data.add_argument("--train-split", default="train", help="split of a folder or Hub data set to train on")
    data.add_argument("--eval-data", help="held-out file, folder or Hub name; a part of the data if not given")
    data.add_argument("--eval-split", default="test", help="split of a held-out folder or Hub data set")
    data.add_argument("--eval-fraction", type=float, default=0.05, help="part held out if no --eval-data is given")
    data.add_argument("--prompt-column", default="question")
    data.add_argument("--answer-column", default="answer")
    data.add_argument("--tokenizer", help="folder or Hub name; a byte-level BPE is trained if not given")
    data.add_argument("--vocab-size", type=int, default=1024, help="of the tokenizer that is trained")
    data.add_argument("--block-size", type=int, default=128, help="tokens in a training sequence")

    model = parser.add_argument_group("model")
    model.add_argument("--model", help="folder or Hub name of a CoE model to go on with; its shape is then given")
    model.add_argument("--hidden-size", type=int, default=128)
    model.add_argument("--num-layers", type=int, default=2)
    model.add_argument("--num-heads", type=int, default=4)
    model.add_argument("--num-experts", type=int, default=8, help="routed experts (n_routed_experts)")
    model.add_argument("--shared-experts", type=int, default=1, help="experts for every token (n_shared_experts)")
    model.add_argument("--expert-width", type=int, default=64, help="of one expert (moe_intermediate_size)")
    model.add_argument("--top-k", type=int, default=2, help="experts per token and iteration (num_experts_per_tok)")
    model.add_argument("--iterations", type=int, default=2, help="length of the chain (inner_iter)")
    model.add_argument("--residual", choices=sorted(RESIDUAL_FLAGS), default="inner", help="rule of the chain")
    model.add_argument("--shared-router", action="store_true", help="one router for all iterations (use_igate=False)")
    model.add_argument("--aux-loss", type=float, default=0.001, help="weight of the balancing loss (aux_loss_alpha)")
    model.add_argument("--init-range", type=float, help="initializer_range; sqrt(2 / (5 hidden_size)) if not given")

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=1200)
    training.add_argument("--batch-size", type=int, default=16, help="blocks per step")
    training.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    training.add_argument("--schedule", choices=("cosine", "constant_with_warmup"), default="cosine")
    training.add_argument("--warmup-steps", type=int, default=50)
    training.add_argument("--weight-decay", type=float, default=0.01)
    training.add_argument("--beta2", type=float, default=0.95, help="of AdamW")
    training.add_argument("--log-steps", type=int, default=10)
    training.add_argument("--eval-steps", type=int, default=100)
    training.add_argument("--eval-blocks", type=int, default=64, help="blocks of each held-out split to evaluate")
    training.add_argument("--save-steps", type=int, default=200, help="a multiple of --log-steps")

    generation = parser.add_argument_group("generation")
    generation.add_argument("--num-problems", type=int, default=100, help="problems of each split to solve at the end")
    generation.add_argument("--num-samples", type=int, default=2, help="solutions of each split to print")
    generation.add_argument("--max-new-tokens", type=int, default=128, help="of one solution")

    args = parser.parse_args(argv)
    if args.model is not None:
        for name in SHAPE_OPTIONS:
            if getattr(args, name) != parser.get_default(name):
                raise InputError(
                    f"{option(name)} is {getattr(args, name)}, but --model {args.model} has a shape and a tokenizer "
                    "already. Leave one of the two out."
                )
    check_arguments(args)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raises [`InputError`] where options have no meaning, alone or together."""
    for name in POSITIVE_OPTIONS:
        if getattr(args, name) < 1:
            raise InputError(f"{option(name)} is {getattr(args, name)}; it must be 1 or more.")
    if args.lr <= 0:
        raise InputError(f"--lr is {args.lr}; it must be more than 0.")
    if args.resume and args.overwrite:
        raise InputError("--resume goes on with a run and --overwrite deletes it; give one of them.")
    if not 0 < args.eval_fraction < 1:
        raise InputError(f"--eval-fraction is {args.eval_fraction}; it must lie between 0 and 1.")
    # The rotary part of a head is half as wide as the rest, and even.
    if args.hidden_size % (4 * args.num_heads):
        raise InputError(
            f"--hidden-size is {args.hidden_size}, which --num-heads {args.num_heads} heads cannot share in multiples "
            f"of 4. Choose a multiple of {4 * args.num_heads}."
        )
    # A checkpoint holds no part of an average, so a resumed run could not log the same one.
    if args.save_steps % args.log_steps:
        raise InputError(
            f"--save-steps is {args.save_steps}, which is not a multiple of --log-steps {args.log_steps}: a resumed "
            "run would log another average. Choose a multiple."
        )


def option(name: str) -> str:
    """The command-line spelling of a setting."""
    return "--" + name.replace("_", "-")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options that a resumed run must share with the run it goes on with."""
    return {name: value for name, value in vars(args).items() if name not in START_OPTIONS}


# ---- The output folder ----------------------------------------------------------------------------------------------


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written, and not yet deleted, in full.

    `Trainer` writes the model first (whole or not at all), then the optimizer, the scheduler, the random states and
    last, not atomically, its own state: what can be read there vouches for what came before. Deletion takes the files
    in any order, so all of them must be there.
    """
    needed = (CONFIG_NAME, "model.safetensors", OPTIMIZER_NAME, SCHEDULER_NAME, "rng_state.pth", TRAINER_STATE_NAME)
    if not all((checkpoint / name).is_file() for name in needed):
        return False
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return False
    return state["global_step"] == checkpoint_step(checkpoint)


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoints_in(output_dir: Path) -> list[Path]:
    """All checkpoints of a run, complete or not, oldest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=checkpoint_step)


def newest_complete_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint to go on from. What a killed run left half written is deleted, with a message."""
    checkpoints = checkpoints_in(output_dir)
    incomplete = [path for path in checkpoints if not is_complete(path)]
    # `save_pretrained` collects its files in such folders.
    leftovers = [*output_dir.glob("model/.*.partial"), *output_dir.glob("model/.*.replaced")]
    for path in incomplete + leftovers:
        print(f"Deleting {path.relative_to(output_dir)}, which was not written in full.")
        shutil.rmtree(path)
    complete = [path for path in checkpoints if path not in incomplete]
    return complete[-1] if complete else None


def check_output_dir(args: argparse.Namespace) -> None:
    """Raises [`InputError`] where the output folder holds another run, or one that should not be lost."""
    if not is_resumable(args):
        if checkpoints_in(args.output_dir) and not args.overwrite:
            raise InputError(
                f"--output-dir {args.output_dir} already holds checkpoints of a run. Go on with it by --resume, which "
                "needs its run.json, delete it by --overwrite, or choose another folder."
            )
        return
    settings = settings_of(args)
    for name, old in read_json(args.output_dir / "run.json")["settings"].items():
        if settings.get(name) != old:
            raise InputError(
                f"{option(name)} is {settings.get(name)!r}, but the run in {args.output_dir} has {old!r}. Resume with "
                "the same settings, or start another run in another folder."
            )


def is_resumable(args: argparse.Namespace) -> bool:
    """Whether to go on with a run. `run.json` is the last file written before training."""
    return args.resume and (args.output_dir / "run.json").is_file()


def start_run(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, fingerprint: str) -> None:
    """Deletes an earlier run if asked to, and writes the tokenizer and `run.json`."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.overwrite:
        for folder in [*checkpoints_in(args.output_dir), args.output_dir / "tokenizer", args.output_dir / "model"]:
            if folder.exists():
                shutil.rmtree(folder)
        for name in ("results.json", "loss_curve.png"):
            (args.output_dir / name).unlink(missing_ok=True)
    # Never beside a tokenizer of another run.
    (args.output_dir / "run.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(args.output_dir / "tokenizer")
    write_json(args.output_dir / "run.json", {"settings": settings_of(args), "data_fingerprint": fingerprint})


def check_fingerprint(args: argparse.Namespace, fingerprint: str) -> None:
    """Raises [`InputError`] where the data of a resumed run are not those it began with."""
    old = read_json(args.output_dir / "run.json")["data_fingerprint"]
    if fingerprint != old:
        raise InputError(
            f"The data have fingerprint {fingerprint}, but the run in {args.output_dir} has {old}: the content of "
            f"--data {args.data} or --eval-data {args.eval_data} has changed. Restore it, or start another run."
        )


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_suffix(".partial.json")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


# ---- Data -----------------------------------------------------------------------------------------------------------


class ArithmeticExamples:
    """The endless built-in problems of one split. Every iteration starts at the first one."""

    def __init__(self, seed: int, split: str):
        self.problems = Problems(seed, split)

    def __iter__(self):
        return (Example(problem.question, problem.answer) for problem in self.problems)


def load_corpus(args: argparse.Namespace) -> Corpus:
    """The training and held-out texts that the options ask for."""
    if args.data is None:
        held_out = {split: ArithmeticExamples(args.seed, split) for split in ("numbers", "templates")}
        return Corpus(ArithmeticExamples(args.seed, "train"), held_out)
    train = open_dataset("data", args.data, args.data_config, args.train_split)
    if args.eval_data is not None:
        train = train.shuffle(seed=args.seed)
        held_out = open_dataset("eval_data", args.eval_data, args.data_config, args.eval_split)
    elif len(train) > 1:
        num_held_out = min(max(1, round(args.eval_fraction * len(train))), len(train) - 1)
        train, held_out = train.train_test_split(test_size=num_held_out, seed=args.seed).values()
    else:
        raise InputError(f"--data {args.data} has a single row: none can be held out. Give more, or --eval-data.")
    return Corpus(read_examples("data", train, args), {"held_out": read_examples("eval_data", held_out, args)})


def open_dataset(name: str, source: str, config: str | None, split: str) -> datasets.Dataset:
    """Opens what the option `name` asks for: a file or folder where one exists, else a data set of the Hub."""
    path = Path(source)
    if path.suffix in FILE_FORMATS and not path.exists():
        raise InputError(f"{option(name)} {source} does not exist. Give an existing file, or the name of a data set.")
    if path.is_file() and path.suffix not in FILE_FORMATS:
        raise InputError(f"{option(name)} {source} is no {', '.join(FILE_FORMATS)} file. Convert it to one of them.")
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{option(name)} {source} is empty. Give a file with rows.")
    try:
        if path.is_file():
            dataset = load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train")
        else:
            dataset = load_dataset(source, config, split=split)
    except (DatasetsError, OSError, ValueError) as error:
        raise InputError(
            f"{option(name)} {source} (split {split!r}, configuration {config!r}) cannot be read: {error}. Give a "
            f"readable {', '.join(FILE_FORMATS)} file, a folder, or a data set that can be reached."
        ) from error
    if len(dataset) == 0:
        raise InputError(f"{option(name)} {source} has no rows. Give data with rows.")
    return dataset


def read_examples(name: str, dataset: datasets.Dataset, args: argparse.Namespace) -> list[Example]:
    """The prompts and answers of a data set."""
    for column_option in ("prompt_column", "answer_column"):
        column = getattr(args, column_option)
        if column not in dataset.column_names:
            raise InputError(
                f"{option(column_option)} is {column!r}, but {option(name)} has the columns "
                f"{', '.join(dataset.column_names)}. Choose one of them."
            )
    examples = []
    for row, (prompt, answer) in enumerate(zip(dataset[args.prompt_column], dataset[args.answer_column], strict=True)):
        for column, value in ((args.prompt_column, prompt), (args.answer_column, answer)):
            if value is None or value == "":
                raise InputError(f"{option(name)} has no {column!r} in row {row}: {value!r}. Remove or fill this row.")
        examples.append(Example(str(prompt), str(answer)))
    return examples


def train_tokenizer(examples: Iterable[Example], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE with one token per digit (the space before a number included), so that all numbers are
    read and written alike."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 2
    if vocab_size < smallest:
        raise InputError(f"--vocab-size is {vocab_size}; bytes and special tokens need {smallest} or more.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN, PAD_TOKEN],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    texts = (f"{example.prompt}\n{example.answer}" for example in islice(examples, TOKENIZER_EXAMPLES))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_TOKEN,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        padding_side="left",  # generation continues at the right end
        model_input_names=["input_ids", "attention_mask"],
    )


def load_tokenizer(source: str | Path, given_by: str = "--tokenizer") -> PreTrainedTokenizerBase:
    """Loads a tokenizer and makes sure that it can end texts and pad prompts."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    except (OSError, ValueError) as error:
        raise InputError(f"{given_by} {source}: the tokenizer cannot be loaded: {error}") from error
    if tokenizer.eos_token is None:
        raise InputError(
            f"{given_by} {source}: the tokenizer has no `eos_token`, which ends every text. Set it in its "
            "tokenizer_config.json, or leave the option out to train a tokenizer."
        )
    if tokenizer.pad_token is None:
        if given_by == "--model":  # whose vocabulary has no room for another
            tokenizer.pad_token = tokenizer.eos_token
        else:  # not the end token: the embedding of the padding token is never trained
            tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def choose_tokenizer(args: argparse.Namespace, corpus: Corpus) -> PreTrainedTokenizerBase:
    """The tokenizer of the run: its own if it is resumed, else the one asked for, else one trained on the data."""
    if is_resumable(args):
        return load_tokenizer(args.output_dir / "tokenizer")
    if args.model is not None:
        return load_tokenizer(args.model, "--model")
    if args.tokenizer is not None:
        return load_tokenizer(args.tokenizer)
    return train_tokenizer(corpus.train, args.vocab_size)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> list[list[int]]:
    """Prompts as the model sees them, in training and when it solves them: on a line of their own."""
    return tokenizer([f"{example.prompt}\n" for example in examples], add_special_tokens=False)["input_ids"]


def pack(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, block_size: int, max_blocks: int
) -> torch.Tensor:
    """Joins texts by the end-of-sequence token and cuts them into blocks; what does not fill a block is dropped.

    Prompt and answer are tokenised apart, so that a prompt alone has the same tokens when the model solves it.

    Args:
        examples (`Iterable[Example]`): Texts, as many as are needed of them in their order.
        tokenizer (`PreTrainedTokenizerBase`): With an `eos_token`.
        block_size (`int`): Tokens in a block.
        max_blocks (`int`): Number of blocks wanted; fewer where the texts end before.

    Returns:
        `torch.Tensor`: Token ids (blocks, block_size).
    """
    tokens: list[int] = []
    examples = iter(examples)
    while len(tokens) < max_blocks * block_size and (batch := list(islice(examples, 1000))):
        answers = tokenizer([example.answer for example in batch], add_special_tokens=False)["input_ids"]
        for prompt, answer in zip(encode_prompts(tokenizer, batch), answers, strict=True):
            tokens += [*prompt, *answer, tokenizer.eos_token_id]
    num_blocks = min(len(tokens) // block_size, max_blocks)
    return torch.tensor(tokens[: num_blocks * block_size]).view(num_blocks, block_size)


class Blocks(torch.utils.data.Dataset):
    """Packed blocks as `Trainer` wants them. Their number and order are fixed, which makes resuming exact."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def pack_corpus(
    args: argparse.Namespace, corpus: Corpus, tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Packs as many training texts as the run reads, or all that fill batches, and `eval_blocks` of each split."""
    train = pack(corpus.train, tokenizer, args.block_size, args.steps * args.batch_size)
    train_batches = len(train) // args.batch_size
    if train_batches == 0:
        raise InputError(
            f"--data {args.data} fills {len(train)} blocks of --block-size {args.block_size} tokens, fewer than the "
            f"--batch-size {args.batch_size} of one step. Give more data, or choose smaller blocks or batches."
        )
    held_out = {
        split: pack(examples, tokenizer, args.block_size, args.eval_blocks)
        for split, examples in corpus.held_out.items()
    }
    for split, blocks in held_out.items():
        if len(blocks) == 0:
            raise InputError(
                f"The held-out split {split!r} does not fill one block of --block-size {args.block_size} tokens. "
                f"Hold out more (--eval-fraction {args.eval_fraction}, --eval-data {args.eval_data}), or choose "
                "smaller blocks."
            )
    return train[: train_batches * args.batch_size], held_out


def fingerprint_of(train: torch.Tensor, held_out: dict[str, torch.Tensor]) -> str:
    """A short hash of all token ids."""
    digest = hashlib.sha256(train.numpy())
    for blocks in held_out.values():
        digest.update(blocks.numpy())
    return digest.hexdigest()[:16]


# ---- Model and training ---------------------------------------------------------------------------------------------


def build_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> CoeConfig:
    """The configuration of the given model, or the one that the options ask for, with the head sizes in the paper's
    proportions to the hidden size."""
    if args.model is not None:
        return load_given_model(args, AutoConfig)
    head_dim = args.hidden_size // args.num_heads
    fields = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": max(2048, args.block_size),
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": args.num_heads,
        "q_lora_rank": None,
        "kv_lora_rank": args.hidden_size // 2,
        "qk_nope_head_dim": head_dim,
        "qk_rope_head_dim": head_dim // 2,
        "v_head_dim": head_dim,
        "n_routed_experts": args.num_experts,
        "n_shared_experts": args.shared_experts,
        "moe_intermediate_size": args.expert_width,
        "num_experts_per_tok": args.top_k,
        "inner_iter": args.iterations,
        "use_igate": not args.shared_router,
        "aux_loss_alpha": args.aux_loss,
        "initializer_range": args.init_range or (2 / (5 * args.hidden_size)) ** 0.5,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    try:
        return CoeConfig(**fields, **RESIDUAL_FLAGS[args.residual])
    except ValueError as error:
        raise InputError(f"{error} (--help tells which option sets which field.)") from error


def load_given_model(args: argparse.Namespace, auto_class: type) -> CoeConfig | CoeForCausalLM:
    """The model of `--model`, or only its configuration.

    Raises:
        InputError: It cannot be loaded, or is no Chain-of-Experts model.
    """
    try:
        config = AutoConfig.from_pretrained(args.model)
        loaded = config if auto_class is AutoConfig else auto_class.from_pretrained(args.model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {args.model} cannot be loaded: {error}") from error
    if not isinstance(config, CoeConfig):
        raise InputError(
            f"--model {args.model} is a {config.model_type!r} model, not a chain of experts. Convert it with "
            "`coe-convert`."
        )
    return loaded


class Stopwatch(TrainerCallback):
    """Times the training steps of this process; evaluation and saving happen between them."""

    def __init__(self):
        self.steps = 0
        self.seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self.begin
        self.steps += 1


def training_arguments(args: argparse.Namespace, evaluate_first: bool) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(args.output_dir),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.lr,
        lr_scheduler_type=args.schedule,
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        adam_beta2=args.beta2,
        bf16=cuda and torch.cuda.is_bf16_supported(),
        use_cpu=not cuda,
        seed=args.seed,
        data_seed=args.seed,
        logging_steps=args.log_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=args.eval_steps,
        eval_on_start=evaluate_first,  # the loss before training, kept in every checkpoint's log
        save_steps=args.save_steps,
        save_total_limit=2,
        report_to="none",
    )


class Run(NamedTuple):
    """A finished training run: the model, the whole log, and the speed of the part this process did, if any."""

    model: CoeForCausalLM
    log: list[dict[str, float]]
    tokens_per_second: float | None


def train(
    args: argparse.Namespace,
    config: CoeConfig,
    train_blocks: torch.Tensor,
    held_out_blocks: dict[str, torch.Tensor],
    checkpoint: Path | None,
) -> Run:
    """Trains from the start, or from a checkpoint, to the last step."""
    print(f"{config.total_parameters:,} parameters, {config.active_parameters:,} of them active for a token")
    if checkpoint is not None and checkpoint_step(checkpoint) == args.steps:
        # `Trainer` would take one step more.
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        return Run(model, TrainerState.load_from_json(checkpoint / TRAINER_STATE_NAME).log_history, None)
    set_seed(args.seed)
    model = CoeForCausalLM(config) if args.model is None else load_given_model(args, AutoModelForCausalLM)
    stopwatch = Stopwatch()
    trainer = Trainer(
        model=model,
        args=training_arguments(args, evaluate_first=checkpoint is None),
        train_dataset=Blocks(train_blocks),
        eval_dataset={split: Blocks(blocks) for split, blocks in held_out_blocks.items()},
        callbacks=[stopwatch],
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    tokens = stopwatch.steps * train_blocks[: args.batch_size].numel()
    return Run(model, trainer.state.log_history, tokens / stopwatch.seconds)


# ---- Results --------------------------------------------------------------------------------------------------------


def unigram_loss(train_blocks: torch.Tensor, blocks: torch.Tensor, vocab_size: int) -> float:
    """Cross-entropy of the frequencies of the training tokens, each counted once more than it occurs, on the tokens
    that the model predicts: all of a block but the first."""
    counts = train_blocks.flatten().bincount(minlength=vocab_size).double() + 1
    return -(counts / counts.sum()).log()[blocks[:, 1:]].mean().item()


def held_out_table(
    log: list[dict[str, float]], train_blocks: torch.Tensor, held_out_blocks: dict[str, torch.Tensor], vocab_size: int
) -> dict[str, dict[str, float]]:
    """Losses of the model before training, the unigram baseline and the trained model by split."""
    table = {}
    for split, blocks in held_out_blocks.items():
        losses = [entry[f"eval_{split}_loss"] for entry in log if f"eval_{split}_loss" in entry]
        unigram = unigram_loss(train_blocks, blocks, vocab_size)
        table[split] = {"before": losses[0], "unigram": unigram, "trained": losses[-1]}
    return table


def save_and_reload(
    model: CoeForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, tokens: torch.Tensor
) -> tuple[CoeForCausalLM, PreTrainedTokenizerBase, float]:
    """Saves model and tokenizer, loads them from disk and checks that the model computes the same logits.

    Returns:
        The loaded model, on the device of the trained one, the loaded tokenizer and the largest difference of a logit.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).to(model.device)
    tokens = tokens.to(model.device)
    with torch.no_grad():
        difference = (model.eval()(tokens).logits - loaded.eval()(tokens).logits).abs().max().item()
    if not difference < 1e-4:
        raise RuntimeError(f"The model loaded from {folder} differs from the trained one by {difference} in a logit.")
    return loaded, AutoTokenizer.from_pretrained(folder), difference


def final_answer(text: str) -> str | None:
    """The number after `####`, without thousands separators, or `None` where there is none."""
    match = re.search(r"####\s*(-?[\d.,]*\d)", text)
    return match[1].replace(",", "") if match else None


@torch.no_grad()
def solve(
    model: CoeForCausalLM, tokenizer: PreTrainedTokenizerBase, examples: list[Example], max_new_tokens: int
) -> list[str]:
    """Greedy continuations of the prompts, padded on the left, in batches."""
    solutions = []
    for start in range(0, len(examples), 64):
        prompts = encode_prompts(tokenizer, examples[start : start + 64])
        batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        solutions += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return solutions


def exact_match(examples: list[Example], solutions: list[str]) -> float | None:
    """Share of the solutions with the right final answer, or `None` where the data mark no final answers."""
    expected = [final_answer(example.answer) for example in examples]
    if None in expected:
        return None
    return sum(final_answer(text) == answer for text, answer in zip(solutions, expected, strict=True)) / len(expected)


def plot_losses(log: list[dict[str, float]], table: dict[str, dict[str, float]], path: Path) -> None:
    """Draws the training and held-out losses over the steps, with those before training and of unigrams as lines."""
    figure = Figure(figsize=(8, 5))  # drawn by Agg, which needs no display
    axes = figure.subplots()
    training = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    axes.plot(*zip(*training, strict=True), color="0.6", linewidth=1, label="training, with balancing loss")
    for color, (split, losses) in enumerate(table.items()):
        key = f"eval_{split}_loss"
        evaluated = [(entry["step"], entry[key]) for entry in log if key in entry]
        axes.plot(*zip(*evaluated, strict=True), f"C{color}o-", markersize=3, label=f"held out: {split}")
        axes.axhline(losses["before"], color=f"C{color}", linestyle=":", label=f"before training: {split}")
        axes.axhline(losses["unigram"], color=f"C{color}", linestyle="--", label=f"unigram: {split}")
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", title="Chain-of-Experts pre-training")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def print_report(results: dict[str, Any]) -> None:
    """Prints the losses, the speed, some solutions and the exact match."""
    print(f"\n{'held-out loss':<16}{'before':>12}{'unigram':>12}{'trained':>12}{'exact match':>14}")
    for split, losses in results["held_out_loss"].items():
        match = results["exact_match"][split]
        shown = "-" if match is None else f"{match:.1%}"
        print(f"{split:<16}" + "".join(f"{loss:>12.4f}" for loss in losses.values()) + f"{shown:>14}")
    for split, samples in results["samples"].items():
        for sample in samples:
            print(f"\n[{split}] {sample['prompt']}\n--- model\n{sample['solution']}\n--- expected\n{sample['answer']}")
    speed = results["tokens_per_second"]
    print(f"\ntraining speed: {'nothing was trained' if speed is None else f'{speed:,.0f} tokens per second'}")


def report(
    args: argparse.Namespace,
    run: Run,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    train_blocks: torch.Tensor,
    held_out_blocks: dict[str, torch.Tensor],
) -> None:
    """Saves the model, solves held-out problems with the saved one and writes `results.json` and `loss_curve.png`."""
    first_block = next(iter(held_out_blocks.values()))[:1]
    model, tokenizer, difference = save_and_reload(run.model, tokenizer, args.output_dir / "model", first_block)
    print(f"The model loaded from disk agrees with the trained one: logits differ by at most {difference:.1e}.")
    table = held_out_table(run.log, train_blocks, held_out_blocks, len(tokenizer))
    accuracy, samples = {}, {}
    for split, examples in corpus.held_out.items():
        problems = list(islice(examples, args.num_problems))
        solutions = solve(model, tokenizer, problems, args.max_new_tokens)
        accuracy[split] = exact_match(problems, solutions)
        samples[split] = [
            {"prompt": problem.prompt, "solution": solution, "answer": problem.answer}
            for problem, solution in islice(zip(problems, solutions, strict=True), args.num_samples)
        ]
    results = {
        "settings": settings_of(args),
        "parameters": {"total": model.config.total_parameters, "active": model.config.active_parameters},
        "training_tokens": args.steps * args.batch_size * args.block_size,
        "held_out_loss": table,
        "exact_match": accuracy,
        "tokens_per_second": run.tokens_per_second,
        "samples": samples,
        "log_history": run.log,
    }
    write_json(args.output_dir / "results.json", results)
    plot_losses(run.log, table, args.output_dir / "loss_curve.png")
    print_report(results)


def pretrain(args: argparse.Namespace) -> None:
    """The whole run, from data to report."""
    check_output_dir(args)
    corpus = load_corpus(args)
    tokenizer = choose_tokenizer(args, corpus)
    config = build_config(args, tokenizer)
    train_blocks, held_out_blocks = pack_corpus(args, corpus, tokenizer)
    fingerprint = fingerprint_of(train_blocks, held_out_blocks)
    checkpoint = None
    if is_resumable(args):
        check_fingerprint(args, fingerprint)
        checkpoint = newest_complete_checkpoint(args.output_dir)
    else:
        start_run(args, tokenizer, fingerprint)
    if args.resume:
        print(f"Resuming at {checkpoint.name}." if checkpoint else "No complete checkpoint: starting at step 0.")
    run = train(args, config, train_blocks, held_out_blocks, checkpoint)
    report(args, run, corpus, tokenizer, train_blocks, held_out_blocks)


def main(argv: list[str] | None = None) -> None:
    try:
        pretrain(parse_arguments(argv))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
