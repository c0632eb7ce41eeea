# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Pairs of a prompt and an answer: where they come from, their tokenizer, and blocks of their tokens."""

import copy
import reprlib
from collections.abc import Collection, Iterable
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError
from tasks.question_answer import FILE_FORMATS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modeling_coe.command_line import InputError, check_range, loading, one_line, option

from .arithmetic import Problems
from .run_folder import is_resumable, short_hash
from .settings import BlockJobSettings, BlockSettings, DataSettings, JobSettings


END_TOKEN, PAD_TOKEN = "<|endoftext|>", "<|pad|>"
TOKENIZER_EXAMPLES = 10_000  # more text does not change a small vocabulary
PROMPT_AND_ANSWER = ("prompt_column", "answer_column")  # settings that name columns


class Example(NamedTuple):
    """One training text: a prompt, which may be empty, and how to continue it."""

    prompt: str
    answer: str


class Corpus(NamedTuple):
    """Training texts, possibly without end, and held-out texts by the name of their split."""

    train: Iterable[Example]
    held_out: dict[str, Iterable[Example]]


def check_data_options(settings: DataSettings) -> None:
    """Raises [`InputError`] where they have no meaning, alone or together."""
    check_range(settings, "eval_fraction", 0, 1, exclusive=True)
    are_files = is_file(settings.data) and (settings.eval_data is None or is_file(settings.eval_data))
    defaults = {each.name: each.default for each in fields(DataSettings) if each.name != "data"}
    unused = (  # where, which options say nothing, and of what
        (settings.data is None, defaults, "the built-in problems: there is no --data"),
        (settings.eval_data is not None, ["eval_fraction"], f"--eval-data {settings.eval_data}"),
        (settings.eval_data is None, ["eval_split"], "a part of --data: there is no --eval-data"),
        (is_file(settings.data), ["train_split"], f"--data {settings.data}, a file"),
        (is_file(settings.eval_data), ["eval_split"], f"--eval-data {settings.eval_data}, a file"),
        (are_files, ["data_config"], f"--data {settings.data}, a file"),
    )
    for applies, names, what in unused:
        for name in names:
            if applies and getattr(settings, name) != defaults[name]:
                raise InputError(
                    f"{option(name)} is {getattr(settings, name)}, which says nothing of {what}. Leave it out."
                )


def is_file(source: str | None) -> bool:
    return source is not None and Path(source).is_file()


class ArithmeticExamples:
    """The endless built-in problems of one split. Every iteration starts at the first one."""

    def __init__(self, seed: int, split: str):
        self.problems = Problems(seed, split)

    def __iter__(self):
        return (Example(problem.question, problem.answer) for problem in self.problems)


def load_corpus(settings: DataSettings, seed: int) -> Corpus:
    """The training and held-out texts that the options ask for."""
    if settings.data is None:
        held_out = {split: ArithmeticExamples(seed, split) for split in ("numbers", "templates")}
        return Corpus(ArithmeticExamples(seed, "train"), held_out)
    train = open_dataset("data", settings.data, settings.data_config, settings.train_split)
    if settings.eval_data is not None:
        train = train.shuffle(seed=seed)
        held_out = open_dataset("eval_data", settings.eval_data, settings.data_config, settings.eval_split)
    elif len(train) > 1:
        num_held_out = min(max(1, round(settings.eval_fraction * len(train))), len(train) - 1)
        train, held_out = train.train_test_split(test_size=num_held_out, seed=seed).values()
    else:
        raise InputError(f"--data {settings.data} has a single row: none can be held out. Give more, or --eval-data.")
    return Corpus(read_examples("data", train, settings), {"held_out": read_examples("eval_data", held_out, settings)})


def open_dataset(
    name: str, source: str, config: str | None, split: str, streaming: bool = False
) -> Dataset | IterableDataset:
    """Opens what the option `name` asks for: a file or folder where one exists, else a data set of the Hub. Of one to
    be streamed, the first row alone is read."""
    path = Path(source)
    if path.suffix in FILE_FORMATS and not path.exists():
        raise InputError(f"{option(name)} {source} does not exist. Give an existing file, or the name of a data set.")
    if path.is_file() and path.suffix not in FILE_FORMATS:
        raise InputError(f"{option(name)} {source} is no {', '.join(FILE_FORMATS)} file. Convert it to one of them.")
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{option(name)} {source} is empty. Give a file with rows.")
    try:
        if path.is_file():
            file = {"path": FILE_FORMATS[path.suffix], "data_files": str(path), "split": "train"}
            dataset = load_dataset(**file, streaming=streaming)
        else:
            dataset = load_dataset(source, config, split=split, streaming=streaming)
        # A copy of a stream, which knows one position.
        is_empty = next(iter(copy.deepcopy(dataset)), None) is None if streaming else len(dataset) == 0
    except (DatasetsError, OSError, ValueError) as error:
        raise InputError(
            f"{option(name)} {source} (split {split!r}, configuration {config!r}) cannot be read: {one_line(error)} "
            f"Give a readable {', '.join(FILE_FORMATS)} file, a folder, or a data set that can be reached."
        ) from error
    if is_empty:
        raise InputError(f"{option(name)} {source} has no rows. Give data with rows.")
    return dataset


def read_examples(name: str, dataset: Dataset, settings: DataSettings) -> list[Example]:
    """The prompts and answers of a data set."""
    source = f"{option(name)} {getattr(settings, name)}"
    check_columns(source, dataset.column_names, settings, PROMPT_AND_ANSWER)
    names = [getattr(settings, each) for each in PROMPT_AND_ANSWER]
    try:
        columns = [list(dataset[column]) for column in names]
    except UnicodeDecodeError as error:
        raise InputError(f"{source} cannot be read: {one_line(error)} Give a file in UTF-8.") from error
    texts = (
        [read_text(value, source, column, f"row {row}") for row, value in enumerate(values)]
        for column, values in zip(names, columns, strict=True)
    )
    return [Example(prompt, answer) for prompt, answer in zip(*texts, strict=True)]


def check_columns(source: str, columns: Collection[str], settings: DataSettings, chosen: Iterable[str]) -> None:
    """Raises [`InputError`] where `source` does not have the columns that settings name."""
    for name in chosen:
        if (column := getattr(settings, name)) not in columns:
            raise InputError(
                f"{option(name)} is {column!r}, but {source} has the columns {', '.join(columns)}. Choose one of them."
            )


def read_text(value: Any, source: str, column: str, row: str) -> str:
    """What a row has in a column.

    Raises:
        InputError: It is nothing, or no text.
    """
    if value is None or value == "":
        raise InputError(f"{source} has no {column!r} in {row}: {value!r}. Remove or fill this row.")
    if not isinstance(value, str | int | float):
        raise InputError(
            f"{source} has a {type(value).__name__} as {column!r} in {row}: {reprlib.repr(value)}. "
            "Choose a column of texts, or join its parts."
        )
    return str(value)


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
    remedy = "Give a folder that a tokenizer's `save_pretrained` wrote."
    with loading(f"{given_by} {source}: the tokenizer", remedy):
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        config = AutoConfig.from_pretrained(source, trust_remote_code=False) if given_by == "--model" else None
    size = getattr(config, "vocab_size", None)
    if size is not None and len(tokenizer) > size:
        raise InputError(
            f"{given_by} {source}: the tokenizer has {len(tokenizer)} tokens, but `vocab_size` is {size}. Save the "
            "tokenizer that the model was trained with in its folder."
        )
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


def choose_tokenizer(settings: JobSettings, corpus: Corpus) -> PreTrainedTokenizerBase:
    """The tokenizer of the run: its own if it is resumed, else the one asked for, else one trained on the data."""
    if is_resumable(settings):
        return load_tokenizer(settings.output_dir / "tokenizer", "--output-dir")
    if settings.model is not None:
        return load_tokenizer(settings.model, "--model")
    if settings.tokenizer is not None:
        return load_tokenizer(settings.tokenizer)
    return train_tokenizer(corpus.train, settings.vocab_size)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> list[list[int]]:
    """Prompts as the model sees them, in training and when it solves them: on a line of their own."""
    return tokenizer([f"{example.prompt}\n" for example in examples], add_special_tokens=False)["input_ids"]


def encode(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> list[list[int]]:
    """The tokens of training texts, each with its end-of-sequence token. Prompt and answer are tokenised apart, so
    that a prompt alone has the same tokens when the model solves it; where there is none, the answer is the text."""
    prompts = encode_prompts(tokenizer, examples)
    answers = tokenizer([example.answer for example in examples], add_special_tokens=False)["input_ids"]
    return [
        [*(prompt if example.prompt else []), *answer, tokenizer.eos_token_id]
        for example, prompt, answer in zip(examples, prompts, answers, strict=True)
    ]


def pack(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, block_size: int, max_blocks: int
) -> torch.Tensor:
    """Joins texts by the end-of-sequence token and cuts them into blocks; what does not fill a block is dropped.

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
    while len(tokens) < max_blocks * block_size and (batch := list(islice(examples, 100))):
        for text in encode(tokenizer, batch):
            tokens += text
    num_blocks = min(len(tokens) // block_size, max_blocks)
    return torch.tensor(tokens[: num_blocks * block_size], dtype=torch.int64).view(num_blocks, block_size)


def pack_held_out(
    held_out: dict[str, Iterable[Example]], tokenizer: PreTrainedTokenizerBase, settings: BlockSettings
) -> dict[str, torch.Tensor]:
    """The first `eval_blocks` blocks (blocks, block_size) of each split, fewer where its texts end before.

    Raises:
        InputError: A split does not fill one.
    """
    packed = {
        split: pack(examples, tokenizer, settings.block_size, settings.eval_blocks)
        for split, examples in held_out.items()
    }
    for split, blocks in packed.items():
        if len(blocks) == 0:
            raise InputError(
                f"The held-out split {split!r} does not fill one block of --block-size {settings.block_size} tokens. "
                "Choose smaller blocks, or hold out more (--eval-data, --eval-fraction)."
            )
    return packed


class Blocks(torch.utils.data.Dataset):
    """Packed blocks as `Trainer` wants them. Their number and order are fixed, which makes resuming exact."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def pack_corpus(
    settings: BlockJobSettings, corpus: Corpus, tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Packs as many training texts as the run reads, or all that fill batches, and `eval_blocks` of each split."""
    if settings.block_size < 2:
        raise InputError(
            f"--block-size is {settings.block_size}; it must be 2 or more: the first token is not predicted."
        )
    train = pack(corpus.train, tokenizer, settings.block_size, settings.steps * settings.batch_size)
    train_batches = len(train) // settings.batch_size
    if train_batches == 0:
        raise InputError(
            f"--data {settings.data} fills {len(train)} blocks of --block-size {settings.block_size} tokens, fewer "
            f"than the --batch-size {settings.batch_size} of one step. Give more data, or choose smaller blocks "
            "or batches."
        )
    return train[: train_batches * settings.batch_size], pack_held_out(corpus.held_out, tokenizer, settings)


def fingerprint_of(train: torch.Tensor, held_out: dict[str, torch.Tensor]) -> str:
    """A short hash of all token ids."""
    return short_hash(blocks.numpy() for blocks in (train, *held_out.values()))
