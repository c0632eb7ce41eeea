"""Tables in which other libraries look a model up by name, and what they do for it then."""

import logging
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline
from transformers.models.auto import modeling_auto
from transformers.utils import logging as transformers_logging

import modeling_coe
from modeling_coe import CoeConfig, CoeForCausalLM, CoeForSequenceClassification

from .helpers import random_ids, tiny_config, tiny_model


def test_every_table_of_model_classes():
    """Where a family has a class with a head of ours, we have ours."""
    ours = {name: getattr(modeling_coe, name) for name in modeling_coe.__all__ if name.startswith("Coe")}
    found = set()
    for name, table in vars(modeling_auto).items():
        if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES") and "qwen3_moe" in table:
            mine = table["qwen3_moe"].replace("Qwen3Moe", "Coe")
            if mine in ours:
                assert table.get(CoeConfig.model_type) == mine, name
                found.add(mine)
    assert found == set(ours) - {"CoeConfig", "CoePreTrainedModel"}
    for name, model_class in ours.items():
        if name in found:
            assert getattr(import_module("transformers"), name) is model_class
    # The library's own families stay what they are.
    assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[CoeConfig] is CoeForCausalLM
    assert all("coe" not in config.__module__ for config in list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING)[:-1])


def smoothed_loss(logits: torch.Tensor, labels: torch.Tensor, epsilon: float) -> float:
    """Cross-entropy of the next token with a share `epsilon` of the target spread over the vocabulary, in float64."""
    losses = []
    for row, targets in zip(logits.double(), labels, strict=True):
        for scores, target in zip(row[:-1], targets[1:].tolist(), strict=True):
            log_probabilities = scores.log_softmax(dim=-1)
            losses.append(-(1 - epsilon) * log_probabilities[target] - epsilon * log_probabilities.mean())
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("wrapped", [None, "peft", "fsdp2"])
def test_label_smoothing_predicts_the_next_token(tmp_path, wrapped):
    pytest.importorskip("accelerate")
    model = tiny_model(aux_loss_alpha=0.0)
    input_ids = random_ids(2, 9)
    with torch.no_grad():
        expected = smoothed_loss(model(input_ids).logits, input_ids, 0.1)
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    if wrapped == "peft":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"]))
    trainer = Trainer(model, arguments)
    if wrapped == "fsdp2":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        if wrapped == "fsdp2":
            fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
            assert type(model) is not CoeForCausalLM
        with torch.no_grad():
            loss = trainer.compute_loss(model.train(), {"input_ids": input_ids, "labels": input_ids.clone()})
    finally:
        if wrapped == "fsdp2":
            dist.destroy_process_group()
    assert loss.item() == pytest.approx(expected, abs=1e-4)


def test_a_loss_from_outside_lacks_the_balancing_term(tmp_path, caplog):
    """As of every mixture of experts whose `Trainer` smooths labels; here it is said."""
    pytest.importorskip("accelerate")
    transformers_logging.enable_propagation()
    transformers_logging.warning_once.cache_clear()
    try:
        for alpha in (0.0, 0.1):
            arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to=[], use_cpu=True)
            trainer = Trainer(tiny_model(aux_loss_alpha=alpha).train(), arguments)
            inputs = {"input_ids": random_ids(2, 9), "labels": random_ids(2, 9)}
            with caplog.at_level(logging.WARNING):
                trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(16))
            assert ("aux_loss_alpha=0.1" in caplog.text) == (alpha > 0)
    finally:
        transformers_logging.disable_propagation()


@pytest.fixture
def folder(tmp_path, tokenizer):
    model_class = {"text-generation": CoeForCausalLM, "text-classification": CoeForSequenceClassification}

    def save(task: str):
        model_class.get(task, modeling_coe.CoeForTokenClassification)(
            tiny_config(vocab_size=len(tokenizer), pad_token_id=None)
        ).save_pretrained(tmp_path / task)
        tokenizer.save_pretrained(tmp_path / task)
        return tmp_path / task

    return save


@pytest.mark.parametrize("task", ["text-generation", "text-classification", "token-classification"])
def test_pipelines_know_the_model(task, folder, caplog):
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.ERROR):
            pipe = pipeline(task, model=str(folder(task)), device="cpu")
            options = {"max_new_tokens": 3, "do_sample": False} if task == "text-generation" else {}
            assert pipe("Tom has 3 apples.", **options)
        assert "not supported" not in caplog.text
    finally:
        transformers_logging.disable_propagation()


def test_the_server_knows_the_model(folder):
    """The class that a folder names is looked up in transformers, and its modality by its name."""
    manager = pytest.importorskip("transformers.cli.serving.model_manager")
    config = CoeConfig.from_pretrained(folder("text-generation"))
    model = getattr(import_module("transformers"), config.architectures[0]).from_pretrained(folder("text-generation"))
    assert type(model) is CoeForCausalLM
    assert manager.ModelManager.get_model_modality(model).value.lower() == "llm"


@pytest.mark.parametrize(
    "backbone, expected",
    [
        ("deepseek_v2", {"q_proj", "kv_b_proj"}),
        ("deepseek_v3", {"q_b_proj", "kv_b_proj"}),
        ("qwen3_moe", {"q_proj", "v_proj"}),
        ("llama", {"q_proj", "v_proj"}),
    ],
)
@pytest.mark.parametrize("method", ["Lora", "AdaLora", "Vera", "LoHa", "IA3", "HRA"])
def test_defaults_of_peft(backbone, expected, method):
    """Without `target_modules`: what PEFT adapts of Llama."""
    peft = pytest.importorskip("peft")
    model = tiny_model(backbone=backbone, q_lora_rank=12 if backbone == "deepseek_v3" else None)
    options = {"total_step": 10} if method == "AdaLora" else {}
    adapted = peft.get_peft_model(model, getattr(peft, f"{method}Config")(task_type="CAUSAL_LM", **options))
    layer_class = peft.tuners.tuners_utils.BaseTunerLayer
    layers = {name.rpartition(".")[2] for name, m in adapted.named_modules() if isinstance(m, layer_class)}
    if method == "IA3":  # keys, values and what feeds forward
        expected = {*(("kv_b_proj",) if "kv_b_proj" in expected else ("k_proj", "v_proj")), "down_proj"}
    assert layers == expected
    input_ids = random_ids(2, 7)
    adapted(input_ids, labels=input_ids).loss.backward()


def test_a_tokenizer_that_names_no_class(tmp_path, tokenizer):
    """A folder of a chain with nothing but the tokenizer's file."""
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    text = "Tom has 3 apples."
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path)
