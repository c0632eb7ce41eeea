# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""The run itself, the same for every way of training: what it reads, and what happens with a model and its data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from modeling_coe import CoeConfig

from .answers import solve
from .corpus import Blocks, Corpus, Example, choose_tokenizer, encode_prompts, fingerprint_of, load_corpus, pack_corpus
from .memory import return_freed_memory
from .processes import check_alike, leave_others, once, processes, say
from .report import report
from .run_folder import check_fingerprint, check_output_dir, is_resumable, start_run
from .settings import BlockJobSettings, JobSettings
from .trainer_checkpoints import newest_complete_checkpoint
from .training import TrainingData, block_trainer, given_config, save_and_reload, train


if TYPE_CHECKING:
    from peft import PeftModel


class Inputs(NamedTuple):
    """What a run reads: the configuration of the model it is given, if it is, its texts, and its tokenizer."""

    config: PreTrainedConfig | None
    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase


class SavedModel(NamedTuple):
    """A model and its tokenizer, read back from the folder they were saved to, and what was found of them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    facts: dict[str, Any]


def load_inputs(settings: JobSettings, chains_only: bool = True) -> Inputs:
    """Checks the output folder, and loads what the run reads.

    Args:
        settings (`JobSettings`): All options of the run.
        chains_only (`bool`, defaults to `True`): Refuse models that are no Chain-of-Experts.

    Raises:
        InputError: There is no such thing, or the run may not write its folder.
    """
    check_output_dir(settings)
    config = None if settings.model is None else given_config(settings.model, chains_only)
    corpus = load_corpus(settings, settings.seed)
    return Inputs(config, corpus, choose_tokenizer(settings, corpus))


def pack_inputs(settings: BlockJobSettings, inputs: Inputs) -> TrainingData:
    """The texts in blocks."""
    train_blocks, held_out_blocks = pack_corpus(settings, inputs.corpus, inputs.tokenizer)
    return TrainingData(
        train=Blocks(train_blocks),
        held_out={split: Blocks(blocks) for split, blocks in held_out_blocks.items()},
        fingerprint=fingerprint_of(train_blocks, held_out_blocks),
        tokens_per_step=settings.batch_size * settings.block_size,
    )


def save(settings: JobSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> SavedModel:
    """Saves the trained model as `model/`, and reads it back."""
    model, tokenizer = save_and_reload(settings, model, tokenizer)
    total = model.num_parameters()
    active = model.config.active_parameters if isinstance(model.config, CoeConfig) else total
    parameters = {"total": total, "active": active}
    return SavedModel(model, tokenizer, {"parameters": parameters})


def open_run(settings: JobSettings, tokenizer: PreTrainedTokenizerBase, fingerprint: str) -> Path | None:
    """Starts a run in its folder, or finds the checkpoint that a resumed one goes on from, if there is a complete one.
    The main process decides and writes, for all.

    Args:
        settings (`JobSettings`): All options of the run.
        tokenizer (`PreTrainedTokenizerBase`): The run's.
        fingerprint (`str`): Of its data.

    Raises:
        InputError: The data of a resumed run have changed, or are not those of all processes.
    """
    check_alike("The data", fingerprint)
    if not is_resumable(settings):
        once(lambda: start_run(settings, tokenizer, fingerprint))
        checkpoint = None
    else:
        check_fingerprint(settings, fingerprint)
        checkpoint = once(lambda: find_checkpoint(settings.output_dir))
    if settings.resume:
        say(f"Resuming at {checkpoint.name}." if checkpoint else "No complete checkpoint: starting at step 0.")
    return checkpoint


def find_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint to go on from, if there is one, in a folder without what a killed `save_pretrained` has left."""
    for path in (*output_dir.glob("model/.*.partial"), *output_dir.glob("model/.*.replaced")):
        print(f"Deleting {path.relative_to(output_dir)}, which was not written in full.")
        shutil.rmtree(path)
    return newest_complete_checkpoint(output_dir)


def run_job(
    settings: JobSettings,
    inputs: Inputs,
    data: TrainingData,
    model: PreTrainedModel | PeftModel,
    *,
    title: str,
    baselines: dict[str, dict[str, float]] | None = None,
    trainer: Callable[..., Trainer] = block_trainer,
    encode: Callable[[PreTrainedTokenizerBase, list[Example]], list[list[int]]] = encode_prompts,
    save: Callable[[JobSettings, PreTrainedModel | PeftModel, PreTrainedTokenizerBase], SavedModel] = save,
) -> None:
    """Trains a model, or goes on with a run that was interrupted; saves it, has the saved one solve held-out problems,
    and reports.

    Args:
        settings (`JobSettings`): All options of the run.
        inputs (`Inputs`): What it reads.
        data (`TrainingData`): What of these the model is trained and evaluated on.
        model (`PreTrainedModel` or `PeftModel`): Is trained in place.
        title (`str`): Of the picture of the losses.
        baselines (`dict[str, dict[str, float]]`, *optional*): Other losses to report, by their names and the splits.
        trainer (`Callable[..., Trainer]`): Makes a trainer as [`block_trainer`] does.
        encode (`Callable`): Makes prompts of a tokenizer and problems.
        save (`Callable[..., SavedModel]`): Saves the trained model with the tokenizer.
    """
    checkpoint = open_run(settings, inputs.tokenizer, data.fingerprint)
    run = train(settings, model, data, trainer, checkpoint)
    leave_others()
    if not processes().is_main_process:
        return
    return_freed_memory()  # saving and merging need more of the model at once
    saved = save(settings, run.model, inputs.tokenizer)

    def solver(problems: list[Example]) -> list[str]:
        prompts = encode(saved.tokenizer, problems)
        return solve(saved.model, saved.tokenizer, prompts, settings.max_new_tokens)

    report(settings, run, data, inputs.corpus, solver, title=title, baselines=baselines or {}, facts=saved.facts)
