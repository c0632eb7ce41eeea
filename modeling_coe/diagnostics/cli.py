# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Command line of `coe-routing`, which `python -m modeling_coe.diagnostics.cli` runs too."""

import json
import reprlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..command_line import (
    InputError,
    check_device,
    check_folder,
    check_positive,
    command,
    loading,
    make_folder,
    one_line,
    parse,
    setting,
)
from ..configuration_coe import CoeConfig
from .recording import Batch, measure_routing


FILE_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}


@dataclass(frozen=True, kw_only=True)
class RoutingOptions:
    _argument_group_name: ClassVar[str] = "routing"
    out: Path = setting(help="folder for everything that is written")
    split: str = setting("train", "split of a folder or Hub data set")
    config: str | None = setting(None, "configuration of a Hub data set")
    tokens: int = setting(100_000, "tokens to record, padding not counted")
    length: int = setting(512, "tokens of a text; the rest of it is left out")
    batch_size: int = setting(8, "texts per forward")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "what torch calls it")


@dataclass(frozen=True, kw_only=True)
class RoutingSettings(RoutingOptions):
    model: str = setting(help="folder or Hub name of a model with its tokenizer", metavar="MODEL")
    data: str = setting(help=f"{', '.join(FILE_FORMATS)} file, folder or Hub data set", metavar="DATA")
    column: list[str] | None = setting(None, "column with text; may be repeated; `text` if not given", action="append")


def parse_settings(argv: list[str] | None = None) -> RoutingSettings:
    """Reads the command line and checks what can be checked without model and data."""
    settings = parse(
        RoutingSettings,
        "Records what the routers of a Chain-of-Experts model do on a data set: writes routing.json, load.png and "
        "transitions.png (and training.png where MODEL is a checkpoint of a Trainer), prints a table.",
        argv,
        prog="coe-routing",
    )
    check_positive(settings, "tokens", "length", "batch_size")
    check_device(settings.device)
    check_folder("out", settings.out)
    if Path(settings.data).is_file() and (settings.split, settings.config) != ("train", None):
        named = f"--split is {settings.split}" if settings.split != "train" else f"--config is {settings.config}"
        raise InputError(f"{named}, but DATA {settings.data} is a file, which has neither. Leave it out.")
    return settings


def load_model(source: str) -> tuple[PreTrainedModel, Any]:
    """The model and its tokenizer.

    Raises:
        InputError: They cannot be loaded, or it is no Chain-of-Experts model with sparse layers.
    """
    with loading(f"MODEL {source}", "Give a folder with the config.json, the weights and the tokenizer of one model."):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if not isinstance(config, CoeConfig) or not config.sparse_layers:
            raise InputError(
                f"MODEL {source} is a {config.model_type!r} model without chained experts. Give a CoE model."
            )
        tokenizer = AutoTokenizer.from_pretrained(source)
        if len(tokenizer) > config.vocab_size:
            raise InputError(
                f"The tokenizer of MODEL {source} has {len(tokenizer)} tokens, its model {config.vocab_size}. "
                "Save the tokenizer it was trained with in its folder."
            )
        return AutoModelForCausalLM.from_pretrained(source), tokenizer


def read_texts(source: str, columns: list[str], split: str, config: str | None) -> Iterator[str]:
    """The texts of a file, folder or Hub data set, row by row; columns are joined by a line break.

    Raises:
        InputError: It cannot be read, or lacks a column.
    """
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise InputError("Reading DATA needs `datasets`: pip install 'coe-transformers[train]'.") from error

    path = Path(source)
    if path.suffix in FILE_FORMATS and not path.exists():
        raise InputError(f"DATA {source} does not exist. Give an existing file, or the name of a data set.")
    if path.is_file() and path.suffix not in FILE_FORMATS:
        raise InputError(f"DATA {source} is no {', '.join(FILE_FORMATS)} file. Convert it to one of them.")
    try:
        if path.is_file():
            name = FILE_FORMATS[path.suffix]
            rows = load_dataset(name, data_files=str(path), split="train", streaming=True)
        else:
            rows = load_dataset(source, config, split=split, streaming=True)
        for row in rows:
            if missing := [column for column in columns if column not in row]:
                raise InputError(f"DATA {source} has no column {missing[0]!r}. Set --column to one of {sorted(row)}.")
            values = {column: row[column] for column in columns if row[column] is not None}
            for column, value in values.items():
                if not isinstance(value, str | int | float):
                    raise InputError(
                        f"DATA {source} has a {type(value).__name__} in column {column!r}: {reprlib.repr(value)}. Set "
                        "--column to a column of texts."
                    )
            yield "\n".join(map(str, values.values()))
    except InputError:
        raise
    except StopIteration as error:  # of a file without rows
        raise InputError(f"DATA {source} holds no text. Give data with text.") from error
    except (DatasetsError, OSError, ValueError) as error:
        raise InputError(
            f"DATA {source} (split {split!r}, configuration {config!r}) cannot be read: {one_line(error)} Give a "
            f"readable {', '.join(FILE_FORMATS)} file, a folder, or a data set that can be reached."
        ) from error


def make_batches(
    texts: Iterable[str], tokenizer: Any, *, batch_size: int, length: int, num_tokens: int
) -> Iterator[Batch]:
    """Batches of texts with their attention masks, padded on the right, with exactly `num_tokens` tokens in all where
    the texts have as many."""
    texts = filter(None, texts)
    while num_tokens and (group := list(islice(texts, batch_size))):
        rows = []
        for ids in tokenizer(group, truncation=True, max_length=length)["input_ids"]:
            ids = ids[:num_tokens]
            num_tokens -= len(ids)
            if ids:
                rows.append(torch.tensor(ids))
        if rows:
            yield {
                "input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True),
                "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            }


def report(settings: RoutingSettings) -> None:
    """Records, writes and prints what the settings ask for."""
    try:
        from . import plots
    except ImportError as error:
        raise InputError("The pictures need `matplotlib`: pip install 'coe-transformers[train]'.") from error
    model, tokenizer = load_model(settings.model)
    texts = read_texts(settings.data, settings.column or ["text"], settings.split, settings.config)
    batches = make_batches(
        texts, tokenizer, batch_size=settings.batch_size, length=settings.length, num_tokens=settings.tokens
    )
    with tqdm(total=settings.tokens, unit=" tokens", unit_scale=True) as bar:
        routing = measure_routing(model.to(settings.device), _show_progress(batches, bar))
    if not routing.tokens:
        raise InputError(f"DATA {settings.data} holds no text. Give data with text, or another --column.")
    make_folder("out", settings.out)
    content = {"model": settings.model, "data": settings.data} | routing.summary()
    (settings.out / "routing.json").write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
    print(routing)
    plots.plot_load(routing, settings.out / "load.png")
    if any(layer.num_iterations > 1 for layer in routing.layers.values()):
        plots.plot_transitions(routing, settings.out / "transitions.png")
    state = Path(settings.model) / "trainer_state.json"
    if state.is_file():
        try:
            plots.plot_training(state, settings.out / "training.png")
        except ValueError as error:
            print(f"There is no training.png: {error}", file=sys.stderr)


def _show_progress(batches: Iterable[Batch], bar: tqdm) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        bar.update(int(batch["attention_mask"].sum()))


@command
def main(argv: list[str] | None = None) -> None:
    """`coe-routing`."""
    report(parse_settings(argv))


if __name__ == "__main__":
    main()
