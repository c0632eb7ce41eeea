# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""The folder of a training run: its settings, its checkpoints, and which one a killed run goes on from."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from modeling_coe.command_line import (
    InputError,
    check_folder,
    check_range,
    default_values,
    make_folder,
    option,
)

from .settings import REPORT_SETTINGS, JobSettings, RunSettings, computing


# What runs write beside checkpoints and `run.json`.
RESULTS = ("model", "adapter", "results.json", "loss_curve.png")
OUTPUTS = ("tokenizer", *RESULTS)


def short_hash(parts: Iterable[Any]) -> str:
    """A short hash of buffers in their order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def check_run_options(settings: RunSettings) -> None:
    """Raises [`InputError`] where they have no meaning, alone or together."""
    check_range(settings, "seed", 0, 2**32)  # as NumPy's generators want it
    if settings.resume and settings.overwrite:
        raise InputError("--resume goes on with a run and --overwrite deletes it; give one of them.")


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoints_in(output_dir: Path) -> list[Path]:
    """All checkpoints of a run, complete or not, oldest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=checkpoint_step)


def check_output_dir(settings: JobSettings) -> None:
    """Raises [`InputError`] where the output folder cannot be written, holds another run, one that should not be lost,
    none to go on with, or what this run is to read."""
    check_folder("output_dir", settings.output_dir)
    for name in ("model", "tokenizer"):
        source = getattr(settings, name, None)
        if source is not None and settings.output_dir.resolve() in Path(source).resolve().parents:
            raise InputError(
                f"{option(name)} {source} lies in --output-dir {settings.output_dir}, where the run would replace it. "
                "Choose another output folder."
            )
    if not is_resumable(settings):
        results = [path for name in RESULTS if (path := settings.output_dir / name).exists()]
        if (held := [*checkpoints_in(settings.output_dir), *results]) and not settings.overwrite:
            raise InputError(
                f"--output-dir {settings.output_dir} already holds {held[0].name} of a run. Go on with it by "
                "--resume, which needs its run.json, delete it by --overwrite, or choose another folder."
            )
        # The first thing that a run writes.
        if settings.resume and not (settings.output_dir / "tokenizer").is_dir():
            raise InputError(
                f"--resume: --output-dir {settings.output_dir} holds no run. Leave --resume out to start one."
            )
        return
    given, begun = computing(settings), read_run(settings.output_dir)["settings"]
    # A run from before there was an option did what the option does by default.
    added = {name: value for name, value in default_values(type(settings)).items() if name in given.keys() - begun}
    for name, old in (begun | added).items():
        if name not in REPORT_SETTINGS and given.get(name) != old:
            raise InputError(
                f"{option(name)} is {given.get(name)!r}, but the run in {settings.output_dir} has {old!r}. Resume "
                "with the same settings, or start another run in another folder."
            )


def is_resumable(settings: RunSettings) -> bool:
    """Whether to go on with a run. `run.json` is the last file written before training."""
    return settings.resume and (settings.output_dir / "run.json").is_file()


def read_run(output_dir: Path) -> dict[str, Any]:
    """What `run.json` says: `settings` and `data_fingerprint`.

    Raises:
        InputError: It is damaged.
    """
    try:
        run = read_json(output_dir / "run.json")
        return {"settings": dict(run["settings"]), "data_fingerprint": run["data_fingerprint"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--output-dir {output_dir}: its run.json is damaged ({type(error).__name__}: {error}). Delete the run by "
            "--overwrite, or choose another folder."
        ) from error


def start_run(settings: JobSettings, tokenizer: PreTrainedTokenizerBase, fingerprint: str) -> None:
    """Deletes an earlier run if asked to, and writes the tokenizer and `run.json`."""
    make_folder("output_dir", settings.output_dir)
    if settings.overwrite:
        for path in [*checkpoints_in(settings.output_dir), *(settings.output_dir / name for name in OUTPUTS)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    # Never beside a tokenizer of another run.
    (settings.output_dir / "run.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(settings.output_dir / "tokenizer")
    write_json(settings.output_dir / "run.json", {"settings": computing(settings), "data_fingerprint": fingerprint})


def check_fingerprint(settings: JobSettings, fingerprint: str) -> None:
    """Raises [`InputError`] where the data of a resumed run are not those it began with."""
    old = read_run(settings.output_dir)["data_fingerprint"]
    if fingerprint != old:
        raise InputError(
            f"The data have fingerprint {fingerprint}, but the run in {settings.output_dir} has {old}: the content of "
            f"--data {settings.data}, --eval-data {settings.eval_data} or --model {settings.model} has changed. "
            "Restore it, or start another run."
        )


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_suffix(".partial.json")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
