# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Balancing routers by their selection biases, in any training loop."""

import torch
from torch import nn

from .recording import find_coe_model, watch_routers
from .statistics import count_choices, sum_over_ranks


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
