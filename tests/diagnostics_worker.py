"""Runs under torchrun: routing statistics of two ranks that share the data. `test_diagnostics.py` calls it, and trains
with its `trainer` in one process."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from modeling_coe.diagnostics import RoutingStatistics, record_routing

from .helpers import leave_process_group, random_ids, tiny_model


# Layers with two and with one iteration, and a dense one.
MIXED = {"prenorm_residual": True, "num_hidden_layers": 3, "first_k_dense_replace": 1, "chain_layers": [2]}


def padded_examples(count: int, length: int = 10) -> list[dict]:
    examples = []
    for number, row in enumerate(random_ids(count, length)):
        mask = torch.ones_like(row)
        mask[: number % 4] = 0
        examples.append({"input_ids": row, "attention_mask": mask, "labels": row})
    return examples


def trainer(folder, model, cls=None, callbacks=(), **options):
    """A short run on sequences of one length, some of them padded."""
    # Not before `main` has seen what is loaded without them.
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    data = padded_examples(8)
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "logging_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**{**defaults, **options})
    cls = cls or Trainer
    return cls(model=model, args=arguments, train_dataset=data, eval_dataset=data[:4], callbacks=list(callbacks))


def training_log(folder: Path) -> list[dict]:
    from modeling_coe.callbacks import RoutingCallback

    run = trainer(folder, tiny_model(), logging_steps=1, max_steps=2)
    RoutingCallback.add_to(run)
    run.train()
    return [entry for entry in run.state.log_history if "loss" in entry]


def main(folder: Path) -> None:
    loaded = sorted({"matplotlib", "datasets", "transformers.trainer_callback"} & set(sys.modules))
    log = training_log(folder)  # has initialised the process group
    model, rank = tiny_model(**MIXED), dist.get_rank()
    rows = random_ids(4, 9)
    statistics = RoutingStatistics(model.config)
    with torch.no_grad(), record_routing(model, statistics):
        for row in rows if rank else []:  # all on one rank, none on the other
            model(row[None])
    statistics.all_reduce()
    report = {"statistics": statistics.summary(), "log": log, "loaded": loaded}
    (folder / f"rank{rank}.json").write_text(json.dumps(report))
    leave_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
