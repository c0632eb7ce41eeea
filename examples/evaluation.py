# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Evaluates causal language models, Chain-of-Experts or other, side by side with lm-eval.

    python examples/evaluation.py --models runs/demo/model --data test.parquet --limit 100
    python examples/evaluation.py --models runs/demo/model Qwen/Qwen3-0.6B --data test.parquet --num-fewshot 4
    python examples/evaluation.py --models runs/demo/model --tasks arc_easy lambada_openai

`--data` is a parquet or JSON-lines file of question/answer pairs, in the format of the training examples: the prompt,
a newline, the answer. Models are measured by the tasks in `tasks/`, which lm-eval's own command line runs too:

    perplexity     exp(-L / T). L is the log-likelihood in nats, and T the number of tokens, of the reference answers
                   with the newline before them, given their prompts, summed over the problems. It depends on the
                   tokenizer: compare it between models that share one, and with the losses of training.
    bits per byte  -L / (B ln 2). B is the number of UTF-8 bytes of the same text, whatever the tokenizer.
    exact match    share of the problems whose greedy solution has the final answer of the reference: the number after
                   the first ####, without thousands separators. `-` where the data mark no final answers.

Standard errors are over problems; those of the two ratios are linearised. `tasks/question_answer.py` says how the
tokens relate to those of training.

A solution ends at the end-of-sequence token of the tokenizer or one of the model, at two blank lines, which separate
few-shot examples, or at `--max-new-tokens`. Few-shot examples are drawn from the other rows of the data.
"""

from dataclasses import asdict, dataclass
from math import exp, log
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import recipe.openmp  # noqa: F401  before torch


# isort: split
import lm_eval
import torch
from datasets.exceptions import DatasetsError
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table, simple_parse_args_string
from peft import PeftModel
from pyarrow import ArrowInvalid
from recipe.run_folder import write_json
from tasks.question_answer import final_answer

import modeling_coe  # noqa: F401  registers the Auto classes
from modeling_coe.command_line import (
    InputError,
    check_device,
    check_folder,
    check_not_negative,
    check_positive,
    command,
    loading,
    make_folder,
    one_line,
    parse,
    setting,
)


TASKS = Path(__file__).parent / "tasks"
PERPLEXITY, EXACT_MATCH = "qa_perplexity", "qa_exact_match"
COLUMNS = ("model", "parameters", "active", "expert FLOPs/token", "perplexity", "bits per byte", "exact match, %")


class Measure(NamedTuple):
    """A figure and its standard error, `None` where there is a single problem."""

    value: float
    error: float | None


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    _argument_group_name: ClassVar[str] = "evaluation"
    models: list[str] = setting(help="folders or Hub names")
    trust_remote_code: bool = setting(False, "run code that a model carries")
    model_args: str = setting("", "more of lm-eval's `hf` model: dtype=bfloat16,peft=FOLDER")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "what torch calls it")
    data: str | None = setting(None, "parquet or JSON-lines file of question/answer pairs")
    prompt_column: str = setting("question", "column with the prompts")
    answer_column: str = setting("answer", "column with the answers")
    tasks: list[str] = setting([], "tasks of lm-eval: names, or YAML files")
    limit: int | None = setting(None, "problems of each task; all if not given")
    num_fewshot: int | None = setting(None, "examples in a prompt; 0, or as a task says, if not given")
    batch_size: int = setting(16, "texts at a time")
    max_new_tokens: int = setting(256, "of a solution of the data's problems")
    out: Path | None = setting(None, "JSON file for the results")


def parse_settings(argv: list[str] | None = None) -> EvaluationSettings:
    """Reads the command line and checks what can be checked without data and models."""
    settings = parse(EvaluationSettings, __doc__.splitlines()[0], argv)
    if settings.data is None and not settings.tasks:
        raise InputError("Neither --data nor --tasks is given; give one of them, or both.")
    check_positive(settings, "batch_size", "max_new_tokens")
    if settings.limit is not None:
        check_positive(settings, "limit")
    if settings.num_fewshot is not None:
        check_not_negative(settings, "num_fewshot")
    check_device(settings.device)
    if settings.out is not None:
        check_folder("out", settings.out.parent)
        if settings.out.is_dir():
            raise InputError(
                f"--out {settings.out} is a folder. Give the name of a file, such as {settings.out}/results.json."
            )
    return settings


def load_tasks(settings: EvaluationSettings) -> tuple[TaskManager, list[Task]]:
    """lm-eval's index of tasks, and of these the ones on `--data`.

    Raises:
        InputError: A task does not exist, or the data cannot be read.
    """
    metadata = {name: getattr(settings, name) for name in ("data", "prompt_column", "answer_column")}
    # Indexing lm-eval's own tasks takes a while.
    manager = TaskManager(include_path=str(TASKS), include_defaults=bool(settings.tasks), metadata=metadata)
    for name in settings.tasks:
        if name in (PERPLEXITY, EXACT_MATCH):
            raise InputError(f"--tasks {name} is what --data runs. Give --data, and leave this task out.")
        if name not in manager.all_tasks and not Path(name).is_file():
            raise InputError(f"--tasks {name} does not exist. `lm-eval ls tasks` lists names; or give a YAML file.")
    if settings.data is None:
        return manager, []
    try:
        tasks = manager.load(PERPLEXITY)["tasks"]
        answers = tasks[PERPLEXITY].dataset["test"]["answer"]
        if None in map(final_answer, answers):
            print(f"--data {settings.data} has answers without a number after ####: there is no exact match.")
        else:
            tasks |= manager.load(EXACT_MATCH)["tasks"]
            tasks[EXACT_MATCH].set_config("generation_kwargs", {"max_gen_toks": settings.max_new_tokens}, update=True)
    except (DatasetsError, OSError, UnicodeDecodeError, ArrowInvalid) as error:
        raise InputError(
            f"--data {settings.data} cannot be read: {one_line(error)} Give a readable parquet file, or JSON lines in "
            "UTF-8."
        ) from error
    except ValueError as error:  # of `tasks/question_answer.py`
        raise InputError(f"--data {settings.data}: {one_line(error)}") from error
    if (settings.num_fewshot or 0) >= len(answers):
        raise InputError(
            f"--num-fewshot is {settings.num_fewshot}, but --data {settings.data} has {len(answers)} rows; choose "
            "fewer."
        )
    return manager, list(tasks.values())


def load_model(name: str, settings: EvaluationSettings) -> HFLM:
    """One of the models, in lm-eval's wrapper.

    Raises:
        InputError: It cannot be loaded, or cannot solve problems in `--max-new-tokens`.
    """
    options = simple_parse_args_string(settings.model_args)
    options |= {"pretrained": name, "trust_remote_code": settings.trust_remote_code, "backend": "causal"}
    options |= {"device": settings.device, "batch_size": settings.batch_size}
    given = f"--models {name}" + (f" with --model-args {settings.model_args}" if settings.model_args else "")
    with loading(given, "Give folders or Hub names of causal language models with their tokenizers."):
        model = HFLM(**options)
    if model.eot_token_id is None:
        raise InputError(f"--models {name}: the tokenizer has no `eos_token`. Set it in its tokenizer_config.json.")
    if settings.data is not None and settings.max_new_tokens >= model.max_length:
        raise InputError(
            f"--max-new-tokens is {settings.max_new_tokens}, which leaves no room for a prompt in the "
            f"{model.max_length} positions of --models {name}. Choose fewer."
        )
    # lm-eval ends a batch where all its sequences have this token, but generation ends each of them at its own.
    ends = model.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    model.model.generation_config.eos_token_id = [end for end in {*ends, model.eot_token_id} if end is not None]
    return model


def ratio(numerators: list[float], denominators: list[int]) -> Measure:
    """The sum of the numerators over the sum of the denominators, and the linearised standard error of this ratio for
    independent problems."""
    count, total = len(numerators), sum(denominators)
    value = sum(numerators) / total
    if count == 1:
        return Measure(value, None)
    residuals = sum((n - value * d) ** 2 for n, d in zip(numerators, denominators, strict=True))
    return Measure(value, (residuals * count / (count - 1)) ** 0.5 / total)


def scaled(measure: Measure, factor: float) -> Measure:
    return Measure(measure.value * factor, None if measure.error is None else measure.error * factor)


def likelihoods(model: HFLM, samples: list[dict[str, Any]]) -> dict[str, Measure]:
    """Perplexity per token and bits per byte from lm-eval's log of `qa_perplexity`."""
    losses, tokens, num_bytes = [], [], []
    for sample in samples:
        log_likelihood, length = sample["bits_per_byte"]
        context, answer = sample["arguments"][0]
        losses.append(-log_likelihood)
        num_bytes.append(length)
        # Where lm-eval begins to score.
        tokens.append(len(model.tok_encode(context + answer)) - len(model.tok_encode(context.rstrip())))
    loss = ratio(losses, tokens)
    perplexity = exp(loss.value)
    error = None if loss.error is None else perplexity * loss.error
    return {
        "perplexity": Measure(perplexity, error),
        "bits_per_byte": scaled(ratio(losses, num_bytes), 1 / log(2)),
    }


def evaluate(name: str, settings: EvaluationSettings, manager: TaskManager, tasks: list[Task]) -> dict[str, Any]:
    """Evaluates one model.

    Returns:
        `dict[str, Any]`: Its sizes, its measures on the data, and `tasks`, lm-eval's results of all tasks.
    """
    model = load_model(name, settings)
    output = lm_eval.simple_evaluate(
        model,
        tasks=[*settings.tasks, *tasks],
        task_manager=manager,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        batch_size=settings.batch_size,
    )
    results, samples = output["results"], output["samples"]
    # A CoE model's configuration knows what it costs, but not what an adapter on it does.
    costs = None if isinstance(model.model, PeftModel) else model.config
    measures = {}
    if PERPLEXITY in samples:
        measures = likelihoods(model, samples[PERPLEXITY])
    if EXACT_MATCH in samples:
        value, error = (results[EXACT_MATCH][f"exact_match{kind},none"] for kind in ("", "_stderr"))
        measures["exact_match"] = Measure(value, None if error == "N/A" else error)
    if settings.tasks:
        print(f"\n{name}\n{make_table(output)}")
    return {
        "model": name,
        "total_parameters": model.model.num_parameters(),
        "active_parameters": getattr(costs, "active_parameters", None),
        "expert_flops_per_token": getattr(costs, "expert_flops_per_token", None),
        "problems": len(samples[PERPLEXITY]) if PERPLEXITY in samples else None,
        **{measure: figures._asdict() for measure, figures in measures.items()},
        "tasks": results,
    }


def table(records: list[dict[str, Any]]) -> str:
    """One row for each model, in columns."""

    def count(value: int | None) -> str:
        return "-" if value is None else f"{value:,}"

    def measure(figures: dict[str, float | None] | None, digits: int, unit: int = 1) -> str:
        if figures is None:
            return "-"
        shown = f"{figures['value'] * unit:,.{digits}f}"
        return shown if figures["error"] is None else f"{shown} ± {figures['error'] * unit:,.{digits}f}"

    rows = [COLUMNS]
    for record in records:
        rows.append(
            (
                record["model"],
                count(record["total_parameters"]),
                count(record["active_parameters"]),
                count(record["expert_flops_per_token"]),
                measure(record.get("perplexity"), digits=3),
                measure(record.get("bits_per_byte"), digits=4),
                measure(record.get("exact_match"), digits=1, unit=100),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


@command
def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(argv)
    manager, tasks = load_tasks(settings)
    records = []
    try:
        for name in settings.models:
            records.append(evaluate(name, settings, manager, tasks))
            if settings.out is not None:
                make_folder("out", settings.out.parent)
                told = asdict(settings) | {"out": str(settings.out)}
                write_json(settings.out, {"lm_eval": lm_eval.__version__, "settings": told, "models": records})
    finally:  # a model that fails takes no other with it
        if records:
            print(f"\n{table(records)}")


if __name__ == "__main__":
    main()
