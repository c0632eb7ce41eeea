"""Selection biases that move against the load (`BiasBalancer` and its callback), counted by hand."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from modeling_coe import CoeForSequenceClassification
from modeling_coe.callbacks import BiasBalancer, BiasBalancingCallback
from modeling_coe.releases import CHECKPOINTING

from .helpers import enable_checkpointing, random_ids, tiny_config, tiny_model
from .ranks import run_module, run_ranks


AUX_FREE = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "aux_loss_alpha": 0.0}
LENGTH = 8


def aux_free_model(seed: int = 0, **overrides):
    return tiny_model(seed, **{**AUX_FREE, **overrides})


def biases(model) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}


def naive_counts(model, input_ids: torch.Tensor, mask: torch.Tensor | None = None) -> list[list[int]]:
    """Tokens of each expert in every router call, one by one."""
    with torch.no_grad():
        output = model(input_ids, attention_mask=mask, output_router_logits=True)
    counts = []
    for indices in output.router_indices:
        counts.append([0] * model.config.n_routed_experts)
        for token, chosen in enumerate(indices.tolist()):
            if mask is None or mask.flatten()[token]:
                for expert in chosen:
                    counts[-1][expert] += 1
    return counts


def padded_batch(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    input_ids = random_ids(rows, LENGTH)
    mask = torch.ones_like(input_ids)
    mask[0, :3] = mask[1, -2:] = 0
    return input_ids * mask, mask


@pytest.mark.parametrize(
    "overrides",
    [
        {"inner_iter": 3, "first_k_dense_replace": 1, "num_hidden_layers": 3},
        {"upcycling": "split", "chain_layers": [1]},
        {"n_group": 4, "topk_group": 2, "scoring_func": "softmax"},
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_counts_are_those_of_a_naive_count(overrides, masked):
    model = aux_free_model(**overrides)
    input_ids, mask = padded_batch()
    balancer = BiasBalancer(model)
    model.train()(input_ids, attention_mask=mask if masked else None)
    assert balancer.counts.tolist() == naive_counts(model, input_ids, mask if masked else None)
    assert len(balancer.counts) == len(biases(model))


def test_a_router_that_all_iterations_share_counts_them_all():
    model = aux_free_model(use_igate=False, inner_iter=3)
    input_ids = random_ids(2, LENGTH)
    balancer = BiasBalancer(model)
    model.train()(input_ids)
    calls = torch.tensor(naive_counts(model, input_ids))
    assert torch.equal(balancer.counts, calls.view(2, 3, -1).sum(dim=1))


def test_a_step_moves_every_bias_against_its_load():
    model = aux_free_model(n_routed_experts=6, num_experts_per_tok=3)
    balancer = BiasBalancer(model, speed=0.25)
    # The mean is 4: above, at and below it.
    balancer.counts.copy_(torch.tensor([[9, 4, 4, 3, 4, 0]]).repeat(4, 1))
    balancer.step()
    for bias in biases(model).values():
        assert bias.tolist() == [-0.25, 0.0, 0.0, 0.25, 0.0, 0.25]
    assert not balancer.counts.any()
    balancer.step()  # nothing was counted
    assert all(bias.tolist() == [-0.25, 0.0, 0.0, 0.25, 0.0, 0.25] for bias in biases(model).values())


def in_half_precision(way: str, dtype: torch.dtype, folder) -> torch.nn.Module:
    model = aux_free_model(num_hidden_layers=1)
    if way == "built":
        return AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    if way == "cast":
        return model.to(dtype)
    if way == "method":
        return model.bfloat16() if dtype == torch.bfloat16 else model.half()
    if way == "part by part":
        for layer in model.model.layers:
            layer.to(dtype)
        return model
    if way == "assigned":
        halves = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
        model.load_state_dict(halves, assign=True)
        return model
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["built", "cast", "method", "part by part", "assigned", "loaded"])
def test_small_steps_add_up_in_half_precision(tmp_path, way, dtype):
    """A thousandth is lost beside 0.5 in bfloat16, and beside 4 in float16."""
    model = in_half_precision(way, dtype, tmp_path)
    assert model.model.layers[0].mlp.experts.down_proj.dtype == dtype
    balancer = BiasBalancer(model, speed=1e-3)
    for _ in range(5000):
        balancer.counts.zero_()
        balancer.counts[:, 0] = 8
        balancer.step()
    assert len(biases(model)) == 2
    for bias in biases(model).values():
        torch.testing.assert_close(bias, torch.tensor([-5.0] + [5.0] * 7), atol=0.01, rtol=0)


def test_biases_follow_their_model_otherwise():
    model = aux_free_model()
    torch.nn.init.normal_(next(iter(biases(model).values())))
    before = {name: bias.clone() for name, bias in biases(model).items()}
    for wide in (torch.float64, torch.float32):
        model.to(wide)
        for name, bias in biases(model).items():
            assert bias.dtype == wide and torch.equal(bias, before[name].to(wide))
    assert all(bias.is_meta for bias in biases(model.to("meta", torch.bfloat16)).values())


def test_biases_belong_to_the_router_that_was_counted():
    model = aux_free_model(inner_iter=3)
    input_ids = random_ids(4, LENGTH)
    counts = naive_counts(model, input_ids)
    balancer = BiasBalancer(model, speed=1.0)
    model.train()(input_ids)
    balancer.step()
    for bias, expected in zip(biases(model).values(), counts, strict=True):
        mean = sum(expected) / len(expected)
        assert bias.tolist() == [(count < mean) - (count > mean) for count in expected]


def test_only_training_passes_count():
    model = aux_free_model()
    balancer = BiasBalancer(model)
    input_ids = random_ids(2, LENGTH)
    model.eval()(input_ids)
    with torch.no_grad():
        model.train()(input_ids)
    model.eval().generate(input_ids, max_new_tokens=2, do_sample=False)
    assert not balancer.counts.any()
    model.train()(input_ids)
    assert balancer.counts.sum() == 2 * 2 * 2 * input_ids.numel()  # layers, iterations, experts of a token
    balancer.remove()
    model(input_ids)
    assert balancer.counts.sum() == 2 * 2 * 2 * input_ids.numel()


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_what_checkpointing_computes_again_does_not_count(use_reentrant):
    model = aux_free_model().train()
    input_ids = random_ids(2, LENGTH)
    expected = naive_counts(model, input_ids)
    if use_reentrant is not None:
        enable_checkpointing(model, {"use_reentrant": use_reentrant})
    balancer = BiasBalancer(model)
    model(input_ids, labels=input_ids).loss.backward()
    assert balancer.counts.tolist() == expected


def test_heads_are_balanced_too():
    torch.manual_seed(0)
    model = CoeForSequenceClassification(tiny_config(**AUX_FREE)).train()
    input_ids, mask = padded_batch(2)
    balancer = BiasBalancer(model)
    model(input_ids, attention_mask=mask, labels=torch.tensor([0, 1])).loss.backward()
    assert (balancer.counts.sum(dim=-1) == 2 * mask.sum()).all()


def test_load_becomes_more_even():
    model = aux_free_model().train()
    input_ids = random_ids(8, 32)
    balancer = BiasBalancer(model, speed=0.01)

    def violation() -> float:
        counts = torch.tensor(naive_counts(model, input_ids)).double()
        return (counts.amax(dim=-1) / counts.mean(dim=-1) - 1).max().item()

    before = violation()
    for _ in range(60):
        model.model(input_ids)
        balancer.step()
    assert before > 0.8
    assert violation() < 0.25 * before


@pytest.mark.parametrize(
    ("model", "speed", "message"),
    [
        (lambda: tiny_model(), 1e-3, r"`topk_method='greedy'`.*aux_loss_alpha"),
        (lambda: aux_free_model(n_routed_experts=None), 1e-3, "0 sparse layers"),
        (lambda: torch.nn.Linear(2, 2), 1e-3, "no Chain-of-Experts model in this Linear"),
        (lambda: aux_free_model(), 0.0, r"`speed` is 0.0; it must be greater than 0"),
    ],
)
def test_models_that_cannot_be_balanced(model, speed, message):
    with pytest.raises(ValueError, match=message):
        BiasBalancer(model(), speed)


@pytest.mark.filterwarnings("default::FutureWarning")
def test_adapters_are_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(aux_free_model(), peft.LoraConfig(target_modules=["o_proj"]))
    with pytest.raises(ValueError, match="checkpoints of an adapter do not hold it"):
        BiasBalancer(model)


# Trainer


def train(folder, model, data, resume: str | None = None, **overrides) -> list[float]:
    options = {
        "output_dir": str(folder),
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 0.0,  # choices then depend on the biases alone
        "optim": "sgd",
        "train_sampling_strategy": "sequential",
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**{**options, **overrides})
    callback = BiasBalancingCallback(speed=0.05)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2], callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    assert callback.balancer is None and not model.model._forward_hooks
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def examples(count: int) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    input_ids = random_ids(count, LENGTH)
    mask = torch.ones_like(input_ids)
    mask[::3, -3:] = 0
    return [{"input_ids": i, "attention_mask": m, "labels": i} for i, m in zip(input_ids, mask, strict=True)]


def expected_biases(model, data, steps: int = 3, batch: int = 4) -> list[torch.Tensor]:
    """Three steps by hand, from the naive counts of each step's whole batch."""
    routers = list(biases(model).values())
    for start in range(0, steps * batch, batch):
        rows = data[start : start + batch]
        counts = naive_counts(
            model, torch.stack([r["input_ids"] for r in rows]), torch.stack([r["attention_mask"] for r in rows])
        )
        for bias, row in zip(routers, counts, strict=True):
            mean = sum(row) / len(row)
            bias += 0.05 * torch.tensor([float((count < mean) - (count > mean)) for count in row])
    return routers


@pytest.mark.parametrize(
    ("batch_size", "overrides"),
    [
        (4, {}),
        (1, {"gradient_accumulation_steps": 4}),
        (2, {"gradient_accumulation_steps": 2, CHECKPOINTING: True}),
        (4, {"eval_strategy": "steps", "eval_steps": 1}),
    ],
)
def test_one_update_per_optimizer_step(tmp_path, batch_size, overrides):
    data = examples(12)
    expected = expected_biases(aux_free_model(), data)
    model = aux_free_model()
    train(tmp_path, model, data, per_device_train_batch_size=batch_size, **overrides)
    for actual, bias in zip(biases(model).values(), expected, strict=True):
        torch.testing.assert_close(actual, bias)
    assert max(bias.abs().max() for bias in expected) > 0.1  # moved in the same direction more than once


def test_a_resumed_run_goes_on_where_it_was(tmp_path):
    options = {
        **{"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2},
        **{"learning_rate": 1e-2},
    }
    whole, resumed = aux_free_model(), aux_free_model(seed=5)
    losses = train(tmp_path, whole, examples(8), **options)
    assert train(tmp_path, resumed, examples(8), resume=str(tmp_path / "checkpoint-2"), **options) == losses
    for name, bias in biases(whole).items():
        assert torch.equal(biases(resumed)[name], bias) and bias.any()


def test_two_processes_equal_one(tmp_path):
    data, model = examples(24), aux_free_model()
    model.save_pretrained(tmp_path / "model")
    torch.save(data, tmp_path / "data.pt")
    paths = ("--model", tmp_path / "model", "--data", tmp_path / "data.pt", "--output", tmp_path)
    run = run_ranks(run_module, "tests.bias_worker", *paths, "--batch-size", "2")
    assert run.returncode == 0, run.stdout + run.stderr
    expected = expected_biases(model, data, batch=8)
    for rank in range(2):
        actual = torch.load(tmp_path / f"biases-{rank}.pt")
        for name, bias in zip(biases(model), expected, strict=True):
            torch.testing.assert_close(actual[name], bias)
