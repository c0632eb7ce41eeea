"""`modeling_coe.diagnostics.measure_iterations` against models that lack what is dropped."""

import pytest
import torch

from modeling_coe.diagnostics import measure_iterations

from .helpers import random_ids, tiny_model


def batches() -> list[dict[str, torch.Tensor]]:
    made = [{"input_ids": ids, "labels": ids.clone()} for ids in (random_ids(2, 9), random_ids(1, 5))]
    made[0]["labels"][0, :4] = -100
    return made


def loss(model, of: list[dict[str, torch.Tensor]]) -> float:
    """Over all labels of all batches."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in of:
            logits = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1).double()
            labels = batch["labels"][:, 1:].flatten()
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
            count += int((labels != -100).sum())
    return total / count


def test_dropped_iterations():
    model = tiny_model(inner_iter=2, prenorm_residual=True, num_hidden_layers=3, first_k_dense_replace=1)
    data = batches()
    measured = measure_iterations(model.train(), data)
    assert model.training and [layer["layer"] for layer in measured["layers"]] == [1, 2]
    model.eval()
    assert measured["loss"] == pytest.approx(loss(model, data), rel=1e-5)
    # A chain whose last iteration is dropped is one iteration shorter.
    first, second = model.model.layers[1:]
    first.num_iterations = 1
    assert measured["layers"][0]["loss_without"][1] == pytest.approx(loss(model, data), rel=1e-5)
    second.num_iterations = 1
    assert measured["loss_without"][1] == pytest.approx(loss(model, data), rel=1e-5)
    first.num_iterations = second.num_iterations = 2
    # One whose first iteration is dropped has the second's router alone, on the same input.
    second.mlp.gate[0], second.num_iterations = second.mlp.gate[1], 1
    assert measured["layers"][1]["loss_without"][0] == pytest.approx(loss(model, data), rel=1e-5)


def test_cosine_and_norm_of_updates():
    model = tiny_model(inner_iter=3, prenorm_residual=True, residual_multiplier=0.5)
    data, seen = batches(), []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *call: seen.append(call[2][0].flatten(0, 1)))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    first, second, third = (torch.cat(seen[t::3]) for t in range(3))
    layer = measure_iterations(model, data)["layers"][1]
    cosines = [(a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1) for a, b in ((first, second), (second, third))]
    assert layer["cosine"] == pytest.approx([cosine.mean().item() for cosine in cosines], abs=1e-5)
    norms = [0.5 * y.norm(dim=-1).mean().item() for y in (first, second, third)]
    assert layer["norm"] == pytest.approx(norms, rel=1e-5)


def test_branch_norms_make_updates_equally_large():
    model = tiny_model(inner_iter=2, prenorm_residual=True, branch_norm=True, residual_scale=2 * 2**0.5)
    for layer in measure_iterations(model, batches())["layers"]:
        assert layer["norm"] == pytest.approx([32**0.5] * 2, rel=1e-3)
