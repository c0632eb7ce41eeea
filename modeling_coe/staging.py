# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Folders of models that are written whole or not at all."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
def staged_directory(target: str | Path) -> Iterator[Path]:
    """Lets a folder be written whole or not at all.

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
