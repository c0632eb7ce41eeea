"""Fine-tuning through transformers' `Trainer` and TRL's `SFTTrainer`."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from modeling_coe.releases import CHECKPOINTING

from .helpers import random_ids, tiny_model


def arguments(folder, **overrides) -> TrainingArguments:
    options = {
        "output_dir": str(folder),
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return TrainingArguments(**{**options, **overrides})


def examples(count: int, length: int = 8) -> list[dict]:
    torch.manual_seed(1)
    return [{"input_ids": ids, "labels": ids} for ids in random_ids(count, length)]


def train(folder, model, data, **overrides):
    trainer = Trainer(model=model, args=arguments(folder, **overrides), train_dataset=data)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_loss_goes_down(tmp_path):
    data = examples(4)
    logs = train(tmp_path, tiny_model(), data, max_steps=20, per_device_train_batch_size=4, learning_rate=1e-2)
    assert logs[-1]["loss"] < 0.6 * logs[0]["loss"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_equals_one_large_batch(tmp_path, checkpointing):
    """Sequences of one length: the same batch in one, two or four pieces gives the same model."""
    results = {}
    for batch_size in (4, 2, 1):
        model = tiny_model(aux_loss_alpha=0.5)
        logs = train(
            tmp_path,
            model,
            examples(12),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
            **{CHECKPOINTING: checkpointing},
            optim="sgd",
            learning_rate=0.1,
        )
        results[batch_size] = [entry["loss"] for entry in logs], model.state_dict()
    for batch_size in (2, 1):
        assert results[batch_size][0] == pytest.approx(results[4][0], abs=2e-3)
        for name, tensor in results[4][1].items():
            torch.testing.assert_close(results[batch_size][1][name], tensor, atol=1e-5, rtol=1e-3)


def test_a_resumed_run_repeats_the_losses(tmp_path):
    """Plain `Trainer`: its checkpoints hold one tensor per expert, which it reads with `load_state_dict`."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}
    whole = train(tmp_path, tiny_model(), examples(12), **options)
    trainer = Trainer(model=tiny_model(seed=5), args=arguments(tmp_path, **options), train_dataset=examples(12))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    resumed = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert resumed == [entry["loss"] for entry in whole]


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    data = examples(4)
    options = {
        "max_steps": 6,
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 2,
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "learning_rate": 0.5,  # so high that the first evaluation is the best
    }
    model = tiny_model()
    trainer = Trainer(model=model, args=arguments(tmp_path, **options), train_dataset=data, eval_dataset=data)
    trainer.train()
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    for name, tensor in best.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_evaluation_loss_is_the_cross_entropy(tmp_path):
    model = tiny_model(aux_loss_alpha=10.0)
    data = examples(4)
    trainer = Trainer(model=model, args=arguments(tmp_path, per_device_eval_batch_size=4), eval_dataset=data)
    input_ids = torch.stack([example["input_ids"] for example in data])
    with torch.no_grad():
        logits = model.eval()(input_ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-4)


def test_trl_sft_trainer(tmp_path, tokenizer):
    """TRL finds the coefficient, logs the unscaled aux loss and adds it to the loss once. Its `SFTTrainer` replaces
    the model's forward: from our router logits it computes transformers' pooled loss, which is K at balance."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    texts = ["two plus two is four", "one and one"]
    losses = {}
    for coefficient in (0.0, 0.5):
        model = tiny_model(router_aux_loss_coef=coefficient)
        config = SFTConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            logging_steps=1,
            per_device_train_batch_size=2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            **{CHECKPOINTING: False},
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_dict({"text": texts}),
            processing_class=tokenizer,
        )
        trainer.train()
        losses[coefficient] = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert "aux_loss" not in losses[0.0]
    aux_loss = losses[0.5]["aux_loss"]
    batch = tokenizer([text + tokenizer.eos_token for text in texts], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    router_logits = tiny_model()(**batch, output_router_logits=True).router_logits
    expected = load_balancing_loss_func(router_logits, 8, 2, batch["attention_mask"])
    assert aux_loss == pytest.approx(expected.item(), rel=1e-3)
    assert losses[0.5]["loss"] - losses[0.0]["loss"] == pytest.approx(0.5 * aux_loss, rel=1e-2)
