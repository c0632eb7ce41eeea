# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Takes a small pre-trained model all the way: download, convert, tune beside controls, evaluate, and chat.

    python examples/real_model.py --output-dir runs/real --data train.parquet --eval-data test.parquet

The dense model is converted by `coe-convert --upcycle slice` into a chain that computes the same. `sft.py` tunes it
with adapters, and two controls, without which a falling loss would say nothing of the chain: the dense model, and the
same slices in a single iteration. Then the same held-out conversations are put to the model as it was and to the
three. A run that was interrupted goes on when it is started again. The output folder holds

    source/          the dense model, where it does not come from the Hub
    slices/          the slices of its MLPs as experts, in one iteration
    chain/           the same experts in two
    NAME-tuned/      the runs of dense, slices and chain, as `sft.py` writes them; `chain-tuned/model` is the result
    run.json         the settings, which a run that goes on must share, and the seconds of every stage
    results.json     losses, exact match, sizes, speed, peak memory, the machine
    results.md       the same as a table
"""

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar

import recipe.openmp  # noqa: F401  before torch


# isort: split
import sft
import torch
from recipe.answers import exact_match, solve
from recipe.corpus import Example, check_data_options, load_corpus, load_tokenizer
from recipe.pretrained import SMOLLM2, fetch
from recipe.run_folder import read_json, write_json
from recipe.settings import DataSettings
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from conversion import ConversionError, Options, convert
from modeling_coe.command_line import (
    InputError,
    check_folder,
    check_positive,
    check_range,
    command,
    make_folder,
    option,
    parse,
    setting,
)


# What is tuned: its name in the table, and how it is converted, if it is.
MODELS = {
    "dense": ("dense, tuned", None),
    "slices": ("slices, one iteration, tuned", "identity"),
    "chain": ("chain, two iterations, tuned", "split"),
}


@dataclass(frozen=True, kw_only=True)
class RecipeSettings:
    _argument_group_name: ClassVar[str] = "recipe"
    output_dir: Path = setting(help="folder for everything the run writes")
    model: str = setting(SMOLLM2, "folder or Hub name of a dense model with its tokenizer")
    seed: int = setting(0, "of the data, the adapters and the order of training")
    experts: int = setting(8, "slices of every MLP, all of which a token uses")
    r: int = setting(8, "rank of the adapters", aliases="--lora-r")
    expert_r: int = setting(4, "rank of the experts' adapters")
    steps: int = setting(16, "of the optimizer, for each of the three models")
    batch_size: int = setting(4, "rows of packed conversations per step")
    max_length: int = setting(384, "tokens of a row")
    lr: float = setting(1e-3, "highest learning rate")
    train_examples: int = setting(1000, "conversations at most")
    eval_examples: int = setting(48, "held-out conversations whose answers' loss is measured")
    num_problems: int = setting(16, "held-out problems to solve")
    max_new_tokens: int = setting(128, "of one solution")


@dataclass(frozen=True, kw_only=True)
class RealModelSettings(RecipeSettings, DataSettings):
    pass


def parse_settings(argv: list[str] | None = None) -> RealModelSettings:
    """Reads the command line and checks what can be checked without data."""
    settings = parse(RealModelSettings, __doc__.splitlines()[0], argv)
    check_folder("output_dir", settings.output_dir)
    check_data_options(settings)
    check_range(settings, "seed", 0, 2**32)
    check_range(settings, "lr", 0, exclusive=True)
    counts = [each.name for each in fields(RecipeSettings) if isinstance(each.default, int) and each.name != "seed"]
    check_positive(settings, *counts)
    return settings


class Stages:
    """What a run has done, in its `run.json`: a stage that is there is not done again.

    Raises:
        InputError: The folder holds a run with other settings.
    """

    def __init__(self, settings: RealModelSettings):
        self.path = settings.output_dir / "run.json"
        told = {name: value for name, value in asdict(settings).items() if name != "output_dir"}
        self.run = read_json(self.path) if self.path.is_file() else {"settings": told, "seconds": {}, "found": {}}
        for name, value in told.items():
            if self.run["settings"].get(name) != value:
                raise InputError(
                    f"{option(name)} is {value!r}, but the run in --output-dir {settings.output_dir} has "
                    f"{self.run['settings'].get(name)!r}. Go on with the same settings, or choose another folder."
                )

    def do(self, name: str, act: Callable[[], Any]) -> None:
        """Does a stage and notes how long it took."""
        if name in self.run["seconds"]:
            print(f"\n== {name}: done before", flush=True)
            return
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        found = act()
        self.run["seconds"][name] = time.perf_counter() - start
        self.run["found"][name] = found
        make_folder("output_dir", self.path.parent)
        write_json(self.path, self.run)


def tune(settings: RealModelSettings, model: str, name: str) -> None:
    """A run of `sft.py`, or the rest of one, in a process of its own, which leaves no memory behind."""
    output_dir = settings.output_dir / f"{name}-tuned"
    same = ("seed", "r", "steps", "batch_size", "max_length", "lr", "train_examples", "num_problems", "max_new_tokens")
    options = {
        **{each: getattr(settings, each) for each in same},
        **{each.name: getattr(settings, each.name) for each in fields(DataSettings)},
        "model": model,
        "output_dir": output_dir,
        "dtype": "bfloat16",
        "micro_batch_size": 1,
        "warmup_steps": max(1, settings.steps // 10),
        "log_steps": max(1, settings.steps // 25),
        "eval_steps": settings.steps,
        "eval_examples": min(8, settings.eval_examples),  # for the curve; all are measured afterwards
        "save_steps": max(1, settings.steps // 25) * 5,
        "num_samples": 1,
    }
    words = [str(word) for each, value in options.items() if value is not None for word in (option(each), value)]
    if is_chain(model):
        words += ["--expert-r", str(settings.expert_r), "--routers"]
    words += ["--resume"] if (output_dir / "tokenizer").is_dir() else []
    if status := subprocess.run([sys.executable, sft.__file__, *words], check=False).returncode:
        sys.exit(status)


def is_chain(model: str) -> bool:
    return AutoConfig.from_pretrained(model).model_type == "coe"


# ---- Evaluation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def answer_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example], max_length: int
) -> list[float]:
    """Of every conversation, the mean cross-entropy of the answer's tokens, in nats. What is beyond `max_length` is
    left out, and so are conversations whose answer begins there."""
    losses = []
    for example in tqdm(examples, desc="Held-out losses", disable=None):
        messages = sft.as_messages(example)
        prompt = tokenizer.apply_chat_template(messages["prompt"], add_generation_prompt=True, return_dict=False)
        both = tokenizer.apply_chat_template(messages["prompt"] + messages["completion"], return_dict=False)
        if len(prompt) >= max_length:
            continue
        ids = torch.tensor([both[:max_length]])
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :]).item())
    return losses


def evaluate(settings: RealModelSettings, folder: str, solved: dict[str, Any] | None = None) -> dict[str, Any]:
    """Losses and exact match of one model on the held-out data.

    Args:
        settings (`RealModelSettings`): All options.
        folder (`str`): Where the model is.
        solved (`dict[str, Any]`, *optional*): The results of its `sft.py`, which has solved the problems already.
    """
    tokenizer = load_tokenizer(folder, "--model")
    tokenizer.chat_template = tokenizer.chat_template or sft.CHAT_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    split, examples = next(iter(load_corpus(settings, settings.seed).held_out.items()))
    losses = answer_losses(model, tokenizer, list(islice(examples, settings.eval_examples)), settings.max_length)
    if not losses:
        raise InputError(f"--max-length is {settings.max_length}, before which no held-out answer begins. Raise it.")
    if solved is None:
        problems = list(islice(examples, settings.num_problems))
        solutions = solve(model, tokenizer, sft.encode(tokenizer, problems), settings.max_new_tokens)
        solved = {"exact_match": {split: exact_match(problems, solutions)}}
    return {"parameters": model.num_parameters(), "losses": losses, "exact_match": solved["exact_match"][split]}


def paired(losses: list[float], others: list[float]) -> dict[str, float | None]:
    """The mean difference of losses on the same conversations, and its standard error."""
    differences = [loss - other for loss, other in zip(losses, others, strict=True)]
    error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
    return {"difference": mean(differences), "error": error}


# ---- Report ---------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What a run was computed with."""
    cpuinfo, cpu = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    releases = {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), **releases}


def peak_memory() -> int:
    """The most bytes of memory that one process has held at once: this one, or the largest that it has waited for."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak if sys.platform == "darwin" else peak * 1024


def summarise(settings: RealModelSettings, stages: Stages) -> dict[str, Any]:
    """What `results.json` holds."""
    found, seconds = stages.run["found"], stages.run["seconds"]
    rows = {}
    for name in ("source", *MODELS):
        evaluation = found[f"evaluate {name}"]
        rows[name] = {
            "parameters": evaluation["parameters"],
            "trained_parameters": None,
            "held_out_loss": mean(evaluation["losses"]),
            "exact_match": evaluation["exact_match"],
        }
        if name != "source":
            run = read_json(settings.output_dir / f"{name}-tuned" / "results.json")
            rows[name]["trained_parameters"] = run["adapter_parameters"]
            rows[name]["tokens_per_second"] = run["tokens_per_second"]
            rows[name]["less_before"] = paired(evaluation["losses"], found["evaluate source"]["losses"])
    losses = {name: found[f"evaluate {name}"]["losses"] for name in rows}
    return {
        "settings": stages.run["settings"],
        "machine": machine(),
        "seconds": seconds | {"total": sum(seconds.values())},
        "peak_bytes": max(each["peak_bytes"] for each in found.values()),
        "conversations": len(losses["chain"]),
        "problems": settings.num_problems,
        "models": rows,
        "chain_less": {name: paired(losses["chain"], losses[name]) for name in ("dense", "slices")},
        "sample": read_json(settings.output_dir / "chain-tuned" / "results.json")["samples"],
    }


def as_markdown(results: dict[str, Any]) -> str:
    """The results as a table, and what they say of the chain."""
    titles = {"source": "as it was", **{name: title for name, (title, _) in MODELS.items()}}

    def error_of(pair: dict[str, float | None]) -> str:
        return "" if pair["error"] is None else f" ± {pair['error']:.4f}"

    lines = [
        "| | trained parameters | held-out loss | against before | exact match | tokens/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in results["models"].items():
        trained, speed, match = row["trained_parameters"], row.get("tokens_per_second"), row["exact_match"]
        cells = [
            titles[name],
            "-" if trained is None else f"{trained:,}",
            f"{row['held_out_loss']:.4f}",
            f"{row['less_before']['difference']:+.4f}{error_of(row['less_before'])}" if "less_before" in row else "-",
            "-" if match is None else f"{match:.1%}",
            "-" if speed is None else f"{speed:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for name, pair in results["chain_less"].items():
        if pair["error"] is None or abs(pair["difference"]) < 2 * pair["error"]:
            verdict = "no difference can be told"
        else:
            verdict = (
                f"{'lower' if pair['difference'] < 0 else 'higher'} in this run, which says nothing of other seeds"
            )
        lines.append(f"- chain less {name}: {pair['difference']:+.4f}{error_of(pair)}: {verdict}")
    lines += [
        "",
        f"Losses are nats per token of the answers, of {results['conversations']} held-out conversations; ± is one "
        "standard error over these, of one run of each model. Exact match is that of "
        f"{results['problems']} problems.",
        "",
        f"{results['seconds']['total'] / 60:.1f} minutes, at most {results['peak_bytes'] / 1e9:.2f} GB of memory in a "
        "process; " + ", ".join(f"{name} {value}" for name, value in results["machine"].items()) + ".",
    ]
    return "\n".join(lines)


def run(settings: RealModelSettings) -> None:
    """The whole way, or the rest of it."""
    load_corpus(settings, settings.seed)  # data that do not work are named before anything is done
    stages, folder = Stages(settings), settings.output_dir

    def measured(act: Callable[..., dict[str, Any] | None], *arguments: Any) -> Callable[[], dict[str, Any]]:
        return lambda: {**(act(*arguments) or {}), "peak_bytes": peak_memory()}

    def download() -> dict[str, Any]:
        return {"folder": fetch(settings.model, folder / "source")}

    def converted(name: str, mode: str) -> None:
        try:
            options = Options(upcycle="slice", experts=settings.experts, mode=mode)
            convert(source, folder / name, options, overwrite=True, progress=True)
        except ConversionError as error:
            raise InputError(f"--model {settings.model} cannot be converted: {error}") from error

    def evaluated(name: str) -> dict[str, Any]:
        tuned = folder / f"{name}-tuned"
        return evaluate(settings, str(tuned / "model"), read_json(tuned / "results.json"))

    stages.do("download", measured(download))
    source = stages.run["found"]["download"]["folder"]
    for name, (_, mode) in MODELS.items():
        if mode is not None:
            stages.do(f"convert {name}", measured(converted, name, mode))
    for name, (_, mode) in MODELS.items():
        stages.do(f"tune {name}", measured(tune, settings, source if mode is None else str(folder / name), name))
    stages.do("evaluate source", measured(evaluate, settings, source))
    for name in MODELS:
        stages.do(f"evaluate {name}", measured(evaluated, name))
    results = summarise(settings, stages)
    write_json(folder / "results.json", results)
    table = as_markdown(results)
    (folder / "results.md").write_text(f"{table}\n", encoding="utf-8")
    print(f"\n{table}")
    (sample,) = next(iter(results["sample"].values()))
    print(f"\n[user] {sample['prompt']}\n[{folder / 'chain-tuned' / 'model'}] {sample['solution']}")


@command
def main(argv: list[str] | None = None) -> None:
    run(parse_settings(argv))


if __name__ == "__main__":
    main()
