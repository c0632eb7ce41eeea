# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Routers in training: what they do, logged with the loss, and balancing them without an auxiliary loss. And the CPU
kernels of a run, kept in its checkpoints.

Not imported by `import modeling_coe`, since it needs the Trainer's modules.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from . import cpu_kernels
from .diagnostics import (
    NOTHING_RECORDED,
    RoutingStatistics,
    count_choices,
    find_coe_model,
    is_training_pass,
    sum_over_ranks,
    watch_routers,
)


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
    logged too where the model returns one and nobody else logs it.

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
        self.statistics = RoutingStatistics(find_coe_model(model).config)
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
            if aux_loss[1] and "aux_loss" not in logs:
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
                values = torch.stack([getattr(layer, name)[t - (name == "reuse")] for layer in reached])
                metrics[f"routing/iter{t}/{name}"] = values.mean().item()
                metrics[f"routing/iter{t}/{name}_worst"] = getattr(values, worst)().item()
        return metrics

    def _warn(self) -> None:
        if not self.statistics.tokens:
            self._warn_once("nothing", NOTHING_RECORDED)
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


class BiasBalancer:
    """Balances without an auxiliary loss (arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    Every router has a selection bias per expert, which is added to the scores that choose experts and not to those
    that weigh them. Training passes are counted, and `step`, after every optimizer step, takes `speed` from the bias
    of experts that got more tokens than the mean and gives it to those that got fewer. In a chain each iteration has a
    router, and so a balance, of its own.

    ```python
    balancer = BiasBalancer(model, speed=1e-3)
    for batches in steps:
        for batch in batches:  # micro-batches of one optimizer step
            model(**batch).loss.backward()
        optimizer.step()
        balancer.step()
    ```

    Only forward passes in training mode with gradients enabled are counted: not evaluation, generation, or what
    checkpointing computes again. Tokens that a 2D `attention_mask` calls padding are not counted either.

    Args:
        model (`nn.Module`): A Chain-of-Experts model, or what wraps one, with `topk_method="noaux_tc"`.
        speed (`float`, defaults to 1e-3): How far a bias moves in one step. The papers take 1e-3 with sigmoid scores,
            which lie between 0 and 1.

    Raises:
        ValueError: The model has no selection bias, or an adapter whose checkpoints would not hold it, or `speed` is
            not positive.
    """

    def __init__(self, model: nn.Module, speed: float = 1e-3):
        base = find_coe_model(model)
        config = base.config
        if config.topk_method != "noaux_tc" or not config.num_sparse_layers:
            raise ValueError(
                f'`topk_method="noaux_tc"` gives routers the selection bias that is moved here; this model has '
                f"`topk_method={config.topk_method!r}` and {config.num_sparse_layers} sparse layers. Configure it so, "
                "or balance by `aux_loss_alpha`."
            )
        if getattr(model, "peft_config", None) is not None:
            raise ValueError(
                "The selection bias belongs to the base model, and the checkpoints of an adapter do not hold it: it "
                "would be lost. Merge the adapter first, or train the adapter without moving the bias."
            )
        if not speed > 0:
            raise ValueError(f"`speed` is {speed}; it must be greater than 0.")
        self.speed = speed
        self.routers = [module for module in base.modules() if hasattr(module, "e_score_correction_bias")]
        for router in self.routers:  # `load_state_dict(assign=True)` may have brought half precision
            if router.e_score_correction_bias.itemsize < torch.float32.itemsize:
                router.e_score_correction_bias = router.e_score_correction_bias.float()
        # Which of them made each of the model's `router_indices`: without `use_igate`, one makes those of a layer.
        self._router_of_call, num_routers = [], 0
        for layer_idx in config.sparse_layers:
            iterations = range(config.num_iterations(layer_idx))
            self._router_of_call += [num_routers + (t if config.use_igate else 0) for t in iterations]
            num_routers = self._router_of_call[-1] + 1
        device = self.routers[0].weight.device
        self.counts = torch.zeros(num_routers, config.n_routed_experts, dtype=torch.int64, device=device)
        self._hooks = watch_routers(model, self._count, training_only=True)

    def _count(
        self, indices: tuple[torch.Tensor, ...], logits: tuple[torch.Tensor, ...], token_mask: torch.Tensor
    ) -> None:
        device = self.counts.device
        for row, chosen in zip(self._router_of_call, indices, strict=True):
            count_choices(self.counts[row], chosen.to(device), token_mask.to(device))

    def step(self) -> None:
        """Moves every bias by the tokens counted since the last step, on all ranks together, and counts anew. All
        ranks have to call it. Ranks that see the same tokens (tensor parallel) change nothing by counting them twice.
        """
        sum_over_ranks([self.counts])
        total = self.counts.sum(dim=-1, keepdim=True)
        direction = (total - self.counts * self.counts.shape[-1]).sign()  # of the mean minus the load, in integers
        for router, signs in zip(self.routers, direction, strict=True):
            bias = router.e_score_correction_bias
            bias.add_(signs.to(bias), alpha=self.speed)
        self.counts.zero_()

    def remove(self) -> None:
        """Leaves the model: nothing is counted any more."""
        self._hooks.close()


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


class CpuKernelsCallback(TrainerCallback, ExportableState):
    """Goes on with the CPU kernels that the interrupted run had: `Trainer(..., callbacks=[CpuKernelsCallback()])`.

    Each process measures which kernels are fastest (see `cpu_kernels.py`), so a resumed run may have others, whose
    results differ in the last bits. With this callback the choices are part of `trainer_state.json` in every
    checkpoint, and `trainer.train(resume_from_checkpoint=...)` takes them from there. All ranks resume with those of
    the first.
    """

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"choices": cpu_kernels.choices()}}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is not None:
            cpu_kernels.use(saved["attributes"]["choices"])


__all__ = ["BiasBalancer", "BiasBalancingCallback", "CpuKernelsCallback", "RoutingCallback"]
