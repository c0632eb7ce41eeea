# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What commands have in common: input that does not work is named in one line, with what to do about it."""

import io
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, field, fields
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, HfArgumentParser

from .configuration_coe import CoeConfig


Settings = TypeVar("Settings")
# What libraries raise where files of a model or a tokenizer are missing, damaged, or not of one kind.
LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    AssertionError,
    StrictDataclassError,
)


class InputError(ValueError):
    """What the user gave does not work; the message names the option, its value and the remedy."""


class _SettingsParser(HfArgumentParser):
    """transformers' parser of dataclasses, which raises [`InputError`] where it cannot read the command line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}. `--help` tells what every option takes.")


def setting(default: Any = MISSING, help: str | None = None, **options: Any) -> Any:
    """A field with what the help says of its option, and further arguments of `add_argument`."""
    metadata = {"help": help, **options}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def default_values(kind: type) -> dict[str, Any]:
    """What the fields of settings are where they are not given, but for those that must be."""
    defaults = {
        each.name: each.default if each.default_factory is MISSING else each.default_factory() for each in fields(kind)
    }
    return {name: default for name, default in defaults.items() if default is not MISSING}


def parse(
    kind: type[Settings], description: str, argv: Sequence[str] | None = None, *, prog: str | None = None
) -> Settings:
    """Reads a command line into settings: a dataclass, or one that joins groups of them and may change their defaults.

    A field that `kind` adds to its groups is given to `add_argument` as its setting says, whatever its type; one
    without a default is positional.

    Raises:
        InputError: An option is unknown, missing, or has no such value.
    """
    groups = [each for each in reversed(kind.__mro__) if "_argument_group_name" in vars(each)] or [kind]
    parser = _SettingsParser(groups, description=description, prog=prog)
    defaults = default_values(kind)
    grouped = {each.name for group in groups for each in fields(group)}
    for each in fields(kind):
        if each.name not in grouped:
            parser.add_argument(option(each.name) if each.name in defaults else each.name, **each.metadata)
    parser.set_defaults(**defaults)
    return kind(**vars(parser.parse_args(argv)))


def command(run: Callable[[Sequence[str] | None], Any]) -> Callable[[Sequence[str] | None], Any]:
    """Makes a command of a function of its arguments: bad input ends in one line, of one process of a node, and the
    exit code 1. Lines that it prints are there at once, in a pipe or file too."""

    @wraps(run)
    def main(argv: Sequence[str] | None = None) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)
        try:
            return run(argv)
        except InputError as error:
            sys.exit(f"error: {error}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)

    return main


def one_line(error: BaseException) -> str:
    """The message of a library's error, ended as a sentence is."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:  # which names the field
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."


@contextmanager
def loading(what: str, remedy: str) -> Iterator[None]:
    """Raises [`InputError`] in place of a library's error while `what` the user gave is loaded."""
    try:
        yield
    except InputError:
        raise
    except LOADING_ERRORS as error:
        message = one_line(error)
        if isinstance(error, KeyError | TypeError | AttributeError):  # which say little without their class
            message = f"{type(error).__name__}: {message}"
        elif "ignore_mismatched_sizes" in message:  # a report above that nobody has asked for
            message = "its weights have other shapes than its config.json says."
        raise InputError(f"{what} cannot be loaded: {message} {remedy}") from error


def load_config(
    source: str,
    given_by: str = "CONFIG",
    remedy: str = "Give a folder with a config.json, such a file, or the Hub name of a CoE model.",
) -> CoeConfig:
    """The configuration of a Chain-of-Experts model.

    Args:
        source (`str`): A folder, a config.json, or a Hub name.
        given_by (`str`, defaults to `"CONFIG"`): What the user gave it as.
        remedy (`str`, *optional*): What to give where it cannot be loaded.

    Raises:
        InputError: It cannot be loaded, or is that of another model.
    """
    with loading(f"{given_by} {source}", remedy):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if not isinstance(config, CoeConfig):
        raise InputError(
            f"{given_by} {source} is a {config.model_type!r} model, not a chain of experts. Convert it with "
            "`coe-convert`."
        )
    return config


def option(name: str) -> str:
    """The command-line spelling of a setting."""
    return "--" + name.replace("_", "-")


def check_positive(options: object, *names: str) -> None:
    """Raises [`InputError`] where one of these options is less than 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise InputError(f"{option(name)} is {getattr(options, name)}; it must be 1 or more.")


def check_range(options: object, name: str, low: float, high: float = math.inf, *, exclusive: bool = False) -> None:
    """Raises [`InputError`] where an option does not lie in [low, high), or, if `exclusive`, in (low, high)."""
    value = getattr(options, name)
    if not low <= value < high or (exclusive and value == low):
        least = f"more than {low:g}" if exclusive else f"{low:g} or more"
        most = "a finite number" if high == math.inf else f"less than {high:g}"
        raise InputError(f"{option(name)} is {value}; it must be {least} and {most}.")


def check_not_negative(options: object, *names: str) -> None:
    """Raises [`InputError`] where one of these options is less than 0."""
    for name in names:
        if getattr(options, name) < 0:
            raise InputError(f"{option(name)} is {getattr(options, name)}; it must be 0 or more.")


def check_device(device: str) -> None:
    """Raises [`InputError`] where torch has no such device."""
    try:
        torch.ones(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # the first where torch was built without it
        raise InputError(
            f"--device {device} cannot be used: {str(error).splitlines()[0]}. Choose one that torch has, such as cpu."
        ) from error


def check_folder(name: str, folder: Path) -> None:
    """Raises [`InputError`] where the folder that an option names cannot be made or written to."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise InputError(f"{option(name)} {folder} cannot be a folder: {nearest} is a file. Choose another folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{option(name)} {folder} cannot be written: {nearest} is read-only. Choose another folder.")


def make_folder(name: str, folder: Path) -> None:
    """Makes the folder that an option names, and those above it.

    Raises:
        InputError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{option(name)} {folder} cannot be made: {one_line(error)} Choose another folder."
        ) from error
