"""Routing statistics against a count in plain Python, on random choices and on what models choose; the callback in
real training runs; pictures read back; the command from the shell."""

import json
import math
import runpy
import sys
from itertools import islice
from pathlib import Path

import pytest
import routing as routing_example
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from recipe.corpus import ArithmeticExamples, train_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerCallback

from configuration_coe import RESIDUAL_RULES
from modeling_coe import CoeForSequenceClassification
from modeling_coe.callbacks import RoutingCallback
from modeling_coe.diagnostics import RoutingStatistics, measure_routing, record_routing, routing_stability
from modeling_coe.diagnostics.cli import main
from modeling_coe.diagnostics.plots import plot_load, plot_training, plot_transitions
from modeling_coe.releases import CHECKPOINTING

from .diagnostics_worker import MIXED, trainer
from .helpers import (
    assert_equal_up_to_rounding,
    enable_checkpointing,
    random_ids,
    tiny_config,
    tiny_model,
    torchrun,
)


# ---- The same by plain counting -------------------------------------------------------------------------------------


def naive_summary(config, calls) -> dict:
    """The definitions, token by token. `calls` holds (indices, logits, mask or None) of forwards, as lists."""
    num_experts = config.n_routed_experts
    layers, first = [], 0
    for layer_idx in config.sparse_layers:
        last = first + config.num_iterations(layer_idx)
        tokens = []  # (choices of every iteration, scores of every iteration)
        for indices, logits, mask in calls:
            for token in range(len(indices[first])):
                if mask is None or mask[token]:
                    tokens.append(([i[token] for i in indices[first:last]], [s[token] for s in logits[first:last]]))
        layer = {"layer": layer_idx, "iterations": [], "transitions": []}
        for t in range(last - first):
            counts = [sum(choices[t].count(expert) for choices, _ in tokens) for expert in range(num_experts)]
            scores = [score_row(config, logits[t]) for _, logits in tokens]
            layer["iterations"].append({"iteration": t} | naive_iteration(counts, scores))
        for t in range(last - first - 1):
            chosen = [(set(choices[t]), set(choices[t + 1])) for choices, _ in tokens]
            counts = [
                [sum(i in before and j in after for before, after in chosen) for j in range(num_experts)]
                for i in range(num_experts)
            ]
            totals = [sum(i in before for before, _ in chosen) for i in range(num_experts)]
            shared, made = sum(len(b & a) for b, a in chosen), sum(len(a) for _, a in chosen)
            layer["transitions"].append(
                {
                    "from": t,
                    "to": t + 1,
                    "reuse": shared / made if made else None,
                    "transitions": [
                        [count / total if total else None for count in row]
                        for row, total in zip(counts, totals, strict=True)
                    ],
                    "transition_counts": counts,
                }
            )
        layers.append(layer)
        first = last
    return {"tokens": len(tokens), "experts": num_experts, "layers": layers}


def score_row(config, logits: list[float]) -> list[float]:
    if config.scoring_func == "sigmoid":
        return [1 / (1 + math.exp(-x)) for x in logits]
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def entropy(values: list[float]) -> float:
    values = [value / sum(values) for value in values]
    return -sum(p * math.log(p) for p in values if p > 0) / (math.log(len(values)) or 1)


def naive_iteration(counts: list[int], scores: list[list[float]]) -> dict:
    names = ("max_vio", "load_entropy", "dead_share", "margin", "router_entropy")
    if not scores:
        return dict.fromkeys(names) | {"load": [None] * len(counts), "selections": counts}
    mean = sum(counts) / len(counts)
    best = [sorted(row)[-2:] for row in scores]
    values = (
        (max(counts) - mean) / mean,
        entropy(counts),
        counts.count(0) / len(counts),
        sum(pair[-1] - pair[0] for pair in best) / len(best),
        sum(map(entropy, scores)) / len(scores),
    )
    load = [count / sum(counts) for count in counts]
    return dict(zip(names, values, strict=True)) | {"load": load, "selections": counts}


def assert_same(actual, expected, where: str = "summary") -> None:
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for position, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_same(a, e, f"{where}[{position}]")
    else:
        assert actual == (None if expected is None else pytest.approx(expected, abs=1e-5)), where


def as_call(output, mask=None) -> tuple:
    """What a forward returned, as `naive_summary` reads it."""
    indices = [indices.tolist() for indices in output.router_indices]
    logits = [logits.tolist() for logits in output.router_logits]
    return indices, logits, None if mask is None else mask.flatten().tolist()


def random_forward(config, num_tokens: int, padded: bool):
    """Random choices of distinct experts, and random logits that have nothing to do with them."""
    indices, logits = [], []
    for layer_idx in config.sparse_layers:
        for _ in range(config.num_iterations(layer_idx)):
            order = torch.rand(num_tokens, config.n_routed_experts).argsort(-1)
            indices.append(order[:, : config.experts_per_iteration(layer_idx)])
            logits.append(2 * torch.randn(num_tokens, config.n_routed_experts))
    return tuple(indices), tuple(logits), (torch.rand(num_tokens) < 0.6) if padded else None


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    num_experts=st.integers(1, 5),
    num_iterations=st.integers(1, 3),
    layout=st.sampled_from(["inner", "mixed", "split"]),
    scoring_func=st.sampled_from(["softmax", "sigmoid"]),
    forwards=st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=0, max_size=3),
    data=st.data(),
)
def test_equals_a_naive_count(num_experts, num_iterations, layout, scoring_func, forwards, data):
    options = {"inner": {}, "mixed": MIXED, "split": RESIDUAL_RULES["split"]}[layout]
    if layout == "split":
        num_iterations = min(2, num_experts)
        options = options if num_iterations == 2 else {}
    top_k = data.draw(st.integers(1, num_experts // num_iterations if options.get("upcycling") else num_experts))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    config = tiny_config(
        n_routed_experts=num_experts,
        num_experts_per_tok=top_k,
        inner_iter=num_iterations,
        scoring_func=scoring_func,
        **options,
    )
    whole, parts = RoutingStatistics(config), [RoutingStatistics(config) for _ in range(2)]
    calls = []
    for number, (num_tokens, padded) in enumerate(forwards):
        indices, logits, mask = random_forward(config, num_tokens, padded)
        whole.update(indices, logits, mask)
        parts[number % 2].update(indices, logits, mask)
        calls.append(
            ([i.tolist() for i in indices], [s.tolist() for s in logits], None if mask is None else mask.tolist())
        )
    expected = naive_summary(config, calls) if calls else naive_summary(config, [empty_call(config)])
    assert_same(whole.summary(), expected)
    assert_same(parts[0].merge(parts[1]).summary(), expected)
    json.dumps(whole.summary(), allow_nan=False)
    whole.reset()
    assert_same(whole.summary(), naive_summary(config, [empty_call(config)]))


def empty_call(config) -> tuple:
    num_calls = sum(map(config.num_iterations, config.sparse_layers))
    return [[]] * num_calls, [[]] * num_calls, None


def test_values_of_uniform_routing():
    statistics = RoutingStatistics(tiny_config(num_hidden_layers=1, n_routed_experts=4, num_experts_per_tok=1))
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    statistics.update(tuple(pairs.T[:, :, None]), (torch.zeros(16, 4),) * 2)
    layer = statistics.layers[0]
    for name, value in (
        *(("load", 1 / 4), ("max_vio", 0), ("load_entropy", 1), ("dead_share", 0), ("margin", 0)),
        *(("router_entropy", 1), ("reuse", 1 / 4), ("transitions", 1 / 4)),
    ):
        torch.testing.assert_close(getattr(layer, name), torch.full_like(getattr(layer, name), value), msg=name)


def force_one_expert(model, expert: int) -> None:
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer[expert] = 100


def test_a_router_forced_onto_one_expert():
    model = tiny_model(num_experts_per_tok=1, scoring_func="sigmoid", topk_method="noaux_tc")
    force_one_expert(model, 3)
    layer = measure_routing(model, [{"input_ids": random_ids(2, 9)}]).layers[1]
    assert layer.dead_share.tolist() == [1 - 1 / 8] * 2
    assert layer.load_entropy.tolist() == [0, 0]
    assert layer.max_vio.tolist() == [7, 7]
    assert layer.reuse.tolist() == [1]
    assert layer.transitions[0, 3].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert layer.transitions[0].isnan().sum() == 7 * 8


# ---- Recording ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"inner_iter": 3},
        {"use_igate": False},
        {"inner_iter": 1},
        {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        MIXED,
        RESIDUAL_RULES["refine"],
        {**RESIDUAL_RULES["split"], "inner_iter": 3},
        {**RESIDUAL_RULES["split"], "num_hidden_layers": 3, "chain_layers": [0, 2]},
    ],
    ids=str,
)
def test_recording_counts_what_the_model_chooses(options):
    model = tiny_model(**options)
    with torch.no_grad():  # converted layers begin with equal routers
        for name, parameter in model.named_parameters():
            if ".gate." in name or "iteration_scale" in name:
                parameter.normal_(std=0.5)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :3] = mask[2, :5] = 0
    batches = [{"input_ids": random_ids(3, 7), "attention_mask": mask}, {"input_ids": random_ids(2, 4)}]
    calls = []
    with torch.no_grad(), record_routing(model) as statistics:
        for batch in batches:
            plain = model(**batch)
            assert plain.router_logits is None and plain.router_indices is None and plain.aux_loss is None
    with torch.no_grad():
        for batch in batches:
            output = model(**batch, output_router_logits=True)
            calls.append(as_call(output, batch.get("attention_mask")))
    assert_equal_up_to_rounding(output.logits, plain.logits)
    assert statistics.tokens == 13 + 8
    assert_same(statistics.summary(), naive_summary(model.config, calls))
    if options.get("upcycling") == "split":
        assert all(not layer.reuse.any() for layer in statistics.layers.values())


def test_recording_ends_and_nests():
    model = tiny_model()
    input_ids = random_ids(1, 6)
    with record_routing(model) as outer:
        model(input_ids)
        with pytest.raises(RuntimeError, match="broken off"), record_routing(model) as inner:
            model(input_ids)
            raise RuntimeError("broken off")
        model(input_ids, output_router_logits=True)
    model(input_ids)
    assert (outer.tokens, inner.tokens) == (18, 6)
    assert not model.model._forward_pre_hooks and outer.layers.keys() == {0, 1}
    with record_routing(model, outer):
        model(input_ids)
    assert outer.tokens == 24


@pytest.mark.parametrize("checkpointing", [{}, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_checkpointing_does_not_count_twice(checkpointing):
    model = tiny_model(aux_loss_alpha=0.0 if checkpointing.get("use_reentrant") else 0.1)
    input_ids = random_ids(2, 8)
    expected = measure_routing(model, [{"input_ids": input_ids}]).summary()
    if checkpointing:
        enable_checkpointing(model, checkpointing)
    model.train()
    with record_routing(model) as statistics:
        model(input_ids, labels=input_ids).loss.backward()
    assert_same(statistics.summary(), expected)
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "experts" in name)


def test_recording_training_passes_only():
    model = tiny_model()
    input_ids = random_ids(2, 5)
    with record_routing(model, training_only=True) as statistics:
        model(input_ids)
        model.train()(input_ids)
        with torch.no_grad():
            model(input_ids)
        model.generate(input_ids, max_new_tokens=2, do_sample=False)
    assert statistics.tokens == input_ids.numel()


def test_recording_generation():
    model = tiny_model()
    prompts = random_ids(2, 6)
    prompts[0, :4] = 0
    with record_routing(model) as statistics:
        model.generate(
            prompts, attention_mask=prompts.ne(0).long(), max_new_tokens=4, do_sample=False, eos_token_id=None
        )
    assert statistics.tokens == 2 + 6 + 2 * 3  # the last token is not read


def test_recording_other_heads_and_the_bare_model():
    model = tiny_model()
    input_ids, mask = random_ids(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    expected = measure_routing(model, [{"input_ids": input_ids, "attention_mask": mask}]).summary()
    classifier = CoeForSequenceClassification(model.config).eval()
    classifier.model.load_state_dict(model.model.state_dict())
    for other, call in ((model.model, lambda m: m(input_ids, mask)), (classifier, lambda m: m(input_ids, mask))):
        with record_routing(other) as statistics:
            call(other)
        assert_same(statistics.summary(), expected)


def test_recording_compiled_models(caplog):
    model, input_ids = tiny_model(num_hidden_layers=1), random_ids(2, 5)
    expected = measure_routing(model, [{"input_ids": input_ids}]).summary()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), record_routing(compiled) as statistics:
        compiled(input_ids)
    assert_same(statistics.summary(), expected)
    assert "No forward was recorded" not in caplog.text
    compiled(input_ids)
    with torch.no_grad(), record_routing(compiled) as statistics:
        compiled(input_ids)
    if not statistics.tokens:  # as torch compiles today
        assert "No forward was recorded" in caplog.text


def test_bfloat16_autocast_counts_exactly():
    """More tokens than bfloat16 has integers."""
    model = tiny_model(n_routed_experts=2, num_experts_per_tok=1)
    with torch.autocast("cpu", dtype=torch.bfloat16), record_routing(model) as statistics:
        for _ in range(3):
            model(random_ids(1, 301))
    for layer in statistics.layers.values():
        assert layer.selections.sum(dim=-1).tolist() == [903, 903]
        assert layer.transition_counts.sum().item() == 903


def test_measuring_evaluates_and_leaves_the_model_as_it_was():
    model = tiny_model(attention_dropout=0.9).train()
    batches = [{"input_ids": random_ids(2, 9)}]
    statistics = measure_routing(model, batches)
    assert model.training and torch.is_grad_enabled()
    assert_same(measure_routing(model.eval(), batches).summary(), statistics.summary())


def test_the_table_shows_every_router():
    statistics = measure_routing(tiny_model(**MIXED), [{"input_ids": random_ids(2, 8)}])
    lines = str(statistics).splitlines()
    assert lines[0] == "16 tokens, 8 experts"
    assert [line.split()[:2] for line in lines[2:]] == [["1", "0"], ["2", "0"], ["2", "1"]]
    assert lines[2].split()[-1] == lines[3].split()[-1] == "-"
    assert float(lines[4].split()[-1]) == pytest.approx(statistics.layers[2].reuse.item(), abs=1e-4)
    assert "-" in str(RoutingStatistics(tiny_config()))


def test_the_table_of_many_layers_shows_means_and_the_worst():
    config = tiny_config(num_hidden_layers=9, inner_iter=2, num_experts_per_tok=1)
    statistics = RoutingStatistics(config)
    spread, together = torch.arange(8)[:, None], torch.zeros(8, 1, dtype=torch.int64)
    # Layer 4 sends all to one expert in its second iteration; layer 6 half of them in its first.
    calls = [spread] * 18
    calls[2 * 4 + 1], calls[2 * 6] = together, spread // 4 * 4
    statistics.update(tuple(calls), (torch.zeros(8, 8),) * 18)
    first, head, *rows = (line.split() for line in str(statistics).splitlines())
    assert " ".join(first) == "8 tokens, 8 experts" and head[2] == "max_vio"
    assert [row[:3] for row in rows[:2]] == [["mean", "0", f"{3 / 9:.4f}"], ["mean", "1", f"{7 / 9:.4f}"]]
    assert rows[0][-1] == "-" and " ".join(rows[2]) == "of 18 routers those with the highest max_vio"
    assert [row[:3] for row in rows[3:5]] == [["4", "1", "7.0000"], ["6", "0", "3.0000"]] and len(rows) == 3 + 5
    assert len(statistics.summary()["layers"]) == 9


@pytest.mark.parametrize("num_layers", [2, 9])
def test_the_table_leaves_out_a_load_that_cannot_differ(num_layers):
    model = tiny_model(num_hidden_layers=num_layers, num_experts_per_tok=8, inner_iter=2)
    lines = str(measure_routing(model, [{"input_ids": random_ids(2, 9)}])).splitlines()
    assert lines[1].split() == ["layer", "iteration", "margin", "router_entropy"]
    if num_layers == 9:
        margins = [float(line.split()[2]) for line in lines[-5:]]
        assert margins == sorted(margins) and "lowest margin" in lines[-6]


class TestRefused:
    def test_models_without_routers(self):
        llama = LlamaForCausalLM(
            LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        )
        with pytest.raises(ValueError, match="no Chain-of-Experts model in this LlamaForCausalLM"):
            measure_routing(llama, [])
        with pytest.raises(ValueError, match="no sparse layers"):
            measure_routing(tiny_model(n_routed_experts=None), [])

    def test_tuples(self):
        model = tiny_model().model
        with pytest.raises(ValueError, match="`return_dict=False`"), record_routing(model):
            model(random_ids(1, 4), return_dict=False)

    def test_another_number_of_calls_or_tokens(self):
        config = tiny_config()
        indices, logits, _ = random_forward(config, 5, padded=False)
        statistics = RoutingStatistics(config)
        with pytest.raises(ValueError, match=r"Got 3 `router_indices` and 4 `router_logits`.*makes 4 router calls"):
            statistics.update(indices[:3], logits)
        with pytest.raises(ValueError, match="`token_mask` has 6 elements, but 5 tokens"):
            statistics.update(indices, logits, torch.ones(2, 3))

    @pytest.mark.parametrize(
        "options", [{"inner_iter": 3}, {"n_routed_experts": 9}, {"scoring_func": "sigmoid"}], ids=str
    )
    def test_merging_different_models(self, options):
        with pytest.raises(ValueError, match="Only statistics of one architecture"):
            RoutingStatistics(tiny_config()).merge(RoutingStatistics(tiny_config(**options)))


# ---- Stability ------------------------------------------------------------------------------------------------------


def test_stability_is_the_mean_overlap():
    model, other = tiny_model(**MIXED), tiny_model(**MIXED, seed=1)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    batches = [{"input_ids": random_ids(2, 9), "attention_mask": mask}, {"input_ids": random_ids(1, 6)}]
    assert routing_stability(model, model, batches) == {1: [1.0], 2: [1.0, 1.0]}
    overlaps = [[] for _ in range(3)]
    for batch in batches:
        with torch.no_grad():
            chosen = [m(**batch, output_router_logits=True).router_indices for m in (model, other)]
        counted = batch.get("attention_mask", torch.ones(1, 6)).flatten().tolist()
        for call, (a, b) in enumerate(zip(*chosen, strict=True)):
            pairs = zip(a.tolist(), b.tolist(), counted, strict=True)
            overlaps[call] += [len(set(x) & set(y)) / 2 for x, y, counts in pairs if counts]
    expected = [sum(values) / len(values) for values in overlaps]
    assert len(overlaps[0]) == 14 + 6 and min(expected) > 0 and max(expected) < 1
    actual = routing_stability(model.train(), other, iter(batches))
    assert actual == {1: [pytest.approx(expected[0])], 2: [pytest.approx(value) for value in expected[1:]]}
    assert model.training and not other.training


def test_stability_of_models_that_route_differently():
    with pytest.raises(ValueError, match="route differently"):
        routing_stability(tiny_model(), tiny_model(num_experts_per_tok=3), [])


# ---- Training -------------------------------------------------------------------------------------------------------


class Losses(TrainerCallback):
    """A logger as `report_to` makes it: it runs before the callbacks that are given to the `Trainer`."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


class KeepingTrainer(Trainer):
    """Keeps what the routers return in training, a list for every optimizer step."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            step = vars(self).setdefault("kept", {}).setdefault(self.state.global_step, [])
            step.append((outputs, inputs["attention_mask"]))
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("checkpointing", [False, True])
def test_callback_logs_the_training_tokens_since_the_last_log(tmp_path, checkpointing):
    logger = Losses()
    options = {
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        CHECKPOINTING: checkpointing,
    }
    model = tiny_model(**MIXED, output_router_logits=True)
    run = trainer(tmp_path, model, KeepingTrainer, [logger], **options)
    RoutingCallback.add_to(run)
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    for entry, steps in zip(entries, ((0, 1), (2, 3)), strict=True):
        outputs = [kept for step in steps for kept in run.kept[step]]
        assert len(outputs) == 4
        layers = naive_summary(model.config, [as_call(*kept) for kept in outputs])["layers"]
        for name, worst in (("max_vio", max), ("load_entropy", min), ("dead_share", max), ("margin", min)):
            for t, reached in enumerate((layers, layers[1:])):
                values = [layer["iterations"][t][name] for layer in reached]
                assert entry[f"routing/iter{t}/{name}"] == pytest.approx(sum(values) / len(values), abs=1e-6)
                assert entry[f"routing/iter{t}/{name}_worst"] == pytest.approx(worst(values), abs=1e-6)
        reuse = layers[1]["transitions"][0]["reuse"]
        assert entry["routing/iter1/reuse"] == entry["routing/iter1/reuse_worst"] == pytest.approx(reuse)
        aux_losses = [kept.aux_loss.item() for kept, _ in outputs]
        assert entry["aux_loss"] == pytest.approx(sum(aux_losses) / 4, rel=1e-5)
        assert sum(key.startswith("routing/") for key in entry) == 8 + 10
    # Loggers that run earlier see the keys too, with the training loss only.
    assert [log for log in logger.logs if "routing/iter0/max_vio" in log] == [
        {key: value for key, value in entry.items() if key != "step"} for entry in entries
    ]
    assert not model._forward_hooks and not model.model._forward_pre_hooks


def test_callback_changes_nothing_but_the_log(tmp_path):
    """Given the plain way: whoever reads `log_history` has the keys. Training is the same to the bit."""
    runs = []
    for callbacks in ([], [RoutingCallback(max_iterations=2)]):
        run = trainer(tmp_path, tiny_model(inner_iter=4), callbacks=callbacks)
        run.train()
        runs.append(run)
    plain, logged = ([e for e in run.state.log_history if "loss" in e] for run in runs)
    assert [entry["loss"] for entry in plain] == [entry["loss"] for entry in logged]
    for name, tensor in runs[0].model.state_dict().items():
        assert torch.equal(runs[1].model.state_dict()[name], tensor), name
    keys = {key for key in logged[0] if key.startswith("routing/")}
    assert len(keys) == 18 and not any("iter2" in key for key in keys)
    assert not any(key.startswith("routing/") for entry in plain for key in entry)


def warnings_of(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name == "modeling_coe.diagnostics.callbacks"]


def test_callback_warns_once_when_experts_die_and_routing_collapses(tmp_path, caplog):
    model = tiny_model(num_experts_per_tok=1, scoring_func="sigmoid", topk_method="noaux_tc")
    force_one_expert(model, 5)
    run = trainer(tmp_path, model, logging_steps=1)
    callback = RoutingCallback.add_to(run, min_expected=2)
    run.train()
    messages = warnings_of(caplog)
    assert len(messages) == 2 and callback.warned == {"dead", "collapse"}
    assert "Layer 0, iteration 0: 7 of 8 experts were not chosen once" in messages[0]
    assert "entropy of the load is 0.00 and one expert gets 100% of all choices" in messages[1]


def test_callback_does_not_warn_of_few_tokens(tmp_path, caplog):
    model = tiny_model(num_experts_per_tok=1, scoring_func="sigmoid", topk_method="noaux_tc")
    force_one_expert(model, 5)
    run = trainer(tmp_path, model, logging_steps=1)
    RoutingCallback.add_to(run)
    run.train()
    assert not warnings_of(caplog)


@pytest.mark.parametrize(
    "options, has_load",
    [({"num_experts_per_tok": 8}, False), ({**RESIDUAL_RULES["split"], "num_experts_per_tok": 4}, True)],
    ids=["all experts in each iteration", "all experts over the iterations"],
)
def test_callback_logs_what_can_differ_where_all_experts_are_used(tmp_path, caplog, options, has_load):
    """A token uses all experts, so none is dead and there is nothing to balance; which come first may still differ."""
    model = tiny_model(**options)
    assert model.config.uses_all_experts
    run = trainer(tmp_path, model, logging_steps=1)
    RoutingCallback.add_to(run, min_expected=1, collapse_entropy=1.1)
    run.train()
    entry = next(entry for entry in run.state.log_history if "loss" in entry)
    assert "aux_loss" not in entry and "routing/iter1/margin" in entry and not warnings_of(caplog)
    for name in ("max_vio", "load_entropy", "dead_share", "reuse"):
        assert (f"routing/iter1/{name}" in entry) == has_load


# ---- Two processes --------------------------------------------------------------------------------------------------


def test_two_ranks_reduce_to_the_figures_of_one_process(tmp_path):
    worker = torchrun("tests.diagnostics_worker", tmp_path)
    assert worker.returncode == 0, worker.stdout + worker.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]

    model = tiny_model(**MIXED)
    whole = measure_routing(model, [{"input_ids": row[None]} for row in random_ids(4, 9)]).summary()
    assert whole["tokens"] == 36
    for rank in ranks:
        assert_same(rank["statistics"], whole)
        assert rank["loaded"] == []  # importing the diagnostics needs no pictures, no data sets and no trainer

    run = trainer(tmp_path, tiny_model(), per_device_train_batch_size=4, logging_steps=1, max_steps=2)
    RoutingCallback.add_to(run)
    run.train()
    expected = [entry for entry in run.state.log_history if "loss" in entry]
    for rank in ranks:
        for entry, reduced in zip(expected, rank["log"], strict=True):
            for key, value in entry.items():
                if key.startswith(("routing/", "aux_loss")):
                    assert reduced[key] == pytest.approx(value, abs=1e-5), key


# ---- Pictures -------------------------------------------------------------------------------------------------------


def read_png(path: Path) -> torch.Tensor:
    """(height, width, 3) in 0..255."""
    pixels = torch.from_numpy(imread(path))[..., :3]
    return (pixels * 255).round().to(torch.uint8)


def share_of(color: tuple[int, int, int], pixels: torch.Tensor) -> float:
    """Share of the pixels of a colour, two steps more or less."""
    return (pixels.int() - torch.tensor(color)).abs().le(2).all(-1).double().mean().item()


VIRIDIS_LOW, VIRIDIS_HIGH, GREY = (68, 1, 84), (253, 231, 37), (204, 204, 204)


def shifted_routing(num_layers: int, num_iterations: int = 2) -> RoutingStatistics:
    """Every iteration chooses the expert after the one before; the last expert is never chosen first."""
    config = tiny_config(num_hidden_layers=num_layers, inner_iter=num_iterations, num_experts_per_tok=1)
    statistics = RoutingStatistics(config)
    chosen = [((torch.arange(7) + t) % 8)[:, None] for t in range(num_iterations)] * num_layers
    statistics.update(tuple(chosen), (torch.zeros(7, 8),) * len(chosen))
    return statistics


def test_transitions_are_drawn(tmp_path):
    statistics = shifted_routing(2)
    plot_transitions(statistics, tmp_path / "both.png")
    both = read_png(tmp_path / "both.png")
    height, width = both.shape[:2]
    assert 350 < height < width < 1400
    # In each heat map one of eight rows is grey, and of the others one in eight cells is certain.
    low, high, grey = (share_of(color, both) for color in (VIRIDIS_LOW, VIRIDIS_HIGH, GREY))
    assert low > 0.3 and high == pytest.approx(low / 7, rel=0.15) and grey == pytest.approx(low / 49 * 8, rel=0.15)

    plot_transitions(statistics, tmp_path / "one.png", layers=[1])
    assert read_png(tmp_path / "one.png").shape[1] < 0.7 * width
    plot_transitions(shifted_routing(6, num_iterations=3), tmp_path / "four.png")
    four = read_png(tmp_path / "four.png")
    assert four.shape[1] > 1.5 * width and four.shape[0] > 1.5 * height


def test_load_is_drawn(tmp_path):
    plot_load(shifted_routing(3, num_iterations=3), tmp_path / "load.png")
    pixels = read_png(tmp_path / "load.png")
    assert pixels.shape[0] > 700 and pixels.shape[1] > 1000
    for color in ((0, 114, 178), (213, 94, 0), (0, 158, 115)):  # a line per iteration
        assert share_of(color, pixels) > 1e-4, color
    assert share_of((255, 255, 255), pixels) > 0.8


def test_layers_that_cannot_be_drawn(tmp_path):
    statistics = shifted_routing(2, num_iterations=1)
    with pytest.raises(ValueError, match=r"`layers` is \[\], but those that can be drawn are \[\]"):
        plot_transitions(statistics, tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"`layers` is \[5\], but those that can be drawn are \[0, 1\]"):
        plot_load(statistics, tmp_path / "none.png", layers=[5])
    statistics.reset()
    with pytest.raises(ValueError, match="No tokens were recorded"):
        plot_load(statistics, tmp_path / "none.png")
    assert not list(tmp_path.iterdir())


def test_training_is_drawn(tmp_path):
    log = [
        {"step": step, "loss": 5 / step, "aux_loss": 2.0 + 1 / step, "routing/iter0/max_vio": 1 / step}
        | {"routing/iter1/max_vio": 2 / step, "routing/iter1/max_vio_worst": 3 / step, "routing/iter1/reuse": 0.25}
        for step in range(1, 9)
    ]
    log += [{"step": step, "eval_loss": 4 / step} for step in (4, 8)] + [{"step": 8, "train_runtime": 1.0}]
    plot_training(log, tmp_path / "whole.png")
    whole = read_png(tmp_path / "whole.png")
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    plot_training(tmp_path / "trainer_state.json", tmp_path / "file.png")
    assert torch.equal(read_png(tmp_path / "file.png"), whole)
    plot_training([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}], tmp_path / "loss.png")
    alone = read_png(tmp_path / "loss.png")
    assert alone.shape[0] < 0.7 * whole.shape[0] and alone.shape[1] < 0.7 * whole.shape[1]
    assert share_of((0, 114, 178), whole) > 1e-3 and share_of((213, 94, 0), whole) > 1e-3
    assert share_of((128, 128, 128), alone) > 1e-3
    with pytest.raises(ValueError, match="no `loss`"):
        plot_training([{"step": 1, "train_runtime": 1.0}], tmp_path / "none.png")


# ---- Command line ---------------------------------------------------------------------------------------------------

WORDS = [f"w{number}" for number in range(90)]
ROWS = [{"question": " ".join(WORDS[n : n + 3 + n % 4]), "answer": WORDS[-n - 1]} for n in range(9)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, **{word: n + 3 for n, word in enumerate(WORDS)}}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)  # no padding token
    tiny_model(**MIXED).save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def expected_summary(texts: list[list[int]]) -> dict:
    return measure_routing(tiny_model(**MIXED), [{"input_ids": torch.tensor([text])} for text in texts]).summary()


def ids_of(row: dict) -> list[int]:
    return [WORDS.index(word) + 3 for word in f"{row['question']} {row['answer']}".split()]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # other tests import what is run here
def test_command_from_the_shell(saved, rows, tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "out"
    options = ["--column", "answer", "--batch-size", "2", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["coe-routing", "--column", "question", str(saved), str(rows), *options])
    runpy.run_module("modeling_coe.diagnostics.cli", run_name="__main__")
    written = json.loads((out / "routing.json").read_text())
    assert (written.pop("model"), written.pop("data")) == (str(saved), str(rows))
    assert_same(written, expected_summary([ids_of(row) for row in ROWS]))
    assert capsys.readouterr().out.splitlines()[0] == f"{written['tokens']} tokens, 8 experts"
    assert {path.name for path in out.iterdir()} == {"routing.json", "load.png", "transitions.png"}
    assert all(read_png(path).unique().numel() > 20 for path in out.glob("*.png"))


def test_command_reads_texts_up_to_a_number_of_tokens(saved, tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("w1 w2 w3 w4\n\nw5 w6\nw7 w8 w9\n")
    state = saved / "trainer_state.json"
    state.write_text(json.dumps({"log_history": [{"step": 1, "loss": 2.0}]}))
    main([str(saved), str(texts), "--out", str(tmp_path), "--tokens", "6", "--length", "3", "--batch-size", "2"])
    written = json.loads((tmp_path / "routing.json").read_text())
    assert_same(written["layers"], expected_summary([[4, 5, 6], [8, 9], [10]])["layers"])
    assert capsys.readouterr().out.startswith("6 tokens, 8 experts")
    assert (tmp_path / "training.png").exists()
    state.write_text(json.dumps({"log_history": []}))
    main([str(saved), str(texts), "--out", str(tmp_path / "unlogged")])
    state.unlink()
    assert "There is no training.png: The log has no `loss`" in capsys.readouterr().err
    assert (tmp_path / "unlogged" / "load.png").exists() and not (tmp_path / "unlogged" / "training.png").exists()


def test_command_reads_parquet_and_unchained_models(saved, tmp_path):
    from datasets import Dataset

    Dataset.from_list([{"text": "w1 w2 w3"}, {"text": None}, {"text": ""}, {"text": "w4"}]).to_parquet(
        tmp_path / "texts.parquet"
    )
    model = tiny_model(inner_iter=1)
    model.save_pretrained(tmp_path / "model")
    for path in saved.glob("tokenizer*"):
        (tmp_path / "model" / path.name).write_text(path.read_text())
    main([str(tmp_path / "model"), str(tmp_path / "texts.parquet"), "--out", str(tmp_path / "out")])
    written = json.loads((tmp_path / "out" / "routing.json").read_text())
    expected = measure_routing(model, [{"input_ids": torch.tensor([ids])} for ids in ([4, 5, 6], [7])])
    assert_same(written["layers"], expected.summary()["layers"])
    assert not (tmp_path / "out" / "transitions.png").exists()


def test_example_draws_the_model_and_its_untrained_self(tmp_path, capsys):
    problems = ArithmeticExamples(0, "train")
    train_tokenizer(islice(problems, 50), 300).save_pretrained(tmp_path / "model")
    tiny_model(seed=1, vocab_size=300).save_pretrained(tmp_path / "model")  # seed 0 is that of the untrained one
    options = ["--model", f"{tmp_path}/model", "--output-dir", f"{tmp_path}/out", "--eval-blocks", "2"]
    routing_example.main([*options, "--block-size", "8"])
    names = {f"{kind}_{name}.png" for kind in ("load", "transitions") for name in ("trained", "untrained")}
    names |= {"routing_trained.json", "routing_untrained.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    pictures = [(tmp_path / "out" / f"transitions_{name}.png").read_bytes() for name in ("trained", "untrained")]
    assert pictures[0] != pictures[1]
    printed = capsys.readouterr().out
    assert "untrained: 16 tokens, 8 experts" in printed and "\ntrained: 16 tokens, 8 experts" in printed
    tiny_model(vocab_size=300, inner_iter=1).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="has one iteration"):
        routing_example.main(options)
