# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""An endless stream of training blocks that any number of processes share, and that goes on where it stopped.

A batch has B rows. Row r is made of the texts r, r + B, r + 2B, ... alone, or of files of its own where there are
enough of them: its texts are tokenised, joined by the end-of-sequence token and cut into blocks. So a process reads
and tokenises the texts of its own rows, and what a batch holds does not depend on how many processes there are. The
position of the stream is that of its rows: where each is in its texts, and the tokens that no block has had yet.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from transformers import PreTrainedTokenizerBase

from modeling_coe.command_line import InputError, option, setting

from .arithmetic import Problems
from .corpus import (
    PROMPT_AND_ANSWER,
    Example,
    check_columns,
    check_data_options,
    encode,
    open_dataset,
    read_text,
)
from .settings import DataSettings


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    _argument_group_name: ClassVar[str] = "stream"
    text_column: str | None = setting(None, "column with whole texts, in place of prompts and answers")


class StreamedDataSettings(StreamSettings, DataSettings):
    """Where training texts are read as they are needed."""


def check_stream_options(settings: StreamedDataSettings) -> None:
    """Raises [`InputError`] where they have no meaning, alone or together."""
    check_data_options(settings)
    if settings.data is None and settings.text_column is not None:
        raise InputError(
            f"--text-column is {settings.text_column}, which says nothing of the built-in problems: there is no "
            "--data. Leave it out."
        )
    if settings.data is not None and settings.eval_data is None:
        raise InputError(
            f"--data {settings.data} is read as a stream, of which no part is held out. Give --eval-data."
        )


class Texts(Protocol):
    """The texts of one row, without end, and how far they were read."""

    epoch: int

    def __iter__(self) -> Iterator[Example]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ArithmeticTexts:
    """The built-in problems `row`, `row + num_rows`, ... of a split."""

    epoch = 0  # they never repeat

    def __init__(self, seed: int, split: str, row: int, num_rows: int):
        self.problems, self.index, self.num_rows = Problems(seed, split), row, num_rows

    def __iter__(self) -> Iterator[Example]:
        while True:
            problem = self.problems[self.index]
            self.index += self.num_rows
            yield Example(problem.question, problem.answer)

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.index = state["index"]


class DatasetTexts:
    """The texts `row`, `row + num_rows`, ... of a streamed data set, over and over. A data set of a multiple of
    `num_rows` files is divided by files, so that each is read once; else every row reads all and takes its part."""

    def __init__(self, dataset: IterableDataset, settings: StreamedDataSettings, row: int, num_rows: int):
        # A copy: a data set knows one position.
        self.dataset = split_dataset_by_node(copy.deepcopy(dataset), row, num_rows)
        self.settings, self.num_rows, self.epoch = settings, num_rows, 0

    def __iter__(self) -> Iterator[Example]:
        is_empty = True
        while True:
            for record in self.dataset:
                is_empty = False
                yield read_example(record, "data", self.settings)
            if is_empty and self.epoch == 0:
                raise InputError(
                    f"--data {self.settings.data} has fewer texts than the --batch-size {self.num_rows} of rows. Give "
                    "more data, or choose smaller batches."
                )
            self.epoch += 1
            self.dataset.set_epoch(self.epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "dataset": copy.deepcopy(self.dataset.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.dataset.set_epoch(self.epoch)
        self.dataset.load_state_dict(state["dataset"])


def open_stream(name: str, settings: StreamedDataSettings) -> IterableDataset:
    """Opens the data set that `--data` or `--eval-data` names, without reading more than its first text.

    Args:
        name (`str`): `"data"` or `"eval_data"`.
        settings (`StreamedDataSettings`): Where it is, and its columns.

    Raises:
        InputError: There is none, or it cannot be read, is empty or has other columns.
    """
    split = settings.train_split if name == "data" else settings.eval_split
    dataset = open_dataset(name, getattr(settings, name), settings.data_config, split, streaming=True)
    read_example(next(iter(copy.deepcopy(dataset))), name, settings)
    return dataset


def read_example(record: dict[str, Any], name: str, settings: StreamedDataSettings) -> Example:
    """The prompt and answer, or the text, of a record; a text has no prompt.

    Raises:
        InputError: A column is missing, or is empty or no text here.
    """
    source = f"{option(name)} {getattr(settings, name)}"
    chosen = PROMPT_AND_ANSWER if settings.text_column is None else ("text_column",)
    check_columns(source, record, settings, chosen)
    texts = [read_text(record[column], source, column, "a row") for column in (getattr(settings, c) for c in chosen)]
    return Example(*texts) if settings.text_column is None else Example("", *texts)


class Row:
    """The blocks of one row."""

    def __init__(self, texts: Texts, tokenizer: PreTrainedTokenizerBase, block_size: int):
        self.texts, self.tokenizer, self.block_size = texts, tokenizer, block_size
        self.tokens: list[int] = []  # that no block has had yet
        self.examples = iter(texts)

    def next_block(self) -> list[int]:
        while len(self.tokens) < self.block_size:
            self.tokens += encode(self.tokenizer, [next(self.examples)])[0]
        block, self.tokens = self.tokens[: self.block_size], self.tokens[self.block_size :]
        return block

    def state_dict(self) -> dict[str, Any]:
        return {"texts": self.texts.state_dict(), "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.texts.load_state_dict(state["texts"])
        self.tokens, self.examples = list(state["tokens"]), iter(self.texts)


class BlockStream:
    """The rows of a process.

    Args:
        rows (`dict[int, Row]`): By their number in the batch.
    """

    def __init__(self, rows: dict[int, Row]):
        self.rows = rows

    def next_batch(self) -> torch.Tensor:
        """Token ids (rows of this process, block_size) of the next step."""
        return torch.tensor([row.next_block() for row in self.rows.values()])

    @property
    def epoch(self) -> int:
        """How often the row that is furthest ahead has read all its texts."""
        return max(row.texts.epoch for row in self.rows.values())

    def state_dict(self) -> dict[str, Any]:
        """The positions of the rows by their numbers, as JSON has them."""
        return {str(number): row.state_dict() for number, row in self.rows.items()}

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """Goes on where rows of these numbers stopped, of whatever processes they were."""
        for number, row in self.rows.items():
            row.load_state_dict(states[str(number)])


def open_rows(
    settings: StreamedDataSettings,
    seed: int,
    rows: range,
    num_rows: int,
    tokenizer: PreTrainedTokenizerBase,
    block: int,
) -> BlockStream:
    """The stream of training blocks, at its beginning.

    Args:
        settings (`StreamedDataSettings`): Where the texts are.
        seed (`int`): Of the built-in problems.
        rows (`range`): Rows of this process.
        num_rows (`int`): Rows of a batch.
        tokenizer (`PreTrainedTokenizerBase`): With an `eos_token`.
        block (`int`): Tokens in a block.
    """
    if settings.data is None:
        texts = {row: ArithmeticTexts(seed, "train", row, num_rows) for row in rows}
    else:
        dataset = open_stream("data", settings)
        texts = {row: DatasetTexts(dataset, settings, row, num_rows) for row in rows}
    return BlockStream({row: Row(texts[row], tokenizer, block) for row in rows})


def training_texts(settings: StreamedDataSettings, seed: int) -> Iterator[Example]:
    """The training texts once, from the first one on."""
    if settings.data is None:
        return iter(ArithmeticTexts(seed, "train", 0, 1))
    return (read_example(record, "data", settings) for record in open_stream("data", settings))


def held_out_texts(settings: StreamedDataSettings, seed: int) -> dict[str, Iterator[Example]]:
    """The held-out texts once, by the name of their split."""
    if settings.data is None:
        return {split: iter(ArithmeticTexts(seed, split, 0, 1)) for split in ("numbers", "templates")}
    dataset = open_stream("eval_data", settings)
    return {"held_out": (read_example(record, "eval_data", settings) for record in dataset)}
