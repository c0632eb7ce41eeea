# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Pre-trains a Chain-of-Experts model on many devices, in a plain loop on transformers' `DistributedConfig`.

    torchrun --nproc-per-node 8 examples/pretrain_distributed.py --output-dir runs/many --config shape.json
    torchrun --nproc-per-node 8 examples/pretrain_distributed.py --output-dir runs/many --config shape.json --ep-size 8
    torchrun --nproc-per-node 4 examples/pretrain_distributed.py --output-dir runs/many --config shape.json --resume

Parameters, gradients and optimizer are shared by FSDP2 (`--fsdp-size`), experts by expert parallelism (`--ep-size`),
layers by tensor parallelism (`--tp-size`), and there may be copies of the whole (`--replicate-size`). A batch is that
of all processes: their number changes the speed, and losses by rounding alone. Texts are a stream that each process
reads and tokenises its part of.

A run that was killed goes on with `--resume`, with another number of processes or layout too, as does one that was
asked to stop (SIGTERM), which saves a checkpoint first. The output folder holds

    run.json        the settings that a resumed run must share
    tokenizer/      the tokenizer of the run
    log.jsonl       a line for every logged step and evaluation
    checkpoint-N/   the two newest checkpoints
    model/          the trained model with its tokenizer, as any other
"""

import json
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from importlib.util import find_spec
from math import cos, pi
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import recipe.openmp  # noqa: F401  before torch


# isort: split
import torch
import torch.distributed as dist
from recipe.corpus import load_tokenizer, pack_held_out, train_tokenizer
from recipe.distributed import (
    LayoutSettings,
    Processes,
    adamw,
    check_layout,
    check_release,
    choose_layout,
    clip_gradients,
    exchanged_bytes,
    peak_flops,
    reshard,
    rows_of,
    start_processes,
    training_flops_per_token,
)
from recipe.run_folder import (
    check_fingerprint,
    check_output_dir,
    check_run_options,
    is_resumable,
    short_hash,
    start_run,
)
from recipe.settings import BlockSettings, RunSettings, TrainingSettings
from recipe.sharded_checkpoints import Checkpoints, load, read_progress
from recipe.stream import (
    BlockStream,
    StreamedDataSettings,
    check_stream_options,
    held_out_texts,
    open_rows,
    training_texts,
)
from recipe.training import WHOLE_MODEL
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from modeling_coe import CoeConfig, CoeForCausalLM
from modeling_coe.command_line import (
    InputError,
    check_not_negative,
    check_positive,
    check_range,
    load_config,
    loading,
    parse,
    setting,
)
from modeling_coe.diagnostics import RoutingStatistics, record_routing
from modeling_coe.diagnostics.balancer import BiasBalancer


# ---- Settings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    _argument_group_name: ClassVar[str] = "model"
    config: str | None = setting(None, "config.json, or its folder, of a new model")
    model: str | None = setting(None, "folder or Hub name of a CoE model to go on with, in place of --config")
    tokenizer: str | None = setting(None, "folder or Hub name; a byte-level BPE is trained if not given")


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    _argument_group_name: ClassVar[str] = "loop"
    clip_norm: float = setting(1.0, "largest norm of all gradients")
    bias_speed: float = setting(1e-3, "of balancing by selection biases, where the model has them (noaux_tc)")


@dataclass(frozen=True, kw_only=True)
class ComputedSettings(
    RunSettings, ModelSettings, StreamedDataSettings, BlockSettings, TrainingSettings, LoopSettings
):
    """What a run computes, and a resumed one must share."""


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """What a resumed run may change, as it may the layout."""

    _argument_group_name: ClassVar[str] = "checkpoints and log"
    save_minutes: float | None = setting(None, "minutes between two checkpoints, beside those of --save-steps")
    peak_tflops: float | None = setting(None, "FLOP/s of a device, in 1e12; known of H100, H200 and A100 in bfloat16")
    tensorboard: bool = setting(False, "write the log for TensorBoard too")


@dataclass(frozen=True, kw_only=True)
class DistributedSettings(ComputedSettings, LayoutSettings, ServiceSettings):
    pass


def parse_settings(argv: Sequence[str] | None = None) -> DistributedSettings:
    """Reads the command line and checks what can be checked without data and other processes."""
    settings = parse(DistributedSettings, __doc__.splitlines()[0], argv)
    check_settings(settings)
    return settings


def check_settings(settings: DistributedSettings) -> None:
    """Raises [`InputError`] where options have no meaning, alone or together."""
    if (settings.config is None) == (settings.model is None):
        raise InputError("Give either --config, the shape of a new model, or --model, one to go on with.")
    if settings.model is not None and settings.tokenizer is not None:
        raise InputError(
            f"--tokenizer is {settings.tokenizer}, but --model {settings.model} has one. Leave one of the two out."
        )
    check_run_options(settings)
    check_stream_options(settings)
    check_positive(settings, "eval_blocks", "steps", "batch_size", "log_steps", "eval_steps", "save_steps")
    check_not_negative(settings, "warmup_steps")
    check_range(settings, "block_size", 2)  # the first token is not predicted
    for name in ("lr", "clip_norm", "bias_speed", "save_minutes", "peak_tflops"):
        if getattr(settings, name) is not None:
            check_range(settings, name, 0, exclusive=True)
    check_range(settings, "weight_decay", 0)
    check_range(settings, "beta2", 0, 1)
    if settings.tensorboard and find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs TensorBoard. `pip install tensorboard`, or leave it out.")


def computed(settings: DistributedSettings) -> ComputedSettings:
    """The part that a resumed run must share."""
    return ComputedSettings(**{each.name: getattr(settings, each.name) for each in fields(ComputedSettings)})


# ---- What a run reads -----------------------------------------------------------------------------------------------


def read_config(settings: ModelSettings) -> CoeConfig:
    """The shape of the model.

    Raises:
        InputError: There is none, or it is not that of a Chain-of-Experts model.
    """
    if settings.config is None:
        return load_config(settings.model, "--model", WHOLE_MODEL)
    return load_config(settings.config, "--config", "Give a config.json or its folder.")


def choose_tokenizer(settings: ComputedSettings, config: CoeConfig) -> PreTrainedTokenizerBase:
    """The one asked for, or one trained on the first texts."""
    if settings.model is not None:
        return load_tokenizer(settings.model, "--model")
    if settings.tokenizer is None:
        tokenizer = train_tokenizer(training_texts(settings, settings.seed), config.vocab_size)
    else:
        tokenizer = load_tokenizer(settings.tokenizer)
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"--config {settings.config} has `vocab_size` {config.vocab_size}, but the tokenizer has {len(tokenizer)} "
            "tokens. Raise it."
        )
    return tokenizer


class Inputs(NamedTuple):
    """What a run reads, and how its processes share it."""

    layout: DistributedConfig
    config: CoeConfig
    tokenizer: PreTrainedTokenizerBase
    held_out: dict[str, torch.Tensor]
    stream: BlockStream
    is_resumed: bool


def open_inputs(settings: DistributedSettings, processes: Processes) -> Inputs:
    """Checks everything that can be checked before a model is built, and opens or starts the run.

    Raises:
        InputError: In all processes, if one of them finds anything wrong.
    """
    run = computed(settings)
    with processes.together():
        layout = choose_layout(settings, settings.batch_size, processes.count)
        config = read_config(settings)
        check_layout(layout, config)
        if settings.block_size > config.max_position_embeddings:
            raise InputError(
                f"--block-size is {settings.block_size}, but the model has `max_position_embeddings` "
                f"{config.max_position_embeddings}. Choose smaller blocks, or raise it."
            )
    is_resumed = False
    with processes.together():
        if processes.is_first:  # which alone decides on and writes what all read
            check_output_dir(run)
            is_resumed = is_resumable(run)
            if not is_resumed:
                tokenizer = choose_tokenizer(run, config)
                start_run(run, tokenizer, fingerprint_of(pack_held_out(held_out_texts(run, run.seed), tokenizer, run)))
    is_resumed = processes.gather(is_resumed)[0]
    with processes.together():
        tokenizer = load_tokenizer(settings.output_dir / "tokenizer", "--output-dir")
        held_out = pack_held_out(held_out_texts(run, run.seed), tokenizer, run)
        if processes.is_first and is_resumed:
            check_fingerprint(run, fingerprint_of(held_out))
        rows = rows_of(processes.rank, layout, settings.batch_size)
        stream = open_rows(run, settings.seed, rows, settings.batch_size, tokenizer, settings.block_size)
    if settings.model is None:
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    return Inputs(layout, config, tokenizer, held_out, stream, is_resumed)


def fingerprint_of(held_out: dict[str, torch.Tensor]) -> str:
    """A short hash of what tells data and tokenizers apart without reading all."""
    return short_hash(blocks.numpy() for blocks in held_out.values())


# ---- Model ----------------------------------------------------------------------------------------------------------


def load_model(settings: DistributedSettings, processes: Processes, inputs: Inputs, empty: bool) -> CoeForCausalLM:
    """The model, each process with its part, in float32.

    A new one is made by the first process as in a run of one, in its memory and on disk, and read by all: its weights
    do not depend on how many there are.

    Args:
        empty (`bool`): A checkpoint brings the weights, so these may be anything.
    """
    layout = {"distributed_config": inputs.layout} if processes.count > 1 else {}
    source, options = settings.model, {"config": inputs.config, "dtype": torch.float32, **layout}
    if empty:
        source, options = None, options | {"state_dict": {}}
    elif source is None:
        source = settings.output_dir / ".initial"
        if processes.is_first:
            set_seed(settings.seed)
            CoeForCausalLM(inputs.config).save_pretrained(source, save_original_format=False)
        processes.wait()
    what = f"--config {settings.config}" if settings.model is None else f"--model {settings.model}"
    with loading(what, "Choose another layout, or another model."), quiet() if empty else nullcontext():
        model = CoeForCausalLM.from_pretrained(source, **options)
    processes.wait()
    if processes.is_first and not empty and settings.model is None:
        shutil.rmtree(source)
    if not layout:
        model.to(processes.device)
    if settings.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


@contextmanager
def quiet() -> Iterator[None]:
    """Without the report of all weights that the checkpoint will bring."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


# ---- Log ------------------------------------------------------------------------------------------------------------


class Log:
    """`log.jsonl` and what is printed, by the first process.

    Args:
        settings (`DistributedSettings`): Where to.
        processes (`Processes`): Of the run.
        step (`int`): That the run goes on from; what the log has of later ones is done again.
    """

    def __init__(self, settings: DistributedSettings, processes: Processes, step: int):
        self.file = self.writer = None
        if not processes.is_first:
            return
        path = settings.output_dir / "log.jsonl"
        kept = [line for line in read_lines(path) if line["step"] <= step] if step else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(partial, path)
        self.file = path.open("a", encoding="utf-8")
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(settings.output_dir / "tensorboard", purge_step=step)

    def write(self, step: int, values: dict[str, float | None]) -> None:
        """One line, and as much on the screen as fits one."""
        if self.file is None:
            return
        print(json.dumps({"step": step, **values}), file=self.file, flush=True)
        shown = [f"{name} {value:.5g}" for name, value in values.items() if value is not None and "/" not in name]
        print(f"step {step:>6}  " + "  ".join(shown), flush=True)
        if self.writer is not None:
            for name, value in values.items():
                if value is not None:
                    self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        for each in (self.file, self.writer):
            if each is not None:
                each.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a process that was killed may have left half of the last one."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


# ---- Training -------------------------------------------------------------------------------------------------------


def learning_rate(settings: TrainingSettings, step: int) -> float:
    """Of a step, which count from 0: linear warm-up, then half a cosine to 0, or constant."""
    if step < settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    if settings.schedule == "constant_with_warmup":
        return settings.lr
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.lr * 0.5 * (1 + cos(pi * done))


class Loop:
    """A model in training, and what goes with it. All processes make the same calls."""

    def __init__(self, settings: DistributedSettings, processes: Processes, inputs: Inputs, model: CoeForCausalLM):
        self.settings, self.processes, self.inputs, self.model = settings, processes, inputs, model
        self.config, self.layout = inputs.config, inputs.layout
        self.optimizer = adamw(model, settings.weight_decay, settings.beta2)
        self.balancer = BiasBalancer(model, settings.bias_speed) if self.config.topk_method == "noaux_tc" else None
        self.statistics = RoutingStatistics(self.config) if self.config.num_sparse_layers else None
        share = settings.batch_size // self.layout.dp_size
        self.micro_batch_size = settings.micro_batch_size or share
        self.tokens_per_step = settings.batch_size * settings.block_size
        self.flops_per_token = training_flops_per_token(self.config, settings.block_size)
        self.peak_flops = peak_flops(settings.peak_tflops, processes.device, settings.dtype)
        # Where FSDP does not cast, autocast does.
        self.autocast = settings.dtype == "bfloat16" and self.layout.dp_size == 1

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, num_label_tokens: int) -> Any:
        with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.autocast):
            num_items = torch.tensor(num_label_tokens, device=input_ids.device)
            return self.model(input_ids, labels=labels, num_items_in_batch=num_items, use_cache=False)

    def add_up(self, *sums: torch.Tensor | float) -> list[float]:
        """Sums of this process's sequences to those of all, which processes that share a batch (TP) count once."""
        total = torch.tensor([float(each) for each in sums], dtype=torch.float64)
        dist.all_reduce(total, group=self.processes.control)
        return (total / self.layout.tp_size).tolist()

    def train_step(self, step: int, watch: bool) -> dict[str, torch.Tensor | float]:
        """One step of the optimizer.

        Args:
            step (`int`): Its number, from 0.
            watch (`bool`): Record the routers.

        Returns:
            This process's part of the `loss` and `aux_loss` of the batch, the gradients' `grad_norm`, and `lr`.
        """
        # Dropout depends on the seed, the step and the rows, and is no part of a checkpoint.
        seed = (self.settings.seed * self.settings.steps + step) * self.layout.dp_size
        torch.manual_seed(seed + self.processes.rank // self.layout.tp_size)
        with self.processes.together():
            batch = self.inputs.stream.next_batch()
        batch = batch.to(self.processes.device)
        lr = learning_rate(self.settings, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # All blocks are full, and the first token of each is not predicted.
        num_label_tokens = self.settings.batch_size * (self.settings.block_size - 1)
        loss = aux_loss = torch.zeros((), device=batch.device)
        with record_routing(self.model, self.statistics, training_only=True) if watch else nullcontext():
            for part in batch.split(self.micro_batch_size):
                output = self.forward(part, part, num_label_tokens)
                # FSDP takes the mean of the gradients of processes, whose losses are parts of one sum.
                (output.loss * self.layout.dp_size).backward()
                loss = loss + output.loss.detach()
                if output.aux_loss is not None:
                    aux_loss = aux_loss + output.aux_loss.detach() * len(part) / self.settings.batch_size
        grad_norm = clip_gradients(self.model, self.settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.balancer is not None:
            self.balancer.step()
        return {"loss": loss, "aux_loss": aux_loss, "grad_norm": grad_norm, "lr": lr}

    def training_entry(self, result: dict[str, torch.Tensor | float], tokens_per_second: float) -> dict[str, float]:
        """What the log has of a step."""
        loss, aux_loss = self.add_up(result["loss"], result["aux_loss"])
        rate = tokens_per_second / self.processes.count
        aux_losses = {} if self.config.uses_all_experts else {"aux_loss": aux_loss}
        entry = {"loss": loss, **aux_losses, "grad_norm": float(result["grad_norm"]), "lr": result["lr"]}
        entry |= {"epoch": max(self.processes.gather(self.inputs.stream.epoch)), "tokens_per_second_per_device": rate}
        entry["mfu"] = None if self.peak_flops is None else rate * self.flops_per_token / self.peak_flops
        if self.statistics is not None:
            self.statistics.all_reduce()
            entry |= routing_entry(self.statistics)
            self.statistics.reset()
        return entry

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The held-out loss of every split. All processes make as many forwards, some of them for nothing."""
        self.model.eval()
        losses = {}
        for split, blocks in self.inputs.held_out.items():
            num_forwards = -(-len(blocks) // (self.layout.dp_size * self.micro_batch_size))
            first = self.processes.rank // self.layout.tp_size * num_forwards * self.micro_batch_size
            total = torch.zeros((), device=self.processes.device)
            for i in range(first, first + num_forwards * self.micro_batch_size, self.micro_batch_size):
                part = blocks[i : i + self.micro_batch_size].to(self.processes.device)
                labels = part
                if len(part) == 0:
                    part = blocks[:1].to(self.processes.device)
                    labels = torch.full_like(part, -100)
                total += self.forward(part, labels, blocks[:, 1:].numel()).loss
            losses[f"eval_{split}_loss"] = self.add_up(total)[0]
        reshard(self.model)
        self.model.train()
        return losses

    def progress(self, step: int) -> dict[str, Any]:
        """What a checkpoint has beside the model and the optimizer; the schedule is a function of the step."""
        rows = {}
        for states in self.processes.gather(self.inputs.stream.state_dict()):
            rows |= states
        return {"step": step, "processes": self.processes.count, "rows": rows}

    def resume(self, checkpoint: Path) -> int:
        """Goes on where a checkpoint was saved, and returns the number of steps done."""
        with self.processes.together():
            progress = read_progress(checkpoint)
        load(checkpoint, self.model, self.optimizer)
        self.inputs.stream.load_state_dict(progress["rows"])
        return progress["step"]


def routing_entry(statistics: RoutingStatistics) -> dict[str, float]:
    """The load of each iteration, where it can differ: its entropy as the mean over layers, and its largest violation
    of balance."""
    entry, layers = {}, statistics.layers.values()
    if not statistics.has_load:
        return entry
    for t in range(max(layer.num_iterations for layer in layers)):
        reached = [layer for layer in layers if layer.num_iterations > t]
        entry[f"routing/iter{t}/load_entropy"] = sum(float(each.load_entropy[t]) for each in reached) / len(reached)
        entry[f"routing/iter{t}/max_vio"] = max(float(each.max_vio[t]) for each in reached)
    return entry


class Requests:
    """What asks for a checkpoint between two steps, agreed on by all processes: the clock, or a signal to stop."""

    def __init__(self, save_minutes: float | None, processes: Processes):
        self.processes, self.is_stopped = processes, False
        self.interval = float("inf") if save_minutes is None else 60 * save_minutes
        self.next_save = time.monotonic() + self.interval
        self.previous_handler = signal.signal(signal.SIGTERM, self._stop)

    def close(self) -> None:
        signal.signal(signal.SIGTERM, self.previous_handler)

    def _stop(self, *_: Any) -> None:
        self.is_stopped = True

    def agree(self) -> tuple[bool, bool]:
        """Whether to save now, by the clock of the first process, and whether any was asked to stop."""
        is_due = self.processes.is_first and time.monotonic() >= self.next_save
        flags = torch.tensor([is_due, self.is_stopped], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.processes.control)
        if flags[0]:
            self.next_save = time.monotonic() + self.interval
        return bool(flags[0]), bool(flags[1])


def train(loop: Loop, checkpoints: Checkpoints, log: Log, step: int) -> bool:
    """Trains from a step to the last one, or until asked to stop, and returns whether it is done."""
    settings, device = loop.settings, loop.processes.device
    requests = Requests(settings.save_minutes, loop.processes)
    if step == 0:
        log.write(0, loop.evaluate())
    seconds, timed_steps = 0.0, 0
    while step < settings.steps:
        begin = time.perf_counter()
        step += 1
        is_last, is_logged = step == settings.steps, step % settings.log_steps == 0 or step == settings.steps
        result = loop.train_step(step - 1, watch=is_logged and loop.statistics is not None)
        is_due, is_stopped = requests.agree()
        is_evaluated = step % settings.eval_steps == 0 or is_last
        is_saved = step % settings.save_steps == 0 or is_last or is_due or is_stopped
        if device.type != "cpu" and (is_logged or is_evaluated or is_saved):
            torch.accelerator.synchronize()
        seconds, timed_steps = seconds + time.perf_counter() - begin, timed_steps + 1
        if is_logged:
            log.write(step, loop.training_entry(result, loop.tokens_per_step * timed_steps / seconds))
            seconds, timed_steps = 0.0, 0
        if is_evaluated:
            log.write(step, loop.evaluate())
        checkpoints.poll()
        if is_saved:
            checkpoints.save(step, loop.model, loop.optimizer, loop.progress(step))
        if is_stopped and not is_last:
            break
    checkpoints.wait()
    requests.close()
    return step == settings.steps


def describe(loop: Loop) -> str:
    """The model, how it is shared, and what a step costs."""
    config, layout, settings = loop.config, loop.layout, loop.settings
    lines = [
        f"{config.total_parameters:,} parameters, {config.active_parameters:,} of them active for a token, "
        f"{loop.flops_per_token:,} FLOPs per trained token",
        f"{loop.processes.count} processes: fsdp {layout.fsdp_size}, ep {layout.ep_size}, tp {layout.tp_size}, "
        f"replicate {layout.dp_replicate_size}; {loop.micro_batch_size} sequences in a forward, "
        f"{settings.batch_size // layout.dp_size // loop.micro_batch_size} forwards in a step",
    ]
    sent = exchanged_bytes(config, layout, loop.tokens_per_step, 4 if settings.dtype == "float32" else 2)
    if sent:
        lines.append(
            f"expert parallelism sends {sent:,} bytes per process and step: {config.inner_iter} exchanges a layer, "
            "there and back, in both passes"
        )
    return "\n".join(lines)


def pretrain(argv: Sequence[str] | None, processes: Processes) -> None:
    """The whole run, in every process."""
    with processes.together():
        check_release()
        settings = parse_settings(argv)
    inputs = open_inputs(settings, processes)
    checkpoints = Checkpoints(settings.output_dir, processes)
    checkpoint = checkpoints.newest() if inputs.is_resumed else None
    loop = Loop(settings, processes, inputs, load_model(settings, processes, inputs, empty=checkpoint is not None))
    step = 0 if checkpoint is None else loop.resume(checkpoint)
    if processes.is_first:
        print(describe(loop), flush=True)
        if settings.resume:
            print(
                f"Resuming at step {step}." if checkpoint else "No complete checkpoint: starting at step 0.",
                flush=True,
            )
    log = Log(settings, processes, step)
    is_done = train(loop, checkpoints, log, step)
    log.close()
    if is_done:
        loop.model.save_pretrained(settings.output_dir / "model", is_main_process=processes.is_first)
        if processes.is_first:
            inputs.tokenizer.save_pretrained(settings.output_dir / "model")
            print(f"The trained model is in {settings.output_dir / 'model'}.", flush=True)
    elif processes.is_first:
        print("Stopped; go on with --resume.", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    processes = start_processes()
    if not processes.is_first:  # which says it for all
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    exit_code = 0
    try:
        pretrain(argv, processes)
    except InputError as error:  # in all processes
        exit_code = 1
        if processes.is_first:
            print(f"error: {error}", file=sys.stderr, flush=True)
    processes.wait()  # torchrun stops the others when one fails, so none before the first has said why
    dist.destroy_process_group()
    if exit_code:
        sys.exit(exit_code)


if __name__ == "__main__":
    main()
