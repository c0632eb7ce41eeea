# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Routers in training with transformers' `Trainer`: what they do, logged with the loss, and balancing them without an
auxiliary loss."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from .balancer import BiasBalancer
from .recording import NOTHING_RECORDED, find_coe_model, is_training_pass, watch_routers
from .statistics import RoutingStatistics, sum_over_ranks


logger = logging.get_logger(__name__)

# What is logged -> which of the layers' values is the worst.
LOGGED = {"max_vio": "max", "load_entropy": "min", "dead_share": "max", "margin": "min", "reuse": "max"}


class RoutingCallback(TrainerCallback):
    """Logs routing statistics of the training tokens since the last log, with the training loss.

        trainer = Trainer(model, args, train_dataset=data)
        RoutingCallback.add_to(trainer)

    For iteration t it logs `routing/iter{t}/{name}` for `max_vio`, `load_entropy`, `dead_share`, `margin` and, from
    iteration 1, `reuse` (the share of its choices that the iteration before had made), each as the mean over layers,
    and as `..._worst` that of the layer with the worst value. [`LayerRouting`] defines them. The number of keys does
    not depend on the number of layers: at most 10 for each of the first `max_iterations` iterations. `aux_loss` is
    logged too where the model returns one and nobody else logs it. What can say nothing is left out: load and re-use
    where every iteration takes all experts, `aux_loss` and warnings where a token uses all experts of a layer.

    Evaluation, other passes without gradients, padding and recomputation under gradient checkpointing do not count;
    ranks are added up. Once each, it warns when an expert is never chosen and when the load of a router collapses,
    looking at all iterations.

    `Trainer(callbacks=[RoutingCallback()])` works too, but then the loggers of `report_to`, which run before callbacks
    given that way, miss these keys; the progress bar and `log_history` have them.

    Args:
        max_iterations (`int`, defaults to 4): Iterations to log.
        min_expected (`int`, defaults to 32): An expert that was not chosen since the last log counts as dead only
            where uniform routing would have chosen it this many times, and a load as collapsed likewise.
        collapse_entropy (`float`, defaults to 0.5): A load with a normalised entropy below this has collapsed.
    """

    def __init__(self, max_iterations: int = 4, min_expected: int = 32, collapse_entropy: float = 0.5):
        self.max_iterations, self.min_expected, self.collapse_entropy = max_iterations, min_expected, collapse_entropy
        self.statistics: RoutingStatistics | None = None
        self.hooks = ExitStack()
        self.warned: set[str] = set()

    @classmethod
    def add_to(cls, trainer: Any, **options: Any) -> RoutingCallback:
        """Adds a callback with these options to a `Trainer`, before its loggers, and returns it."""
        callback = cls(**options)
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_train_end(args, state, control)  # an earlier run may have broken off
        config = find_coe_model(model).config
        self.statistics, self.is_balanced = RoutingStatistics(config), config.uses_all_experts
        self.aux_loss_sum, self.num_forwards = torch.zeros(()), 0
        self.hooks = watch_routers(model, self.statistics.update, training_only=True)
        self.hooks.enter_context(model.register_forward_hook(self._add_aux_loss))

    def _add_aux_loss(self, module: nn.Module, args: tuple, output: Any) -> None:
        aux_loss = getattr(output, "aux_loss", None)
        if is_training_pass(module) and aux_loss is not None:
            self.aux_loss_sum = self.aux_loss_sum + aux_loss.detach()
            self.num_forwards += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.statistics is None or "loss" not in (logs or {}):
            return
        self.statistics.all_reduce()
        aux_loss = torch.tensor([float(self.aux_loss_sum), self.num_forwards])
        sum_over_ranks([aux_loss])
        if self.statistics.tokens:
            metrics = self._metrics()
            if aux_loss[1] and not self.is_balanced and "aux_loss" not in logs:
                metrics["aux_loss"] = float(aux_loss[0] / aux_loss[1])
            logs.update(metrics)
            # `Trainer` made its entry before it asked the callbacks.
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(metrics)
        if state.is_world_process_zero:
            self._warn()
        self.statistics.reset()
        self.aux_loss_sum, self.num_forwards = torch.zeros(()), 0

    def on_train_end(self, args, state, control, **kwargs):
        self.hooks.close()
        self.statistics = None

    def _metrics(self) -> dict[str, float]:
        layers, metrics = self.statistics.layers.values(), {}
        for t in range(min(self.max_iterations, max(layer.num_iterations for layer in layers))):
            reached = [layer for layer in layers if layer.num_iterations > t]
            for name, worst in LOGGED.items():
                if name == "reuse" and t == 0:
                    continue
                if name != "margin" and not self.statistics.has_load:
                    continue
                values = torch.stack([getattr(layer, name)[t - (name == "reuse")] for layer in reached])
                metrics[f"routing/iter{t}/{name}"] = values.mean().item()
                metrics[f"routing/iter{t}/{name}_worst"] = getattr(values, worst)().item()
        return metrics

    def _warn(self) -> None:
        if not self.statistics.tokens:
            self._warn_once("nothing", NOTHING_RECORDED)
        if self.is_balanced:
            return
        remedy = "Raise `aux_loss_alpha` or lower the learning rate; this is not repeated."
        for layer_idx, layer in self.statistics.layers.items():
            expected = layer.selections.cpu().double().mean(dim=-1)
            dead, entropy = layer.selections.cpu().eq(0).sum(dim=-1), layer.load_entropy
            for t in expected.ge(self.min_expected).nonzero().flatten().tolist():
                where = f"Layer {layer_idx}, iteration {t}"
                if dead[t]:
                    self._warn_once(
                        "dead",
                        f"{where}: {dead[t]} of {layer.num_experts} experts were not chosen once, where uniform "
                        f"routing would have chosen each {expected[t]:.0f} times. {remedy}",
                    )
                if entropy[t] < self.collapse_entropy:
                    self._warn_once(
                        "collapse",
                        f"{where}: routing collapses, the normalised entropy of the load is {entropy[t]:.2f} and one "
                        f"expert gets {layer.load[t].max():.0%} of all choices. {remedy}",
                    )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            logger.warning(message)


class BiasBalancingCallback(TrainerCallback):
    """[`BiasBalancer`] for [`Trainer`]: `Trainer(..., callbacks=[BiasBalancingCallback(speed=1e-3)])`.

    The biases move once per optimizer step, by the tokens of all its micro-batches and ranks. They are buffers of the
    model, so a checkpoint holds them and a resumed run goes on where it was. DeepSeek-V3 keeps a sequence-level
    `aux_loss_alpha` of 1e-4 beside it; 0 leaves all balancing to the biases.

    Args:
        speed (`float`, defaults to 1e-3): How far a bias moves in one step.

    Raises:
        ValueError: When training begins, as [`BiasBalancer`] does.
    """

    def __init__(self, speed: float = 1e-3):
        self.speed = speed
        self.balancer: BiasBalancer | None = None

    def on_train_begin(self, args, state, control, model: nn.Module | None = None, **kwargs) -> None:
        self._remove()  # of a run that was broken off
        self.balancer = BiasBalancer(model, self.speed)

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.balancer.step()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._remove()

    def _remove(self) -> None:
        if self.balancer is not None:
            self.balancer.remove()
            self.balancer = None
