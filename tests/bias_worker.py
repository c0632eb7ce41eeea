"""Runs in two processes, or alone: a `Trainer` that moves selection biases. Called by `test_bias_balancing.py`."""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import modeling_coe  # noqa: F401
from modeling_coe.callbacks import BiasBalancingCallback

from .helpers import leave_process_group


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model)
    arguments = TrainingArguments(
        output_dir=str(args.output / "trainer"),
        max_steps=3,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=2,
        learning_rate=0.0,  # choices then depend on the biases alone, not on the order in which gradients add up
        optim="sgd",
        train_sampling_strategy="sequential",
        use_cpu=True,
        ddp_backend="gloo",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    callback = BiasBalancingCallback(speed=0.05)
    Trainer(model, arguments, train_dataset=torch.load(args.data), callbacks=[callback]).train()
    rank = dist.get_rank() if dist.is_initialized() else 0
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    torch.save(biases, args.output / f"biases-{rank}.pt")
    if dist.is_initialized():
        leave_process_group()


if __name__ == "__main__":
    main()
