# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Folders of models that are written whole or not at all: their files beside others, or the folder itself."""

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers.utils import CONFIG_NAME


_WEIGHT_FILE = re.compile(
    r"model(?:\.(?P<variant>[\w-]+?))?(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index(?:\.(?P<of_index>[\w-]+))?\.json)?"
)


def _weight_variant(name: str) -> str | None:
    """The variant a weight file belongs to (`""` for the plain one), or `None` for other files."""
    match = _WEIGHT_FILE.fullmatch(name)
    return None if match is None else match["variant"] or match["of_index"] or ""


@contextmanager
def staged_files(target: str | Path) -> Iterator[Path]:
    """Lets files be written to a folder, beside those of others, whole or not at all.

    Yields an empty hidden folder inside `target`. When the block ends its files replace those of `target`, all weight
    files of an older save included. When the block or the replacing raises, `target` is as it was. While files are
    being replaced there is no `config.json`, so that a process killed then leaves nothing that loads.
    """
    target = Path(target)
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=target))
    replaced = Path(tempfile.mkdtemp(prefix=".", suffix=".replaced", dir=target))
    moves: list[tuple[Path, Path]] = []

    def move(file: Path, folder: Path) -> None:
        moves.append((file, folder / file.name))
        file.replace(folder / file.name)

    try:
        yield staging
        # The old configuration goes first, the new one comes last.
        new = sorted(staging.iterdir(), key=lambda file: file.name == CONFIG_NAME)
        names = {file.name for file in new}
        variants = {_weight_variant(name) for name in names} - {None}
        old = [file for file in target.iterdir() if file.name in names or _weight_variant(file.name) in variants]
        for file in sorted(old, key=lambda file: file.name != CONFIG_NAME):
            move(file, replaced)
        for file in new:
            move(file, target)
    except BaseException:
        for source, destination in reversed(moves):
            if destination.exists():
                destination.replace(source)
        raise
    finally:
        for folder in (staging, replaced):
            shutil.rmtree(folder, ignore_errors=True)
        if is_new and not any(target.iterdir()):
            target.rmdir()


@contextmanager
def staged_folder(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Lets a folder be made, or replaced as a whole, all of it or nothing.

    Yields an empty hidden folder beside `target`, which takes its place when the block ends, and is removed when it
    raises. What an earlier process left that was killed in between is removed, or put back in place, first.

    Args:
        target (`str` or `Path`): The folder; those above it are made where they are missing.
        overwrite (`bool`, defaults to `False`): Replace the folder that is there at the end of the block.

    Raises:
        OSError: `target` was made by someone else meanwhile, or cannot be written.
    """
    target = Path(target).resolve()
    new_parents = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_remains(target)
    owner = f"{platform.node()}.{os.getpid()}"
    staging, replaced = (target.with_name(f".{target.name}.{owner}.{kind}") for kind in ("partial", "replaced"))
    try:
        staging.mkdir()
        yield staging
        if overwrite and target.exists():
            target.rename(replaced)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
        if not target.exists():
            for parent in new_parents:
                with suppress(OSError):  # someone else has put something there meanwhile
                    parent.rmdir()


def _clear_remains(target: Path) -> None:
    """Removes what killed processes left beside `target`, and restores what one of them was about to replace."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.{re.escape(platform.node())}\.(\d+)\.(partial|replaced)")
    for remains in list(target.parent.iterdir()):
        if (match := pattern.fullmatch(remains.name)) and not _is_alive(int(match[1])):
            if match[2] == "replaced" and not target.exists():
                remains.rename(target)
            else:
                shutil.rmtree(remains)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():  # ours is not there yet, so this was an earlier process of the same number
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
