# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""One run in a process of its own: trains a model, or times its steps, and appends what came out as a JSON line.

    python -m benchmarks.paper.worker --scale cpu --run JSON

The runner starts it. Data, tokenizer, configuration and optimizer are those of `examples/pretrain.py`.
"""

import datetime
import hashlib
import json
import os
import resource
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pretrain
import torch
from recipe import answers, corpus, report, training
from recipe.settings import REPORT_SETTINGS, START_SETTINGS
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from benchmarks.measure import Clock, alternate, describe_machine, spread
from benchmarks.paper import results
from benchmarks.paper.experiments import REFERENCE
from benchmarks.paper.runs import SCALES, WARM_UP, Run
from benchmarks.paper.variants import build_model, expert_flops_per_token
from modeling_coe import CoeForCausalLM, cpu_kernels
from modeling_coe.command_line import command, parse, setting
from modeling_coe.diagnostics import measure_iterations, measure_routing


ROOT = Path(__file__).resolve().parents[2]
# Files of this project that a run comes from: all that are imported here.
SOURCES = (
    "configuration_coe/*.py",
    "modeling_coe/**/*.py",
    "model_cards/*.py",
    "benchmarks/__init__.py",
    "benchmarks/markdown.py",
    "benchmarks/measure.py",
    *(f"benchmarks/paper/{name}.py" for name in ("__init__", "experiments", "results", "runs", "variants")),
    "examples/pretrain.py",
    "examples/recipe/*.py",
    "examples/tasks/question_answer.py",
    "benchmarks/paper/worker.py",
)
MECHANISM_BLOCKS = 32  # of the held-out split: every iteration of every layer is dropped once
MAX_NEW_TOKENS = 128
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def settings_of(run: Run, output_dir: str, data_root: str) -> pretrain.PretrainSettings:
    """A run as settings of `examples/pretrain.py`.

    Raises:
        ValueError: They and the run's are not the same ones: a default would decide, which is no part of its identity.
        InputError: They have no meaning.
    """
    options = run.options(data_root)
    decisive = {each.name for each in fields(pretrain.PretrainSettings)} - START_SETTINGS - REPORT_SETTINGS
    if unlike := sorted(options.keys() ^ decisive):
        raise ValueError(
            f"{run.label}: {', '.join(unlike)} must be in both `Run.settings` and `PretrainSettings`, or in neither. "
            "Declare in `Run.settings` what decides a run, and in `OWN_SETTINGS` what is its own."
        )
    settings = pretrain.PretrainSettings(output_dir=Path(output_dir), **options)
    pretrain.check_settings(settings)
    return settings


class Inputs:
    """Data, tokenizer and options of a run."""

    def __init__(self, run: Run, output_dir: str, data_root: str):
        self.settings, self.data_root = settings_of(run, output_dir, data_root), data_root
        self.bf16 = run.settings["bf16"]  # not what the machine can do
        self.texts = corpus.load_corpus(self.settings, self.settings.seed)
        self.tokenizer = corpus.choose_tokenizer(self.settings, self.texts)
        self.train, self.held_out = corpus.pack_corpus(self.settings, self.texts, self.tokenizer)

    def model(self, run: Run) -> CoeForCausalLM:
        """A new model for these data: of the run they were made for, or of another."""
        settings = settings_of(run, str(self.settings.output_dir), self.data_root)
        set_seed(run.seed)
        return build_model(pretrain.build_config(settings, self.tokenizer), run.arm.model.variant)

    def trainer(self, model: CoeForCausalLM, **parts: Any) -> Trainer:
        """A trainer that writes nothing: a run that is killed is short enough to be made again."""
        evaluates = "eval_dataset" in parts
        arguments = training.training_arguments(self.settings, evaluate_first=evaluates)
        arguments |= {"save_strategy": "no", "disable_tqdm": True, "bf16": self.bf16}
        if not evaluates:
            arguments["eval_strategy"] = "no"
        return Trainer(
            model=model, args=TrainingArguments(**arguments), train_dataset=corpus.Blocks(self.train), **parts
        )


class StepRecorder(TrainerCallback):
    """Seconds of every training step by two clocks, and a fingerprint of the tokens in the order they came."""

    def __init__(self, model: CoeForCausalLM):
        self.cpu, self.wall, self.digest = [], [], hashlib.sha256()
        model.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, model: CoeForCausalLM, args: tuple, kwargs: dict[str, Any]) -> None:
        if model.training:
            self.digest.update(kwargs["input_ids"].cpu().numpy())

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.process_time(), time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        self.cpu.append(time.process_time() - self.began[0])
        self.wall.append(time.perf_counter() - self.began[1])


def resident_bytes() -> int:
    """Memory of this process that is resident now."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """The most memory this process had resident at any time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def scalars(entry: dict[str, Any]) -> dict[str, Any]:
    """What is not a list."""
    return {name: value for name, value in entry.items() if not isinstance(value, list)}


def routing_of(model: CoeForCausalLM, blocks: torch.Tensor, batch_size: int) -> list[dict[str, Any]]:
    """Statistics of the routers by layer, without the tables of single experts."""
    batches = ({"input_ids": batch} for batch in blocks.split(batch_size))
    return [
        {"layer": layer["layer"]}
        | {part: [scalars(entry) for entry in layer[part]] for part in ("iterations", "transitions")}
        for layer in measure_routing(model, batches).summary()["layers"]
    ]


def mechanism_of(model: CoeForCausalLM, blocks: torch.Tensor, batch_size: int, variant: str | None) -> dict | None:
    """What each iteration is worth; `None` of variants whose layers have none of their own."""
    if variant in ("scalar", "held"):
        return None
    return measure_iterations(
        model, ({"input_ids": batch, "labels": batch} for batch in blocks[:MECHANISM_BLOCKS].split(batch_size))
    )


def solved(model: CoeForCausalLM, inputs: Inputs, problems: int) -> dict[str, float | None]:
    """Share of held-out problems whose final answer is right, by split; nothing where none are asked for."""
    shares = {}
    for split, texts in inputs.texts.held_out.items() if problems else ():
        examples = list(islice(texts, problems))
        prompts = corpus.encode_prompts(inputs.tokenizer, examples)
        solutions = answers.solve(model.eval(), inputs.tokenizer, prompts, MAX_NEW_TOKENS)
        shares[split] = answers.exact_match(examples, solutions)
    return shares


def size_of(model: CoeForCausalLM, variant: str | None) -> dict[str, int]:
    """Parameters, counted, and work."""
    config, total = model.config, sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters": total,
        "active_parameters": config.active_parameters + total - config.total_parameters,
        "non_embedding_parameters": total - config.embedding_parameters,
        "expert_flops_per_token": expert_flops_per_token(config, variant),
    }


def curve(log: list[dict[str, float]], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in log if key in entry]


def train(run: Run, data_root: str) -> dict[str, Any]:
    """Trains a model and evaluates it along the way."""
    split = run.scale.data[run.arm.data].split
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(run, folder, data_root)
        before = resident_bytes()
        model = inputs.model(run)
        recorder = StepRecorder(model)
        held_out = {name: corpus.Blocks(blocks) for name, blocks in inputs.held_out.items()}
        trainer = inputs.trainer(model, eval_dataset={split: held_out.pop(split)}, callbacks=[recorder])
        trainer.train()
        if held_out:
            trainer.evaluate(held_out)
    peak = peak_bytes()
    log = trainer.state.log_history
    return {
        "split": split,
        "held_out": {name: curve(log, f"eval_{name}_loss") for name in inputs.held_out},
        "training": curve(log, "loss"),  # with the balancing loss
        "unigram": {
            name: report.unigram_loss(inputs.train, blocks, model.config.vocab_size)
            for name, blocks in inputs.held_out.items()
        },
        "data_fingerprint": corpus.fingerprint_of(inputs.train, inputs.held_out),
        "order_fingerprint": recorder.digest.hexdigest()[:16],
        "training_tokens": len(recorder.wall) * run.scale.tokens_per_step,
        **size_of(model, run.arm.variant),
        "cpu_seconds_per_step": spread(recorder.cpu)._asdict(),
        "wall_seconds_per_step": spread(recorder.wall)._asdict(),
        "tokens_per_second": run.scale.tokens_per_step / statistics.median(recorder.wall),
        "peak_memory": peak,
        "peak_memory_above_start": peak - before,
        "peak_device_memory": torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None,
        "routing": routing_of(model, inputs.held_out[split], inputs.settings.batch_size),
        "mechanism": mechanism_of(model, inputs.held_out[split], inputs.settings.batch_size, run.arm.model.variant),
        "exact_match": solved(model, inputs, run.settings.get("problems", 0)),
    }


def training_step(trainer: Trainer, ids: torch.Tensor) -> None:
    """What the `Trainer` computes in a step, and nothing that it logs."""
    model = trainer.model.train()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=trainer.args.bf16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    model.zero_grad(set_to_none=True)


def time_steps(run: Run, data_root: str) -> dict[str, Any]:
    """Times training steps of an arm's model and of MoE(8/64), alternately, on the same tokens."""
    clock, steps = Clock(DEVICE, torch.get_num_threads()), run.settings["steps"]
    runs = {"arm": run, "reference": replace(run, arm=REFERENCE)}
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(run, folder, data_root)
        trainers = {name: inputs.trainer(inputs.model(of)) for name, of in runs.items()}
    batches = {name: iter(inputs.train.split(inputs.settings.batch_size)) for name in runs}
    for trainer in trainers.values():
        trainer.create_optimizer()

    def step(name: str) -> float:
        ids = next(batches[name]).to(DEVICE)
        return clock(lambda: training_step(trainers[name], ids))

    samples = alternate({name: lambda name=name: step(name) for name in runs}, steps)
    samples = {name: seconds[WARM_UP:] for name, seconds in samples.items()}
    ratios = [ours / theirs for ours, theirs in zip(samples["arm"], samples["reference"], strict=True)]
    return {"seconds_per_step": samples, "ratio": spread(ratios)._asdict()}


def be_deterministic() -> None:
    """Has a GPU compute a run again with the same bits; the CPU does anyway. Warns of operators that cannot."""
    if DEVICE == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Their backward passes have an order of additions that changes, where only a warning is asked for.
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written


def code_fingerprint() -> str:
    """A short hash of the sources that a run depends on, so that runs of different code can be told apart."""
    paths = sorted(path for pattern in SOURCES for path in ROOT.glob(pattern))
    files = [(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in paths]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]


def commit() -> str | None:
    """The commit that is checked out, `None` where there is no repository. What is changed since is not told."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def execute(run: Run, data_root: str) -> dict[str, Any]:
    """The run's line."""
    began, code = time.perf_counter(), code_fingerprint()
    outcome = (time_steps if run.kind == "timing" else train)(run, data_root)
    return {
        "id": run.id,
        "label": run.label,
        "scale": run.scale.name,
        "settings": run.settings,
        **outcome,
        "machine": describe_machine(DEVICE, torch.get_num_threads(), str(datetime.date.today())),
        "code": code,
        "commit": commit(),
        "seconds": time.perf_counter() - began,
    }


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    scale: str = setting(help="of the run", choices=tuple(SCALES))
    run: str = setting(help="as `Run.to_json` writes it")
    results: Path = setting(results.RESULTS, "folder of the JSON lines")
    data_root: str = setting("../shared/data", "folder of the data")
    threads: int = setting(1, "of torch")
    nice: int = setting(0, "lowers the priority")


@command
def main(argv: list[str] | None = None) -> None:
    settings = parse(WorkerSettings, __doc__.splitlines()[0], argv)
    os.nice(settings.nice)
    torch.set_num_threads(settings.threads)
    logging.set_verbosity_error()
    be_deterministic()
    run = Run.from_json(SCALES[settings.scale], settings.run)
    os.environ[cpu_kernels.VARIABLE] = run.settings["cpu_kernel"]
    results.append(results.path_of(settings.scale, settings.results), execute(run, settings.data_root))


if __name__ == "__main__":
    main()
