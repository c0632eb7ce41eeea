# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""lm-eval tasks on question/answer pairs of a parquet or JSON-lines file: `qa_perplexity` and `qa_exact_match`.

    lm-eval run --model hf --model_args pretrained=runs/demo/model --tasks examples/tasks --metadata data=test.parquet

`--metadata` takes `data`, `prompt_column` (question) and `answer_column` (answer). Given the folder or its files,
lm-eval imports this module before it loads the model, so CoE models load without `trust_remote_code`. With
`--include_path examples/tasks --tasks qa_perplexity` it comes too late: add `trust_remote_code=True`.

The format is that of the training examples: the prompt, a newline, the answer. Two things differ from training:

- lm-eval tokenises prompt and answer together, and counts the whitespace between them to the answer. So
  `qa_perplexity` scores the newline and the answer, and nothing after: not the end-of-sequence token. The tokens are
  those of training unless the tokenizer merges across the newline.
- A tokenizer that puts a beginning-of-sequence token before every text does so here as well; training does not.
  `add_bos_token=False` in `--model_args` leaves it out.
"""

import re
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset


try:
    import modeling_coe  # noqa: F401  registers the Auto classes
except ModuleNotFoundError as error:
    # Without it models load by `trust_remote_code`.
    if error.name != "modeling_coe":
        raise

FILE_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
FINAL_ANSWER = re.compile(r"####\s*(-?[\d.,]*\d)")


def load(
    data: str | None = None, prompt_column: str = "question", answer_column: str = "answer", **_: Any
) -> DatasetDict:
    """Reads the file that `--metadata` names.

    Args:
        data (`str`): A parquet or JSON-lines file.
        prompt_column (`str`): Its column of prompts.
        answer_column (`str`): Its column of reference answers.
        _: What else lm-eval knows of the run, such as the arguments of the model.

    Returns:
        `DatasetDict`: The split `test` with the columns `prompt`, which ends with a newline, and `answer`.

    Raises:
        ValueError: The file is not there, of another format, or lacks a column or a value.
    """
    if data is None or not Path(data).is_file() or Path(data).suffix not in FILE_FORMATS:
        raise ValueError(f"`data` is {data!r}; give an existing {', '.join(FILE_FORMATS)} file.")
    if Path(data).stat().st_size == 0:
        raise ValueError(f"{data} is empty; give a file with rows.")
    rows = load_dataset(FILE_FORMATS[Path(data).suffix], data_files=str(data), split="train")
    for name, column in (("prompt_column", prompt_column), ("answer_column", answer_column)):
        if column not in rows.column_names:
            raise ValueError(
                f"`{name}` is {column!r}, but {data} has the columns {', '.join(rows.column_names)}; choose one of "
                "them."
            )
        for row, text in enumerate(rows[column]):
            if text is None or not str(text).strip():
                raise ValueError(f"{data} has no {column!r} in row {row}: {text!r}; remove or fill this row.")
    prompts = [f"{prompt}\n" for prompt in rows[prompt_column]]
    return DatasetDict(
        test=Dataset.from_dict({"prompt": prompts, "answer": [str(answer) for answer in rows[answer_column]]})
    )


def check_answers(documents: Dataset) -> Dataset:
    """The documents as they are.

    Raises:
        ValueError: There is an answer without a number after `####`, so nothing to match, or one with two blank lines,
            at which solutions end.
    """
    for row, answer in enumerate(documents["answer"]):
        if final_answer(answer) is None:
            raise ValueError(
                f"The answer in row {row} has no number after ####: {answer!r}; mark it, or evaluate qa_perplexity "
                "only."
            )
        if "\n\n\n" in answer:
            raise ValueError(f"The answer in row {row} has two blank lines, where a solution ends; remove one.")
    return documents


def likelihood(document: dict[str, str], results: list[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """Pairs of a log-likelihood in nats and the number of bytes or words it is spread over.

    Bytes are those that lm-eval scores: the whitespace that ends the prompt, which is at least a newline, and the
    answer. Words are those of the answer, as lm-eval counts them.
    """
    log_likelihood, _ = results[0]
    prompt, answer = document["prompt"], document["answer"]
    num_bytes = len((prompt[len(prompt.rstrip()) :] + answer).encode())
    num_words = len(re.split(r"\s+", answer))
    return {
        "bits_per_byte": (log_likelihood, num_bytes),
        "byte_perplexity": (log_likelihood, num_bytes),
        "word_perplexity": (log_likelihood, num_words),
    }


def exact_match(document: dict[str, str], results: list[str]) -> dict[str, float]:
    """1 where the solution has the final answer of the reference, 0 where it has another or none."""
    return {"exact_match": float(final_answer(results[0]) == final_answer(document["answer"]))}


def final_answer(text: str) -> str | None:
    """The number after the first `####` that has one, without thousands separators, or `None`."""
    match = FINAL_ANSWER.search(text)
    return match[1].replace(",", "") if match else None
