# Copyright 2026 The CoE Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Balancing without an auxiliary loss (arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

Every router has a selection bias per expert, which is added to the scores that choose experts and not to those that
weigh them. After every optimizer step, experts that got more tokens than the mean lose `speed` of their bias and those
that got fewer gain it. In a chain each iteration has a router, and so a balance, of its own.

Not imported by `import modeling_coe`, since it needs the Trainer's modules.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback

from .modeling_coe import CoeModel, CoeModelOutputWithPast, CoeRouter, _token_mask


class BiasBalancer:
    """Counts the tokens of every expert in a model's training passes, and moves the selection biases by them.

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
        backbone = next((module for module in model.modules() if isinstance(module, CoeModel)), None)
        if backbone is None:
            raise ValueError(f"`model` is a {type(model).__name__} without a Chain-of-Experts model in it. Pass one.")
        config = backbone.config
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
        self.routers = [module for module in backbone.modules() if isinstance(module, CoeRouter)]
        # Which of them made each of the model's `router_indices`: without `use_igate`, one makes those of a layer.
        self._router_of_call, num_routers = [], 0
        for layer_idx in config.sparse_layers:
            iterations = range(config.num_iterations(layer_idx))
            self._router_of_call += [num_routers + (t if config.use_igate else 0) for t in iterations]
            num_routers = self._router_of_call[-1] + 1
        device = self.routers[0].weight.device
        self.counts = torch.zeros(num_routers, config.n_routed_experts, dtype=torch.int64, device=device)
        self._hooks = [
            backbone.register_forward_pre_hook(self._ask_for_indices, with_kwargs=True),
            backbone.register_forward_hook(self._count, with_kwargs=True),
        ]

    def step(self) -> None:
        """Moves every bias by the tokens counted since the last step, on all ranks together, and counts anew. All
        ranks have to call it. Ranks that see the same tokens (tensor parallel) change nothing by counting them twice.
        """
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.counts)
        total = self.counts.sum(dim=-1, keepdim=True)
        direction = (total - self.counts * self.counts.shape[-1]).sign()  # of the mean minus the load, in integers
        for router, signs in zip(self.routers, direction, strict=True):
            bias = router.e_score_correction_bias
            bias.add_(signs.to(bias), alpha=self.speed)
        self.counts.zero_()

    def remove(self) -> None:
        """Leaves the model: nothing is counted any more."""
        for hook in self._hooks:
            hook.remove()

    @staticmethod
    def _is_training_pass(model: CoeModel) -> bool:
        return model.training and torch.is_grad_enabled()

    def _ask_for_indices(self, model: CoeModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "output_router_indices": True} if self._is_training_pass(model) else kwargs

    def _count(self, model: CoeModel, args: tuple, kwargs: dict[str, Any], output: CoeModelOutputWithPast) -> None:
        if not self._is_training_pass(model):
            return
        batch_size, length = output.last_hidden_state.shape[:2]
        mask = _token_mask(kwargs.get("attention_mask"), length)
        tokens = torch.ones(batch_size, length, dtype=torch.int64) if mask is None else mask.ne(0).long()
        for row, indices in zip(self._router_of_call, output.router_indices, strict=True):
            counts = torch.zeros(self.counts.shape[-1], dtype=torch.int64, device=indices.device)
            counts.scatter_add_(
                0, indices.flatten(), tokens.to(indices.device).flatten().repeat_interleave(indices.shape[-1])
            )
            self.counts[row] += counts.to(self.counts.device)


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


__all__ = ["BiasBalancer", "BiasBalancingCallback"]
