# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Tables of Markdown."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Iterable[str]], align: str | None = None) -> list[str]:
    """Lines of a table.

    Args:
        header (`Sequence[str]`): Names of the columns.
        rows (`Iterable[Iterable[str]]`): Their cells.
        align (`str`, *optional*): `l` or `r` for every column; by default the first is text and the others figures.
    """
    align = align or "l" + "r" * (len(header) - 1)
    lines = [header, [{"l": "---", "r": "---:"}[side] for side in align], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
