# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Losses that keep the routers of a Chain-of-Experts model balanced: pure functions of what one router call returned.

T = batch * length tokens, N experts, K chosen per token. A row of the batch is one sequence, or several in packing.
"""

import torch
from torch.nn import functional as F

from .configuration_coe import CoeConfig


def router_scores(router_logits: torch.Tensor, scoring_func: str) -> torch.Tensor:
    """Turns router logits into the scores that choose and weigh experts.

    Args:
        router_logits (`torch.Tensor`): Raw router outputs, (T, N), fp32 or wider.
        scoring_func (`str`): `"softmax"` over the experts or element-wise `"sigmoid"`.

    Returns:
        `torch.Tensor`: Scores of the shape and dtype of `router_logits`.
    """
    return router_logits.softmax(dim=-1) if scoring_func == "softmax" else router_logits.sigmoid()


def packed_sequences(position_ids: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Numbers the sequences of a batch whose rows may hold several: one begins with every row, and wherever positions
    do not go on by one. transformers finds them in the same way for its attention masks.

    Args:
        position_ids (`torch.Tensor`): (batch, length) or (1, length), int64.
        batch_size (`int`): Number of rows.

    Returns:
        `torch.Tensor`: (batch, length), int64, from 0 to at most T - 1; no number is in two rows.
    """
    starts = F.pad(position_ids.diff(dim=-1) != 1, (1, 0), value=True).expand(batch_size, -1)
    return starts.flatten().cumsum(dim=0).sub(1).view_as(starts)


def load_balancing_loss(
    router_logits: torch.Tensor,
    router_indices: torch.Tensor,
    *,
    batch_size: int,
    scoring_func: str = "softmax",
    seq_aux: bool = True,
    token_mask: torch.Tensor | None = None,
    sequence_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Load-balancing loss of one router call, without its coefficient.

    For each sequence (or, with `seq_aux=False`, for the whole batch at once) it is `sum_e f_e * P_e`, where `P_e` is
    the mean score of expert `e` and `f_e` the number of times it was chosen times `N / (tokens * K)`; then the mean
    over sequences. It is 1 when both are uniform. DeepSeek-V2 eq. 23-25; sigmoid scores are first normalised to sum to
    1 over the experts, DeepSeek-V3 eq. 17-20. Gradients flow through `P_e` only.

    Args:
        router_logits (`torch.Tensor`): Raw router outputs, (T, N), fp32 or wider.
        router_indices (`torch.Tensor`): Experts chosen, (T, K), int64.
        batch_size (`int`): Number of rows in the T tokens, which are ordered row by row.
        scoring_func (`str`, defaults to `"softmax"`): Scoring function of the router.
        seq_aux (`bool`, defaults to `True`): Balance within each sequence instead of over the batch.
        token_mask (`torch.Tensor`, *optional*): (batch, length), true for tokens that count. Sequences without such
            a token count nowhere.
        sequence_ids (`torch.Tensor`, *optional*): (batch, length), the sequence that each token belongs to, from 0 to
            T - 1, where rows hold several. Without it every row is one.

    Returns:
        `torch.Tensor`: Scalar of the dtype of `router_logits`.
    """
    num_experts, top_k = router_logits.shape[-1], router_indices.shape[-1]
    scores = router_scores(router_logits, scoring_func)
    if scoring_func != "softmax":
        scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    chosen = torch.zeros_like(scores).scatter(-1, router_indices, 1.0)

    num_groups = batch_size if seq_aux else 1
    if token_mask is None and sequence_ids is None:
        share_chosen = chosen.view(num_groups, -1, num_experts).mean(dim=1) * (num_experts / top_k)
        return (share_chosen * scores.view(num_groups, -1, num_experts).mean(dim=1)).sum(dim=-1).mean()

    def sum_by_group(values: torch.Tensor) -> torch.Tensor:  # (T, width) to (groups, width)
        if seq_aux and sequence_ids is not None:  # as many groups as there are tokens, of which the last are empty
            return torch.zeros_like(values).index_add(0, sequence_ids.flatten(), values)
        return values.view(num_groups, -1, values.shape[-1]).sum(dim=1)

    mask = scores.new_ones(len(scores), 1) if token_mask is None else token_mask.reshape(-1, 1).bool().to(scores)
    length = sum_by_group(mask)
    share_chosen = sum_by_group(chosen * mask) / length.clamp(min=1) * (num_experts / top_k)
    mean_scores = sum_by_group(scores * mask) / length.clamp(min=1)
    return (share_chosen * mean_scores).sum() / (length > 0).sum().clamp(min=1)


def router_z_loss(router_logits: torch.Tensor, *, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Router z-loss of one router call, without its coefficient: the mean over tokens of the squared log-partition of
    the logits (ST-MoE, arXiv 2202.08906, eq. 5). It keeps the logits small.

    Args:
        router_logits (`torch.Tensor`): Raw router outputs, (T, N), fp32 or wider.
        token_mask (`torch.Tensor`, *optional*): (batch, length), true for tokens that count.

    Returns:
        `torch.Tensor`: Scalar of the dtype of `router_logits`.
    """
    squared = router_logits.logsumexp(dim=-1).square()
    if token_mask is None:
        return squared.mean()
    mask = token_mask.reshape(-1).bool().to(squared)
    return (squared * mask).sum() / mask.sum().clamp(min=1)


def balancing_losses(
    router_logits: tuple[torch.Tensor, ...],
    router_indices: tuple[torch.Tensor, ...],
    config: CoeConfig,
    *,
    batch_size: int,
    token_mask: torch.Tensor | None = None,
    sequence_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sums the losses above over all router calls: every iteration of every sparse layer.

    Args:
        router_logits (`tuple[torch.Tensor, ...]`): One (T, N) tensor per router call; layers may lie on different
            devices.
        router_indices (`tuple[torch.Tensor, ...]`): One (T, K) tensor per router call.
        config (`CoeConfig`): Gives the scoring function, the kind of balance and whether a z-loss is wanted.
        batch_size (`int`): Number of rows in the T tokens.
        token_mask (`torch.Tensor`, *optional*): (batch, length), true for tokens that count.
        sequence_ids (`torch.Tensor`, *optional*): (batch, length), the sequence that each token belongs to, where rows
            hold several.

    Returns:
        The load-balancing loss and the router z-loss, scalars without their coefficients on the last call's device;
        the z-loss is `None` where `router_z_loss_coef` is 0.
    """
    device = router_logits[-1].device
    aux_loss = torch.zeros((), device=device)
    z_loss = torch.zeros((), device=device) if config.router_z_loss_coef else None
    for logits, indices in zip(router_logits, router_indices, strict=True):
        mask = None if token_mask is None else token_mask.to(logits.device)
        ids = None if sequence_ids is None else sequence_ids.to(logits.device)
        call_loss = load_balancing_loss(
            logits,
            indices,
            batch_size=batch_size,
            scoring_func=config.scoring_func,
            seq_aux=config.seq_aux,
            token_mask=mask,
            sequence_ids=ids,
        )
        aux_loss = aux_loss + call_loss.to(device)
        if z_loss is not None:
            z_loss = z_loss + router_z_loss(logits, token_mask=mask).to(device)
    return aux_loss, z_loss


def label_token_share(
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
    shift_labels: torch.Tensor | None = None,
    ignore_index: int = -100,
) -> torch.Tensor | float:
    """Share of one optimizer step's label tokens that this batch holds.

    The cross-entropy of a batch is divided by the label tokens of the whole step when `num_items_in_batch` is given,
    so that micro-batches and ranks add up to one mean. A term that is a mean already, like the losses above, adds up
    in the same way only when it is weighted by this share.

    Args:
        labels (`torch.Tensor`): (batch, length) label ids before shifting.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): Label tokens of the whole step.
        shift_labels (`torch.Tensor`, *optional*): Labels that are shifted already, used instead of `labels`.
        ignore_index (`int`, defaults to -100): Label of tokens without a loss.

    Returns:
        1.0 without `num_items_in_batch`, otherwise a scalar tensor.
    """
    if num_items_in_batch is None:
        return 1.0
    targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(targets.device)
    return targets.ne(ignore_index).sum() / num_items_in_batch
