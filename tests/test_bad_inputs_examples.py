"""What `coe-routing` and the examples say to input that does not work: one line that names it and what to do. Nothing
is left behind, and nothing of the input is touched."""

import errno
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pretrain
import pytest
from recipe import corpus
from recipe.settings import computing
from transformers import LlamaConfig, LlamaForCausalLM

from .helpers import ROOT, tiny_model


# Commands that work, but for what a case adds or replaces. `@name` is an input of that name, `@out` is not there yet.
ROWS = "--data @rows.jsonl --output-dir @out"
SHORT = "--steps 1 --batch-size 1 --num-problems 1 --max-new-tokens 4"
WORKING = {
    "pretrain": f"{ROWS} {SHORT} --block-size 16 --eval-blocks 1",
    "finetune_lora": f"--model @good {ROWS} {SHORT} --block-size 16 --eval-blocks 1",
    "sft": f"--model @good {ROWS} {SHORT}",
    "routing": f"--model @good {ROWS} --block-size 16 --eval-blocks 1",
    "evaluation": "--models @good --data @rows.jsonl --limit 1 --max-new-tokens 4 --device cpu",
    "coe-routing": "--out @out --device cpu",
}
MODULES = {"coe-routing": "modeling_coe.diagnostics.cli"}

# By command: what is wrong with it, and words of its message: the name, its value, the remedy.
CASES = {
    "pretrain": [
        ("--steps 0", "--steps is 0", "1 or more"),
        ("--steps many", "--steps", "'many'", "--help"),
        ("--batch-size 1.5", "--batch-size", "'1.5'", "--help"),
        ("--lr 0", "--lr is 0.0", "more than 0"),
        ("--lr nan", "--lr is nan", "more than 0"),
        ("--lr inf", "--lr is inf", "a finite number"),
        ("--weight-decay -1", "--weight-decay is -1.0", "0 or more"),
        ("--weight-decay nan", "--weight-decay is nan", "0 or more"),
        ("--beta2 1", "--beta2 is 1.0", "less than 1"),
        ("--aux-loss -1", "--aux-loss is -1.0", "0 or more"),
        ("--aux-loss nan", "--aux-loss is nan", "0 or more"),
        ("--init-range 0", "--init-range is 0.0", "more than 0"),
        ("--residual-scale 0", "--residual-scale is 0.0", "more than 0"),
        ("--reinject 0", "--reinject is 0.0", "more than 0"),
        ("--reinject 3", "`reinject` is 3.0", "at most 2"),
        ("--num-samples -1", "--num-samples is -1", "0 or more"),
        ("--warmup-steps -1", "--warmup-steps is -1", "0 or more"),
        ("--seed -1", "--seed is -1", "0 or more"),
        ("--seed 4294967296", "--seed is 4294967296", "less than"),
        ("--eval-fraction 1.5", "--eval-fraction is 1.5", "less than 1"),
        ("--eval-fraction nan", "--eval-fraction is nan", "less than 1"),
        ("--num-experts 0", "--num-experts is 0", "1 or more"),
        ("--iterations 0", "--iterations is 0", "1 or more"),
        ("--shared-experts -1", "--shared-experts is -1", "0 or more"),
        ("--block-size 1", "--block-size is 1", "2 or more"),
        ("--block-size 4096", "--block-size 4096", "--batch-size 1", "choose smaller blocks"),
        ("--top-k 9", "`num_experts_per_tok` is 9", "--help"),
        ("--hidden-size 100", "--hidden-size is 100", "Choose a multiple of 16"),
        ("--save-steps 15", "--save-steps is 15", "--log-steps 10", "Choose a multiple"),
        ("--vocab-size 100", "--vocab-size is 100", "258 or more"),
        ("--residual sideways", "--residual", "'sideways'", "choose from"),
        ("--nonsense 1", "--nonsense", "--help"),
        ("--resume --overwrite", "--resume", "--overwrite", "give one of them"),
        ("--data nowhere.jsonl", "--data nowhere.jsonl does not exist", "Give an existing file"),
        (
            "--data no-such-owner/no-such-data",
            "--data no-such-owner/no-such-data",
            "cannot be read",
            "Give a readable",
        ),
        ("--data @empty.jsonl", "--data", "empty.jsonl is empty", "Give a file with rows"),
        ("--data @text.md", "--data", "text.md is no .parquet, .jsonl, .json file", "Convert it"),
        ("--data @one.jsonl", "--data", "one.jsonl has a single row", "--eval-data"),
        ("--data @blank.jsonl", "--data", "blank.jsonl has no 'question' in row", "''", "Remove or fill"),
        ("--data @lists.jsonl", "lists.jsonl has a list as 'question'", "['a', 'b']", "Choose a column of texts"),
        ("--data @damaged.jsonl", "--data", "damaged.jsonl", "cannot be read", "Give a readable"),
        ("--data @latin.jsonl", "--data", "latin.jsonl cannot be read", "Give a file in UTF-8"),
        ("--data @damaged.parquet", "--data", "damaged.parquet", "cannot be read", "Give a readable"),
        ("--data @scalars.json", "--prompt-column is 'question'", "scalars.json has the columns text", "Choose one"),
        ("--data @newlines.jsonl", "--data", "newlines.jsonl", "Give"),
        ("--data @nothing", "--data", "nothing", "cannot be read", "Give a readable"),
        ("--data @folder --train-split valid", "--data", "'valid'", "cannot be read", "Give a readable"),
        ("--data @folder --data-config other", "--data", "'other'", "cannot be read", "Give a readable"),
        ("--prompt-column query", "--prompt-column is 'query'", "question, answer", "Choose one of them"),
        ("--answer-column body", "--answer-column is 'body'", "question, answer", "Choose one of them"),
        ("--train-split test", "--train-split is test", "a file", "Leave it out"),
        ("--eval-split train", "--eval-split is train", "no --eval-data", "Leave it out"),
        ("--eval-data @rows.jsonl --eval-fraction 0.5", "--eval-fraction is 0.5", "rows.jsonl", "Leave it out"),
        ("--eval-data @rows.jsonl --eval-split valid", "--eval-split is valid", "rows.jsonl, a file", "Leave it out"),
        ("--data-config main", "--data-config is main", "rows.jsonl, a file", "Leave it out"),
        ("--eval-data nowhere.jsonl", "--eval-data nowhere.jsonl does not exist", "Give an existing file"),
        ("--tokenizer no-such-tokenizer", "--tokenizer no-such-tokenizer", "cannot be loaded", "Give a folder"),
        ("--tokenizer @damaged_tokenizer", "--tokenizer", "damaged_tokenizer", "cannot be loaded", "Give a folder"),
        ("--tokenizer @odd_tokenizer", "--tokenizer", "odd_tokenizer", "'added_tokens'", "Give a folder"),
        ("--tokenizer @list_tokenizer_config", "--tokenizer", "list_tokenizer_config", "cannot be", "Give a folder"),
        ("--tokenizer @no_end", "--tokenizer", "no_end", "has no `eos_token`", "Set it"),
        ("--model no-such-model", "--model no-such-model", "cannot be loaded", "Give a folder"),
        ("--model @good --top-k 4", "--top-k is 4", "good has a shape", "Leave one of the two out"),
        ("--model @llama", "--model", "llama is a 'llama' model", "`coe-convert`"),
        ("--model @damaged_config", "--model", "damaged_config", "not a valid JSON file", "Give a folder"),
        ("--model @list_config", "--model", "list_config", "cannot be loaded", "Give a folder"),
        ("--model @text_for_a_number", "--model", "'inner_iter'", "'two'", "Give a folder"),
        ("--model @too_many_chosen", "--model", "`num_experts_per_tok` is 99", "8 or less"),
        ("--model @padding_beyond", "--model", "padding_beyond", "`pad_token_id` is 9999", "Set it"),
        ("--model @long_tokenizer", "--model", "300 tokens", "`vocab_size` is 200", "Save the tokenizer"),
        ("--model @no_tokenizer", "--model", "no_tokenizer: the tokenizer cannot be loaded", "Give a folder"),
        ("--model @no_weights", "--model", "no_weights", "model.safetensors", "Give a folder"),
        ("--model @half_weights", "--model", "half_weights", "model.safetensors' is truncated", "Give a folder"),
        ("--model @other_weights", "--model", "other_weights", "other shapes than its config.json", "Give a folder"),
        ("--model @file", "--model", "file", "cannot be loaded", "Give a folder"),
        ("--output-dir @file", "--output-dir", "file is a file", "Choose another folder"),
        ("--output-dir @file/run", "--output-dir", "file is a file", "Choose another folder"),
        ("--output-dir @stopped", "--output-dir", "already holds checkpoint-2", "--resume", "--overwrite"),
        ("--output-dir @stopped --resume", "--output-dir", "already holds checkpoint-2", "run.json", "--overwrite"),
        ("--output-dir @finished", "--output-dir", "already holds model", "--overwrite"),
        ("--output-dir @other_run --resume", "--lr is 0.003", "0.5", "Resume with the same settings"),
        ("--output-dir @old_run --branch-norm --resume", "--branch-norm is True", "has False", "the same settings"),
        ("--output-dir @damaged_run --resume", "--output-dir", "run.json is damaged", "--overwrite"),
        ("--output-dir @list_run --resume", "--output-dir", "run.json is damaged", "--overwrite"),
        ("--output-dir @empty_run --resume", "--output-dir", "'settings'", "--overwrite"),
        ("--resume", "--resume", "out holds no run", "Leave --resume out"),
        ("--output-dir @nothing --resume", "--resume", "nothing holds no run", "Leave --resume out"),
        ("--model @finished/model --output-dir @finished", "--model", "lies in --output-dir", "another output folder"),
        ("--tokenizer @finished/model --output-dir @finished --overwrite", "--tokenizer", "lies in --output-dir"),
    ],
    "finetune_lora": [
        ("--r 0", "--r is 0", "1 or more"),
        ("--expert-r 0", "--expert-r is 0", "1 or more"),
        ("--alpha -1", "--alpha is -1", "1 or more"),
        ("--lr nan", "--lr is nan", "more than 0"),
        ("--num-problems 0", "--num-problems is 0", "1 or more"),
        ("--data nowhere.jsonl", "--data nowhere.jsonl does not exist", "Give an existing file"),
        ("--data @latin.jsonl", "--data", "latin.jsonl cannot be read", "Give a file in UTF-8"),
        ("--model no-such-model", "--model no-such-model", "cannot be loaded", "Give a folder"),
        ("--model @llama", "--model", "llama is a 'llama' model", "`coe-convert`"),
        ("--model @padding_beyond", "--model", "`pad_token_id` is 9999", "Set it"),
        ("--model @long_tokenizer", "--model", "300 tokens", "`vocab_size` is 200", "Save the tokenizer"),
        ("--model @half_weights", "--model", "half_weights", "model.safetensors' is truncated", "Give a folder"),
        ("--output-dir @file", "--output-dir", "file is a file", "Choose another folder"),
        ("--output-dir @finished", "--output-dir", "already holds model", "--overwrite"),
        ("--resume", "--resume", "out holds no run", "Leave --resume out"),
    ],
    "sft": [
        ("--max-length 0", "--max-length is 0", "1 or more"),
        ("--max-length 8", "--max-length is 8", "no answer of the split 'train' begins", "Raise it"),
        ("--train-examples 0", "--train-examples is 0", "1 or more"),
        ("--eval-examples few", "--eval-examples", "'few'", "--help"),
        ("--lr -1", "--lr is -1.0", "more than 0"),
        ("--num-problems 0", "--num-problems is 0", "1 or more"),
        ("--data nowhere.jsonl", "--data nowhere.jsonl does not exist", "Give an existing file"),
        ("--prompt-column query", "--prompt-column is 'query'", "question, answer", "Choose one of them"),
        ("--model no-such-model", "--model no-such-model", "cannot be loaded", "Give a folder"),
        ("--lora 0", "--r is 0", "1 or more"),
        ("--expert-r 2", "--expert-r is 2", "no adapter is trained", "Give its rank"),
        ("--alpha 2", "--alpha is 2", "no adapter is trained", "Give its rank"),
        ("--lora 2 --model @llama --expert-r 2", "--expert-r is 2", "llama is a 'llama' model", "Leave it out"),
        ("--dtype int8", "--dtype", "'int8'", "choose from"),
        ("--model @no_tokenizer", "--model", "no_tokenizer: the tokenizer cannot be loaded", "Give a folder"),
        ("--model @long_tokenizer", "--model", "300 tokens", "`vocab_size` is 200", "Save the tokenizer"),
        ("--output-dir @file", "--output-dir", "file is a file", "Choose another folder"),
        ("--output-dir @list_run --resume", "--output-dir", "run.json is damaged", "--overwrite"),
        ("--resume", "--resume", "out holds no run", "Leave --resume out"),
    ],
    "routing": [
        ("--block-size 0", "--block-size is 0", "1 or more"),
        ("--block-size 4096", "--block-size 4096", "'held_out'", "Choose smaller blocks"),
        ("--seed -1", "--seed is -1", "0 or more"),
        ("--data @damaged.jsonl", "--data", "damaged.jsonl", "cannot be read", "Give a readable"),
        ("--model @llama", "--model", "llama is a 'llama' model", "`coe-convert`"),
        ("--model @one_iteration", "--model", "`inner_iter` is 1", "Give a chain"),
        ("--model @long_tokenizer", "--model", "300 tokens", "`vocab_size` is 200", "Save the tokenizer"),
        ("--model @half_weights", "--model", "half_weights", "model.safetensors' is truncated", "Give a folder"),
        ("--output-dir @file", "--output-dir", "file is a file", "Choose another folder"),
    ],
    "evaluation": [
        ("--limit 0", "--limit is 0", "1 or more"),
        ("--limit all", "--limit", "'all'", "--help"),
        ("--batch-size 0", "--batch-size is 0", "1 or more"),
        ("--num-fewshot -1", "--num-fewshot is -1", "0 or more"),
        ("--num-fewshot 24", "--num-fewshot is 24", "24 rows", "choose fewer"),
        ("--max-new-tokens 2048", "--max-new-tokens is 2048", "2048 positions", "Choose fewer"),
        ("--device nowhere", "--device nowhere cannot be used", "cpu"),
        ("--device meta", "--device meta cannot be used", "cpu"),
        ("--data nowhere.jsonl", "--data nowhere.jsonl", "give an existing"),
        ("--data @empty.jsonl", "--data", "empty.jsonl is empty", "give a file with rows"),
        ("--data @damaged.jsonl", "--data", "damaged.jsonl cannot be read", "Give a readable"),
        ("--data @latin.jsonl", "--data", "latin.jsonl cannot be read", "Give a readable"),
        ("--data @damaged.parquet", "--data", "damaged.parquet cannot be read", "Give a readable"),
        ("--data @blank.jsonl", "--data", "'question' in row 1", "''", "remove or fill"),
        ("--prompt-column body", "`prompt_column` is 'body'", "question, answer", "choose one of them"),
        ("--answer-column body", "`answer_column` is 'body'", "question, answer", "choose one of them"),
        ("--tasks qa_perplexity", "--tasks qa_perplexity", "Give --data, and leave this task out"),
        ("--models no-such-model", "--models no-such-model", "cannot be loaded", "Give folders"),
        ("--models @damaged_config", "--models", "damaged_config", "not a valid JSON file", "Give folders"),
        ("--models @half_weights", "--models", "half_weights", "model.safetensors' is truncated", "Give folders"),
        ("--models @no_tokenizer", "--models", "no_tokenizer", "cannot be loaded", "Give folders"),
        ("--models @no_end", "--models", "no_end", "no `eos_token`", "Set it"),
        ("--model-args dtype=nothing", "--model-args dtype=nothing", "cannot be loaded", "Give folders"),
        ("--model-args dtype", "--model-args dtype", "cannot be loaded", "Give folders"),
        ("--out @nothing", "--out", "nothing is a folder", "Give the name of a file"),
        ("--out @file/out.json", "--out", "file is a file", "Choose another folder"),
    ],
    "coe-routing": [
        ("@good @rows.jsonl --tokens 0", "--tokens is 0", "1 or more"),
        ("@good @rows.jsonl --length -5", "--length is -5", "1 or more"),
        ("@good @rows.jsonl --batch-size 0", "--batch-size is 0", "1 or more"),
        ("@good @rows.jsonl --tokens all", "--tokens", "'all'", "--help"),
        ("@good", "DATA", "--help"),
        ("@good @rows.jsonl --device nowhere", "--device nowhere cannot be used", "cpu"),
        ("@good @rows.jsonl --device meta", "--device meta cannot be used", "cpu"),
        ("@good @rows.jsonl --split test", "--split is test", "rows.jsonl is a file", "Leave it out"),
        ("@good @rows.jsonl --config other", "--config is other", "rows.jsonl is a file", "Leave it out"),
        ("@good @folder --split valid", "DATA", "'valid'", "cannot be read", "Give a readable"),
        ("@good @rows.jsonl --column body", "has no column 'body'", "Set --column to one of", "'question'"),
        ("@good @lists.jsonl --column question", "has a list in column 'question'", "['a', 'b']", "Set --column"),
        ("@good nowhere.jsonl", "DATA nowhere.jsonl does not exist", "Give an existing file"),
        ("@good nobody/nothing", "DATA nobody/nothing", "cannot be read", "Give a readable"),
        ("@good @text.md", "text.md is no .parquet, .jsonl, .json, .txt file", "Convert it"),
        ("@good @empty.jsonl", "DATA", "empty.jsonl", "Give data with text"),
        ("@good @empty.txt", "DATA", "empty.txt holds no text", "Give data with text"),
        ("@good @damaged.jsonl", "DATA", "damaged.jsonl", "cannot be read", "Give a readable"),
        ("@good @latin.jsonl", "DATA", "latin.jsonl", "cannot be read", "Give a readable"),
        ("@good @latin.txt", "DATA", "latin.txt", "cannot be read", "Give a readable"),
        ("@good @damaged.parquet", "DATA", "damaged.parquet", "cannot be read", "Give a readable"),
        ("@good @scalars.json --column body", "DATA", "scalars.json has no column 'body'", "['text']"),
        ("@good @newlines.jsonl", "DATA", "newlines.jsonl", "Give data with text"),
        ("@good @nothing", "DATA", "nothing", "cannot be read", "Give a readable"),
        ("@missing @rows.jsonl", "MODEL", "missing cannot be loaded", "Give a folder"),
        ("@file @rows.jsonl", "MODEL", "file cannot be loaded", "Give a folder"),
        ("@nothing @rows.jsonl", "MODEL", "nothing cannot be loaded", "Give a folder"),
        ("@llama @rows.jsonl", "llama is a 'llama' model", "Give a CoE model"),
        ("@dense @rows.jsonl", "dense is a 'coe' model without chained experts", "Give a CoE model"),
        ("@damaged_config @rows.jsonl", "damaged_config", "not a valid JSON file", "Give a folder"),
        ("@list_config @rows.jsonl", "list_config cannot be loaded", "Give a folder"),
        ("@text_for_a_number @rows.jsonl", "'inner_iter'", "'two'", "Give a folder"),
        ("@too_many_chosen @rows.jsonl", "`num_experts_per_tok` is 99", "8 or less"),
        ("@padding_beyond @rows.jsonl", "padding_beyond", "`pad_token_id` is 9999", "Set it"),
        ("@long_tokenizer @rows.jsonl", "long_tokenizer has 300 tokens, its model 200", "Save the tokenizer"),
        ("@no_tokenizer @rows.jsonl", "no_tokenizer cannot be loaded", "Give a folder"),
        ("@damaged_tokenizer @rows.jsonl", "damaged_tokenizer cannot be loaded", "Give a folder"),
        ("@no_weights @rows.jsonl", "no_weights", "model.safetensors", "Give a folder"),
        ("@half_weights @rows.jsonl", "half_weights", "model.safetensors' is truncated", "Give a folder"),
        ("@other_weights @rows.jsonl", "other_weights", "other shapes than its config.json", "Give a folder"),
        ("@good @rows.jsonl --out @file", "--out", "file is a file", "Choose another folder"),
        ("@good @rows.jsonl --out @file/out", "--out", "file is a file", "Choose another folder"),
    ],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Models, data and folders of runs, sound ones and others, by what is wrong with them."""
    folder = tmp_path_factory.mktemp("inputs")
    write_data(folder)
    write_models(folder)
    write_runs(folder)
    return folder


def write_data(folder: Path) -> None:
    examples = list(islice(corpus.ArithmeticExamples(0, "train"), 24))
    rows = [
        json.dumps({"question": example.prompt, "answer": example.answer, "text": example.prompt})
        for example in examples
    ]
    contents = {
        "rows.jsonl": "\n".join(rows),
        "one.jsonl": rows[0],
        "blank.jsonl": '{"question": "1 + 1?", "answer": "2"}\n' + 2 * '{"question": "", "answer": "3"}\n',
        "lists.jsonl": 8 * '{"question": ["a", "b"], "answer": "c"}\n',
        "damaged.jsonl": rows[0] + '\n{"question": ',
        "scalars.json": "[1, 2, 3]",
        "empty.jsonl": "",
        "newlines.jsonl": "\n\n",
        "empty.txt": "\n\n",
        "text.md": "hello",
        "file": "hello",
    }
    for name, text in contents.items():
        (folder / name).write_text(text)
    latin = '{"question": "caf\xe9", "answer": "cr\xe8me"}\n'
    (folder / "latin.jsonl").write_bytes(8 * latin.encode("latin-1"))
    (folder / "latin.txt").write_bytes(8 * latin.encode("latin-1"))
    (folder / "damaged.parquet").write_bytes(b"PAR1 and no more")
    (folder / "folder").mkdir()
    (folder / "folder" / "train.jsonl").write_text(contents["rows.jsonl"])
    (folder / "nothing").mkdir()


def write_models(folder: Path) -> None:
    tokenizer = corpus.train_tokenizer(islice(corpus.ArithmeticExamples(0, "train"), 50), 300)
    shape = {"vocab_size": 300, "pad_token_id": 1, "eos_token_id": 0, "bos_token_id": 0}
    llama = LlamaConfig(
        **{"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16},
        **{"num_hidden_layers": 1, "num_attention_heads": 2},
    )
    models = {
        "good": tiny_model(**shape),
        "llama": LlamaForCausalLM(llama),
        "one_iteration": tiny_model(**shape, inner_iter=1),
        "dense": tiny_model(**shape, n_routed_experts=None),
        "long_tokenizer": tiny_model(**shape | {"vocab_size": 200}),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    def copy(name: str) -> Path:
        files = ("config.json", "generation_config.json", "model.safetensors", "tokenizer*.json")
        (folder / name).mkdir()
        for path in (path for pattern in files for path in (folder / "good").glob(pattern)):
            shutil.copy(path, folder / name)
        return folder / name

    changes = {
        "text_for_a_number": {"inner_iter": "two"},
        "too_many_chosen": {"num_experts_per_tok": 99},
        "padding_beyond": {"pad_token_id": 9999},
        "other_weights": {"hidden_size": 64},
    }
    for name, change in changes.items():
        path = copy(name) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    texts = {
        "damaged_config": ("config.json", '{"model_type": '),
        "list_config": ("config.json", "[]"),
        "damaged_tokenizer": ("tokenizer.json", '{"version": '),
        "odd_tokenizer": ("tokenizer.json", '{"version": 1}'),
        "list_tokenizer_config": ("tokenizer_config.json", "[]"),
    }
    for name, (file, text) in texts.items():
        (copy(name) / file).write_text(text)
    weights = copy("half_weights") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (copy("no_weights") / "model.safetensors").unlink()
    for path in copy("no_tokenizer").glob("tokenizer*"):
        path.unlink()
    path = copy("no_end") / "tokenizer_config.json"
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "eos_token"})
    )


def write_runs(folder: Path) -> None:
    (folder / "stopped" / "checkpoint-2").mkdir(parents=True)
    shutil.copytree(folder / "good", folder / "finished" / "model")
    settings = computing(pretrain.parse_settings(command("pretrain", "", folder, folder / "out")))
    older = {name: value for name, value in settings.items() if name not in pretrain.STABILISERS}
    runs = {
        "other_run": json.dumps({"settings": settings | {"lr": 0.5}, "data_fingerprint": "0"}),
        "old_run": json.dumps({"settings": older, "data_fingerprint": "0"}),
        "damaged_run": '{"settings": ',
        "list_run": "[]",
        "empty_run": "{}",
    }
    for name, text in runs.items():
        (folder / name / "tokenizer").mkdir(parents=True)
        (folder / name / "run.json").write_text(text)


def contents(folder: Path) -> dict[str, str | None]:
    """All that lies in a folder, with hashes of the files."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def command(script: str, wrong: str, inputs: Path, out: Path) -> list[str]:
    words = f"{WORKING[script]} {wrong}".split()  # of an option that is given twice, the last counts
    return [str(out if word == "@out" else inputs / word[1:]) if word.startswith("@") else word for word in words]


@pytest.mark.parametrize("script", WORKING)
def test_the_commands_work(inputs, tmp_path, script):
    """What the cases are refused for is what is wrong with them."""
    if script == "evaluation":
        pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    before = contents(inputs)
    data = "@good @rows.jsonl" if script == "coe-routing" else ""
    importlib.import_module(MODULES.get(script, script)).main(command(script, data, inputs, tmp_path / "out"))
    assert contents(inputs) == before


@pytest.mark.parametrize(
    ("script", "wrong", "words"),
    [(script, wrong, words) for script, cases in CASES.items() for wrong, *words in cases],
    ids=[f"{script} {wrong}" for script, cases in CASES.items() for wrong, *_ in cases],
)
def test_one_line_that_names_it(inputs, tmp_path, capsys, monkeypatch, script, wrong, words):
    if script == "evaluation":
        pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    module = importlib.import_module(MODULES.get(script, script))
    before = contents(inputs)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        module.main(command(script, wrong, inputs, tmp_path / "out"))
    message = exit_info.value.code  # a text is printed, and the exit code is 1
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    assert [word for word in words if word not in message] == [], message
    assert "Traceback" not in capsys.readouterr().err
    assert contents(tmp_path) == {} and contents(inputs) == before


@pytest.mark.parametrize(
    ("program", "options", "line"),
    [
        (
            [str(ROOT / "examples" / "pretrain.py")],
            "--output-dir out --data nowhere.jsonl",
            "error: --data nowhere.jsonl does not exist. Give an existing file, or the name of a data set.",
        ),
        (
            [str(ROOT / "examples" / "routing.py")],
            "--output-dir out",
            "error: the following arguments are required: --model. `--help` tells what every option takes.",
        ),
        (
            ["-m", "modeling_coe.diagnostics.cli"],
            "model rows.jsonl --out out --tokens 0",
            "error: --tokens is 0; it must be 1 or more.",
        ),
    ],
    ids=["pretrain", "routing", "coe-routing"],
)
def test_from_another_folder(tmp_path, program, options, line):
    process = subprocess.run(
        [sys.executable, *program, *options.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stdout, process.stderr) == (1, "", f"{line}\n")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["pretrain", "routing", "coe-routing"])
def test_a_folder_that_cannot_be_written(inputs, tmp_path, monkeypatch, script):
    """As it is told by the system: the rights of a folder do not bind every user."""
    module = importlib.import_module(MODULES.get(script, script))
    wrong = "@good @rows.jsonl" if script == "coe-routing" else ""
    argv, before = command(script, wrong, inputs, tmp_path / "out"), contents(inputs)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        with pytest.raises(SystemExit, match=f"error: --out.* cannot be written: {tmp_path} is read-only. Choose"):
            module.main(argv)
    mkdir = Path.mkdir

    def fail(folder: Path, *args, **kwargs) -> None:
        if folder == tmp_path / "out":
            raise OSError(errno.ENOSPC, "No space left")
        mkdir(folder, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", fail)
        with pytest.raises(SystemExit, match=r"error: --out.* cannot be made: .*No space left\. Choose another"):
            module.main(argv)
    assert contents(tmp_path) == {} and contents(inputs) == before


@pytest.mark.parametrize(
    ("module", "wrong", "words"),
    [
        ("paper.run", "--scale nowhere", ("--scale", "'nowhere'", "choose from")),
        ("paper.run", "--scale smoke --jobs 0", ("--jobs is 0", "1 or more")),
        ("paper.run", "--scale smoke --threads 0", ("--threads is 0", "1 or more")),
        ("paper.run", "--scale smoke --minutes nan", ("--minutes is nan", "0 or more")),
        ("paper.run", "--scale smoke --seeds 1 -2", ("--seeds has -2", "0 or more")),
        ("paper.run", "--scale smoke --only figure_99", ("--only", "'figure_99'", "choose from")),
        ("paper.run", "--scale smoke --results @file", ("--results", "file is a file", "choose a folder")),
        ("paper.report", "--results @missing", ("--results", "missing is no folder", "give the one")),
        ("paper.report", "--results @nothing --output @missing/a.md", ("--output", "missing is no folder", "make it")),
        ("paper.results", "@rows.jsonl", ("RUNS.jsonl", "required")),
        ("paper.results", "@rows.jsonl @missing", ("missing does not exist", "give two files")),
        ("upcycling", "--steps 0", ("--steps is 0", "1 or more")),
        ("upcycling", "--work @file", ("--work", "file is a file", "Choose another folder")),
        ("train_step", "--pairs 0", ("--pairs is 0", "1 or more")),
        ("train_step", "--output @file", ("--output", "file is a file", "Choose another folder")),
    ],
)
def test_commands_of_benchmarks(inputs, capsys, module, wrong, words):
    """Some in the words of `argparse`, after the usage."""
    before = contents(inputs)
    argv = [str(inputs / word[1:]) if word.startswith("@") else word for word in wrong.split()]
    with pytest.raises(SystemExit) as exit_info:
        importlib.import_module(f"benchmarks.{module}").main(argv)
    code = exit_info.value.code
    line = code if isinstance(code, str) else capsys.readouterr().err.splitlines()[-1]
    assert (isinstance(code, str) or code == 2) and [word for word in words if word not in line] == [], line
    assert contents(inputs) == before
