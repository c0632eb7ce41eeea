# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What each iteration of a chain adds: in which direction, how much, and what the loss is without it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .recording import Batch, evaluating, find_coe_model


@contextmanager
def _passing_outputs_through(
    model: nn.Module, function: Callable[[int, int, torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Replaces the output `y_t` of every iteration by `function(layer, t, y_t)`, normed and scaled as it is added."""
    layers = {i: layer for i, layer in enumerate(find_coe_model(model).layers) if layer.num_iterations}
    for i, layer in layers.items():
        original = layer.scale_output
        layer.scale_output = lambda y, t, i=i, original=original: function(i, t, original(y, t))
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.scale_output  # what was set on the object; the class has it


def measure_iterations(model: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
    """Measures, in evaluation mode, the updates `y_t` of all chains and what dropping one does to the loss.

    To drop an iteration is to put zeros in the place of its `y_t`: the routers of later ones read a stream without it.

    Args:
        model (`nn.Module`): A Chain-of-Experts model with a head for next tokens, or a wrapper of one.
        batches (`Iterable[dict[str, torch.Tensor]]`): Arguments of one forward each, with `labels`. They are read
            several times. Batches count by their number of labels.

    Returns:
        `dict[str, Any]`: `loss`; `loss_without`, with iteration t dropped in all layers that have one, by t; and
        `layers`, one dictionary each: index `layer`, mean `cosine` of `y_t` and `y_{t+1}` over tokens (C-1), mean
        `norm` of `y_t` (C), and `loss_without` (C), with it dropped in this layer alone.
    """
    batches = list(batches)
    config = find_coe_model(model).config
    iterations = {i: config.num_iterations(i) for i in config.sparse_layers}
    updates: dict[tuple[int, int], list[torch.Tensor]] = {}

    def keep(layer: int, t: int, y: torch.Tensor) -> torch.Tensor:
        updates.setdefault((layer, t), []).append(y.flatten(0, -2))
        return y

    def loss_without(dropped: Callable[[int, int], bool]) -> float:
        with _passing_outputs_through(model, lambda layer, t, y: torch.zeros_like(y) if dropped(layer, t) else y):
            return _loss(model, batches)

    with evaluating(model):
        with _passing_outputs_through(model, keep):
            loss = _loss(model, batches)
        kept = {place: torch.cat(outputs).float() for place, outputs in updates.items()}
        layers = [
            {
                "layer": i,
                "cosine": [
                    float(torch.cosine_similarity(kept[i, t], kept[i, t + 1], dim=-1).mean()) for t in range(count - 1)
                ],
                "norm": [float(kept[i, t].norm(dim=-1).mean()) for t in range(count)],
                "loss_without": [
                    loss_without(lambda layer, at, i=i, t=t: (layer, at) == (i, t)) for t in range(count)
                ],
            }
            for i, count in iterations.items()
        ]
        everywhere = [loss_without(lambda _, at, t=t: at == t) for t in range(max(iterations.values(), default=0))]
    return {"loss": loss, "loss_without": everywhere, "layers": layers}


def _loss(model: nn.Module, batches: list[Batch]) -> float:
    """Mean over all labels, but for the first of every sequence, which nothing predicts."""
    total, count = 0.0, 0
    device = find_coe_model(model).device
    for batch in batches:
        labels = int((batch["labels"][:, 1:] != -100).sum())
        total += labels * float(model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss)
        count += labels
    return total / count
