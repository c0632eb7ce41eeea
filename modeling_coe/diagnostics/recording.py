# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Watching the routers of a model: any of its forwards, or those on a data set."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..modeling_coe import _token_mask
from .statistics import RoutingStatistics


logger = logging.get_logger(__name__)

Batch = dict[str, torch.Tensor]

NOTHING_RECORDED = (
    "No forward was recorded. A model that was compiled and called before does not call the hooks that record: start "
    "recording first."
)


@contextmanager
def record_routing(
    model: nn.Module, statistics: RoutingStatistics | None = None, *, training_only: bool = False
) -> Iterator[RoutingStatistics]:
    """Records all forwards of a model inside a `with` block, whether or not they return router logits.

    Padding is left out where the forward gets a two-dimensional attention mask. What gradient checkpointing computes
    again in the backward pass is not counted again. A bare `CoeModel` returns its router logits and indices meanwhile;
    nothing else about the forwards changes. A compiled model must not have been called before.

    Args:
        model (`nn.Module`): A Chain-of-Experts model, or a wrapper of one (DDP, PEFT, ...).
        statistics (`RoutingStatistics`, *optional*): Where to add the tokens; a new object if not given.
        training_only (`bool`, defaults to `False`): Leave out forwards in evaluation mode or without gradients.

    Yields:
        `RoutingStatistics`: The statistics, at any time those of the forwards so far.

    Raises:
        ValueError: There is no Chain-of-Experts model, or it has no sparse layers.
    """
    if statistics is None:
        statistics = RoutingStatistics(find_coe_model(model).config)
    tokens = statistics.tokens
    with watch_routers(model, statistics.update, training_only=training_only):
        yield statistics
    if statistics.tokens == tokens:
        logger.warning(NOTHING_RECORDED)


def find_coe_model(model: nn.Module) -> PreTrainedModel:
    """The `CoeModel`, of this package or of a folder's own code, inside a model with a head or a wrapper.

    Raises:
        ValueError: There is none.
    """
    for module in model.modules():
        recorded = getattr(module, "_can_record_outputs", None) or {}
        if "router_indices" in recorded and module.base_model is module:
            return module
    raise ValueError(f"There is no Chain-of-Experts model in this {type(model).__name__}. Pass one, or its wrapper.")


def is_training_pass(model: nn.Module) -> bool:
    """Whether this forward is one to train on. Trainers that generate do so in training mode, without gradients."""
    return model.training and torch.is_grad_enabled()


def watch_routers(model: nn.Module, receive: Callable[..., None], *, training_only: bool = False) -> ExitStack:
    """Calls `receive(router_indices, router_logits, token_mask)` after every forward of the base model, from now on
    until what it returns is closed, or left as the context of a `with` block.

    The model's own recording does the work. It ends with the forward, so recomputation in the backward pass, which
    runs the layers again and not the base model, is not part of it.

    Args:
        model (`nn.Module`): A Chain-of-Experts model, or a wrapper of one.
        receive (`Callable`): Gets the choices (T, K) and raw logits (T, N) of every router call, as the model returns
            them, and a bool tensor (T,) that is `False` for padding.
        training_only (`bool`, defaults to `False`): Leave out forwards in evaluation mode or without gradients.

    Returns:
        `ExitStack`: Holds the hooks.

    Raises:
        ValueError: There is no Chain-of-Experts model.
    """

    def ask(base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if training_only and not is_training_pass(base):
            return None
        return args, kwargs | {"output_router_logits": True, "output_router_indices": True}

    def pass_on(base: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if training_only and not is_training_pass(base):
            return
        if isinstance(output, tuple):
            raise ValueError("Routing is not recorded where `return_dict=False`. Leave it out while recording.")
        hidden_states = output.last_hidden_state
        attention_mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        token_mask = _token_mask(attention_mask, hidden_states.shape[1])
        if token_mask is None:
            token_mask = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        receive(output.router_indices, output.router_logits, token_mask.flatten())

    base, hooks = find_coe_model(model), ExitStack()
    hooks.enter_context(base.register_forward_pre_hook(ask, with_kwargs=True))
    hooks.enter_context(base.register_forward_hook(pass_on, with_kwargs=True))
    return hooks


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, inside a `with` block."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _run(model: nn.Module, batch: Batch) -> None:
    device = find_coe_model(model).device
    model(**{name: tensor.to(device) for name, tensor in batch.items()})


def measure_routing(model: nn.Module, batches: Iterable[Batch]) -> RoutingStatistics:
    """Statistics of a model on data, in evaluation mode and without gradients.

    Args:
        model (`nn.Module`): A Chain-of-Experts model, or a wrapper of one.
        batches (`Iterable[dict[str, torch.Tensor]]`): Arguments of one forward each, such as a tokenizer returns.

    Returns:
        `RoutingStatistics`: Of all batches.
    """
    with evaluating(model), record_routing(model) as statistics:
        for batch in batches:
            _run(model, batch)
    return statistics


def routing_stability(model_a: nn.Module, model_b: nn.Module, batches: Iterable[Batch]) -> dict[int, list[float]]:
    """How far two checkpoints choose the same experts for the same tokens, in evaluation mode.

    For every layer and iteration it is the mean over tokens of `|A & B| / K`, where A and B are the sets of K experts
    that the two models choose: 1 where all choices agree, K / N where they have nothing to do with each other.

    Args:
        model_a, model_b (`nn.Module`): Models with the same sparse layers, iterations, experts and K.
        batches (`Iterable[dict[str, torch.Tensor]]`): Arguments of one forward each.

    Returns:
        `dict[int, list[float]]`: Index of each sparse layer -> agreement in each iteration; NaN without tokens.

    Raises:
        ValueError: The models route differently.
    """
    layouts = []
    for model in (model_a, model_b):
        config = find_coe_model(model).config
        layers = {i: (config.num_iterations(i), config.experts_per_iteration(i)) for i in config.sparse_layers}
        layouts.append((config.n_routed_experts, layers))
    if layouts[0] != layouts[1]:
        raise ValueError(
            "The models route differently (experts, and iterations and experts per iteration by layer): "
            f"{layouts[0]} and {layouts[1]}. Compare checkpoints of one architecture."
        )
    top_k = torch.tensor([k for iterations, k in layouts[0][1].values() for _ in range(iterations)])
    common, tokens = torch.zeros(len(top_k), dtype=torch.int64), 0
    with evaluating(model_a), evaluating(model_b):
        for batch in batches:
            (choices_a, mask), (choices_b, _) = _choices(model_a, batch), _choices(model_b, batch)
            tokens += int(mask.sum())
            for call, (a, b) in enumerate(zip(choices_a, choices_b, strict=True)):
                same = a[:, :, None] == b.to(a.device)[:, None, :]
                common[call] += same.sum(dim=(1, 2)).cpu()[mask].sum()
    agreement = iter((common.double() / (tokens * top_k)).tolist())
    return {layer_idx: list(islice(agreement, iterations)) for layer_idx, (iterations, _) in layouts[0][1].items()}


def _choices(model: nn.Module, batch: Batch) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The experts (T, K) of every router call of one forward, and which of the T tokens count."""
    seen = []
    with watch_routers(model, lambda *call: seen.append(call)):
        _run(model, batch)
    ((indices, _, token_mask),) = seen
    return indices, token_mask.cpu()
