# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""The JSON lines that finished runs leave: appended whole, read once each.

python -m benchmarks.paper.results FIRST.jsonl SECOND.jsonl    # are the figures of runs in both the same?
"""

import argparse
import fcntl
import json
import math
import os
import sys
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parent / "results"
# What a second run must give again: all but times and memory.
FIGURES = (
    "settings",
    "held_out",
    "training",
    "unigram",
    "data_fingerprint",
    "order_fingerprint",
    "training_tokens",
    "parameters",
    "active_parameters",
    "non_embedding_parameters",
    "expert_flops_per_token",
    "routing",
    "mechanism",
    "exact_match",
)


def path_of(scale: str, folder: Path = RESULTS) -> Path:
    """Where the runs of a scale are written."""
    return folder / scale / "runs.jsonl"


def append(path: Path, result: dict[str, Any]) -> None:
    """Adds one line in one write, and waits until the disk has it. A line that was cut short before stays alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(plain(result), allow_nan=False) + "\n"
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.tell() and not _ends_line(file):
            line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _ends_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def load(path: Path) -> dict[str, dict[str, Any]]:
    """Finished runs by id, in the order in which they finished. Lines that were cut short are left out."""
    results: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        results.setdefault(result["id"], result)
    return results


def plain(value: Any) -> Any:
    """A value with `None` in place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def differing_figures(first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Names of the figures that differ between two files, by the id of each training run that both have. The first
    runs' lines lack some, which are not compared."""
    return {
        id: [name for name in FIGURES if name in first[id] and first[id][name] != second[id].get(name)]
        for id in first
        if id in second and first[id]["settings"]["kind"] == "train"
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Are the figures of runs in both files the same?")
    parser.add_argument("files", type=Path, nargs=2, metavar="RUNS.jsonl")
    files = parser.parse_args(argv).files
    if missing := [file for file in files if not file.is_file()]:
        parser.error(f"{missing[0]} does not exist; give two files that `benchmarks.paper.run` wrote")
    first, second = map(load, files)
    compared = differing_figures(first, second)
    for id, names in compared.items():
        print(f"{id}  {', '.join(names) if names else 'the same'}  {first[id]['label']}")
    if not compared or any(compared.values()):
        sys.exit(f"{sum(map(bool, compared.values()))} of {len(compared)} runs differ.")


if __name__ == "__main__":
    main()
