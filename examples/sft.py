# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a Chain-of-Experts model on conversations with TRL's `SFTTrainer`.

    python examples/sft.py --model runs/demo/model --output-dir runs/sft --data train.parquet --eval-data test.parquet
    python examples/sft.py --model runs/chain --output-dir runs/sft-lora --lora 8 --expert-r 4 --dtype bfloat16

A prompt is what the user says and its answer what the assistant says. The model's chat template joins them, or, where
it has none, one that puts prompts on a line of their own as `pretrain.py` does; conversations are packed into rows and
stay apart in attention; the loss is that of the answers alone, plus the balancing loss that TRL adds, in evaluation
too, and logs as `aux_loss`. `--lora` trains adapters, those of `finetune_lora.py`, in place of all weights. A model
that is no chain can be tuned in the same way, as a control. Data, `--resume` and what is reported are those of
`pretrain.py`. The output folder holds

    run.json        the settings, and a fingerprint of the data, that a resumed run must share
    tokenizer/      the tokenizer of the run, with its chat template
    checkpoint-N/   the two newest checkpoints
    adapter/        with `--lora`, the trained adapter
    model/          the trained model with its tokenizer and chat template; an adapter is merged
    results.json    held-out losses of the answers, exact match, sample solutions, the log of every step
    loss_curve.png  the losses as a picture
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import recipe.openmp  # noqa: F401  before torch


# isort: split
from datasets import Dataset
from peft import PeftModel
from recipe.adapter import AdaptedModelSettings, adapt, check_adapter_options, save_and_merge
from recipe.corpus import Corpus, Example
from recipe.job import load_inputs, run_job
from recipe.job import save as save_whole
from recipe.processes import say
from recipe.run_folder import short_hash
from recipe.settings import JobSettings
from recipe.training import TrainingData, check_options, given_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from modeling_coe.command_line import InputError, check_positive, command, parse, setting
from modeling_coe.releases import CHECKPOINTING


# The prompt on a line of its own, then the answer and the end.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
)


@dataclass(frozen=True, kw_only=True)
class ConversationSettings:
    _argument_group_name: ClassVar[str] = "conversations"
    max_length: int = setting(512, "tokens in a row of packed conversations")
    train_examples: int = setting(8000, "at most so many are trained on")
    eval_examples: int = setting(200, "of each held-out split, for its loss")


@dataclass(frozen=True, kw_only=True)
class SftSettings(ConversationSettings, AdaptedModelSettings, JobSettings):
    model: str = setting(help="folder or Hub name of a CoE model, or of another as a control, with its tokenizer")
    steps: int = 400
    batch_size: int = 4
    lr: float = 1e-3
    warmup_steps: int = 20


def parse_settings(argv: list[str] | None = None) -> SftSettings:
    """Reads the command line and checks what can be checked without data."""
    settings = parse(SftSettings, __doc__.splitlines()[0], argv)
    check_options(settings)
    check_positive(settings, "max_length", "train_examples", "eval_examples")
    check_adapter_options(settings)
    return settings


def as_messages(example: Example) -> dict[str, list[dict[str, str]]]:
    """What the user says and what the assistant says, as TRL's conversational prompt-completion format has them."""
    return {
        "prompt": [{"role": "user", "content": example.prompt}],
        "completion": [{"role": "assistant", "content": example.answer}],
    }


def as_conversations(examples: Iterable[Example], count: int) -> Dataset:
    """The first examples as a data set."""
    return Dataset.from_list([as_messages(example) for example in islice(examples, count)])


def converse(settings: SftSettings, corpus: Corpus) -> TrainingData:
    """The conversations that the options ask for."""
    train = as_conversations(corpus.train, settings.train_examples)
    held_out = {
        split: as_conversations(examples, settings.eval_examples) for split, examples in corpus.held_out.items()
    }
    rows = (repr(row).encode() for conversations in (train, *held_out.values()) for row in conversations)
    return TrainingData(train, held_out, short_hash(rows))


def check_lengths(settings: SftSettings, tokenizer: PreTrainedTokenizerBase, splits: dict[str, Dataset]) -> None:
    """Says how many held-out conversations `SFTTrainer` will leave out, since nothing of their answers is within
    `--max-length`; those of training are packed.

    Raises:
        InputError: All of a split's.
    """
    for split, conversations in splits.items():
        prompts = tokenizer.apply_chat_template(
            list(conversations["prompt"]), add_generation_prompt=True, return_dict=False
        )
        too_long = sum(len(prompt) >= settings.max_length for prompt in prompts)
        if too_long == len(prompts):
            raise InputError(
                f"--max-length is {settings.max_length}, before which no answer of the split {split!r} begins. Raise "
                "it."
            )
        if too_long and split != "train":
            say(f"{too_long} of {len(prompts)} in {split!r} exceed --max-length.")


def encode(tokenizer: PreTrainedTokenizerBase, problems: list[Example]) -> list[list[int]]:
    """Prompts as the model sees them: what the user says."""
    prompts = [as_messages(problem)["prompt"] for problem in problems]
    return tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=False)


def finetune(settings: SftSettings) -> None:
    """The whole run, from data to report."""
    inputs = load_inputs(settings, chains_only=False)
    tokenizer = inputs.tokenizer
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    data = converse(settings, inputs.corpus)
    check_lengths(settings, tokenizer, {"train": data.train, **data.held_out})
    set_seed(settings.seed)
    model, save = given_model(settings.model, inputs.config, settings.dtype), save_whole
    if settings.r is not None:
        (model, data), save = adapt(settings, model, data), save_and_merge

    def trainer(
        model: PreTrainedModel | PeftModel,
        arguments: dict[str, Any],
        data: TrainingData,
        callbacks: list[TrainerCallback],
    ) -> SFTTrainer:
        # One conversation at a time, so that held-out losses do not depend on which are in a batch.
        arguments |= {"per_device_eval_batch_size": 1}
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                **arguments,
                max_length=settings.max_length,
                packing=True,
                eval_packing=False,
                completion_only_loss=True,
                **{CHECKPOINTING: False},
            ),
            train_dataset=data.train,
            eval_dataset=data.held_out,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        trainer.create_model_card = lambda *args, **kwargs: None  # names a folder as base model; `model/` has its own
        return trainer

    title = "Chain-of-Experts, supervised fine-tuning"
    run_job(settings, inputs, data, model, title=title, trainer=trainer, encode=encode, save=save)


@command
def main(argv: list[str] | None = None) -> None:
    finetune(parse_settings(argv))


if __name__ == "__main__":
    main()
